#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace vidattn {
namespace {

const char* const kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};

bool runs_here(Isa isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  switch (isa) {
    case Isa::avx2:
      return avx2;
    case Isa::avx512:
      return avx512;
    case Isa::avx512_bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
    default:
      return true;
  }
#else
  return isa == Isa::baseline;
#endif
}

Isa choose() {
  const char* wanted = std::getenv("VIDATTN_CPU_ISA");
  if (!wanted || !*wanted) {
    Isa best = Isa::baseline;
    for (int i = 0; i < 4; ++i)
      if (runs_here(Isa(i))) best = Isa(i);
    return best;
  }
  for (int i = 0; i < 4; ++i)
    if (kNames[i] == std::string(wanted)) {
      STD_TORCH_CHECK(runs_here(Isa(i)), "VIDATTN_CPU_ISA=", wanted,
                      " is not supported by this CPU; it can run: ", available_isas());
      return Isa(i);
    }
  STD_TORCH_CHECK(false, "VIDATTN_CPU_ISA: expected one of ", available_isas(), ", got ", wanted);
}

}  // namespace

std::string available_isas() {
  std::string names;
  for (int i = 0; i < 4; ++i)
    if (runs_here(Isa(i))) {
      if (!names.empty()) names += ",";
      names += kNames[i];
    }
  return names;
}

Isa current_isa() {
  static const Isa isa = choose();
  return isa;
}

std::string current_isa_name() {
  return kNames[int(current_isa())];
}

}  // namespace vidattn

STABLE_TORCH_LIBRARY_IMPL(vidattn, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&vidattn::current_isa_name));
  m.impl("_cpu_isas", TORCH_BOX(&vidattn::available_isas));
}
