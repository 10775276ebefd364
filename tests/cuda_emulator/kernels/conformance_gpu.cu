// Prints what every primitive gives on the GPU that is here. conformance.py says how to build it, and compares.
#include <stdio.h>

#include "conformance.cu"

int main() {
  static uint32_t in[1024], out[kCases * 32 * kWords];
  uint64_t state = 12345;  // the numbers of conformance.py
  for (uint32_t& word : in) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    word = uint32_t(state >> 32);
  }
  uint32_t *given, *results;
  cudaMalloc(&given, sizeof in), cudaMalloc(&results, sizeof out);
  cudaMemcpy(given, in, sizeof in, cudaMemcpyHostToDevice);
  const char* error = conformance_launch(given, results);
  const cudaError_t ran = cudaDeviceSynchronize();
  if (error || ran != cudaSuccess) {
    fprintf(stderr, "%s\n", error ? error : cudaGetErrorString(ran));
    return 1;
  }
  cudaMemcpy(out, results, sizeof out, cudaMemcpyDeviceToHost);
  for (int i = 0; i < kCases * 32; ++i) {
    printf("%2d %2d ", i / 32, i % 32);
    for (int word = 0; word < kWords; ++word) printf(" %08x", out[i * kWords + word]);
    printf("\n");
  }
  return 0;
}
