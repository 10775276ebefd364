// Which instruction sets were built, which this machine has, and which one runs.
#pragma once
#include <string>

// A family's kernels for each instruction set, in the order of the table in isa.cpp: VIDATTN_KERNELS(window3d) lists
// what window3d_baseline.cpp, window3d_avx2.cpp and so on define.
#if defined(__x86_64__) && !defined(VIDATTN_SANITIZED)
#define VIDATTN_HAS_ISAS
#endif
#if defined(VIDATTN_HAS_ISAS)
#define VIDATTN_KERNELS(family) \
  {&family##_baseline, &family##_avx2, &family##_avx512, &family##_avx512bf16, &family##_avx512amx}
#define VIDATTN_DECLARE_KERNELS(family, Kernels)                                                            \
  extern const KernelTable<Kernels> family##_baseline, family##_avx2, family##_avx512, family##_avx512bf16, \
      family##_avx512amx
#else
#define VIDATTN_KERNELS(family) {&family##_baseline}
#define VIDATTN_DECLARE_KERNELS(family, Kernels) extern const KernelTable<Kernels> family##_baseline
#endif

namespace vidattn {

// Place in the table of isa.cpp of the best one of this machine, or of the one that VIDATTN_CPU_ISA names (read once).
int current_isa();
std::string current_isa_name();
// Place of the next best one that is fast on this machine.
int isa_before(int isa);
// Comma-separated names of those that this machine can run, the best last.
std::string available_isas();

}  // namespace vidattn
