#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <iterator>
#include <string>

namespace vidattn {
namespace {

struct Isa {
  const char* name;
  bool (*runs_here)();
};

#if defined(VIDATTN_HAS_ISAS)
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

// The best one last.
const Isa kIsas[] = {
    {"baseline", [] { return true; }},
#if defined(VIDATTN_HAS_ISAS)
    {"avx2", has_avx2},
    {"avx512", has_avx512},
    {"avx512_bf16", [] { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }},
#endif
};

int choose() {
  const char* wanted = std::getenv("VIDATTN_CPU_ISA");
  int best = -1;
  for (int i = 0; i < int(std::size(kIsas)); ++i) {
    if (!wanted || !*wanted) {
      if (kIsas[i].runs_here()) best = i;
    } else if (kIsas[i].name == std::string(wanted)) {
      STD_TORCH_CHECK(kIsas[i].runs_here(), "VIDATTN_CPU_ISA=", wanted,
                      " is not supported by this CPU; it can run: ", available_isas());
      best = i;
    }
  }
  STD_TORCH_CHECK(best >= 0, "VIDATTN_CPU_ISA: expected one of ", available_isas(), ", got ", wanted);
  return best;
}

}  // namespace

std::string available_isas() {
  std::string names;
  for (const Isa& isa : kIsas)
    if (isa.runs_here()) {
      if (!names.empty()) names += ",";
      names += isa.name;
    }
  return names;
}

int current_isa() {
  static const int isa = choose();
  return isa;
}

std::string current_isa_name() {
  return kIsas[current_isa()].name;
}

}  // namespace vidattn

STABLE_TORCH_LIBRARY_IMPL(vidattn, CompositeExplicitAutograd, m) {
  m.impl("_cpu_isa", TORCH_BOX(&vidattn::current_isa_name));
  m.impl("_cpu_isas", TORCH_BOX(&vidattn::available_isas));
}
