// What Python sees of the emulator: its controls, what it found and counted, and the memory that kernels left.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "machine.h"

namespace py = pybind11;
using namespace emulator;

namespace {

py::tuple block_of(const Finding& f) {
  return py::make_tuple(f.block.x, f.block.y, f.block.z);
}

// A view: no copy, and what is written to it is written to the memory.
py::array_t<uint8_t> view(uintptr_t begin, size_t bytes) {
  return py::array_t<uint8_t>(py::ssize_t(bytes), reinterpret_cast<uint8_t*>(begin), py::none());
}

py::dict counted() {
  using namespace py::literals;
  return py::dict("launches"_a = counts.launches, "blocks"_a = counts.blocks, "switches"_a = counts.switches,
                  "operations"_a = counts.operations, "accesses"_a = counts.accesses,
                  "ldmatrix_conflicts"_a = counts.ldmatrix_conflicts, "load_conflicts"_a = counts.load_conflicts);
}

}  // namespace

PYBIND11_MODULE(_emulator, m) {
  py::class_<Options>(m, "Options")
      .def_readwrite("checked", &Options::checked)
      .def_readwrite("seed", &Options::seed)
      .def_readwrite("truncate", &Options::truncate)
      .def_readwrite("approximate", &Options::approximate)
      .def_readwrite("shared_limit", &Options::shared_limit);
  m.attr("options") = py::cast(&options, py::return_value_policy::reference);

  py::class_<Finding>(m, "Finding")
      .def_readonly("kind", &Finding::kind)
      .def_readonly("text", &Finding::text)
      .def_readonly("file", &Finding::file)
      .def_readonly("line", &Finding::line)
      .def_readonly("image", &Finding::image)
      .def_readonly("offset", &Finding::offset)
      .def_readonly("address", &Finding::address)
      .def_readonly("thread", &Finding::thread)
      .def_readonly("lane", &Finding::lane)
      .def_property_readonly("block", &block_of);
  m.def("findings", [] { return findings; });
  m.def("counts", &counted);
  m.def("begin", [] { findings.clear(), forget_memory(); });
  m.def("add_memory", [](std::string name, uintptr_t begin, py::array_t<uint8_t, py::array::c_style> rights) {
    add_memory(std::move(name), begin, std::vector<uint8_t>(rights.data(), rights.data() + rights.size()));
  });
  m.def("written", [](const std::string& name) {
    const std::vector<uint8_t> bytes = written(name);
    return py::array_t<uint8_t>(py::ssize_t(bytes.size()), bytes.data());
  });
  m.def("shared_memory", [] { return view(uintptr_t(shared_memory()), shared_bytes); });
}
