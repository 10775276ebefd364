/* The extension module carries no Python objects: importing it runs the static initialisers that register the kernels.
 */
#include <Python.h>

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", NULL, 0, NULL, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__C(void) {
  return PyModuleDef_Init(&module);
}
