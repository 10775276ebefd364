#include "isa.h"

#if defined(VIDATTN_HAS_ISAS)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif
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
  bool (*is_fast)() = [] { return true; };  // where it runs: faster than those before it
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
bool has_avx512_bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
}
// Products of 16 x 16 tiles. Linux lends the tile registers to a process that asks for them.
bool has_amx() {
#if defined(__linux__)
  constexpr unsigned kTiles = 1u << 24 | 1u << 22, kSaved = 3u << 17;  // AMX-TILE and AMX-BF16; their state
  constexpr long kAskFor = 0x1023, kTileData = 18;                     // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTiles) != kTiles) return false;
  __asm__("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  static const bool lent = (a & kSaved) == kSaved && syscall(SYS_arch_prctl, kAskFor, kTileData) == 0;
  return lent;
#else
  return false;
#endif
}
#endif

// The best one last.
const Isa kIsas[] = {
    {"baseline", [] { return true; }},
#if defined(VIDATTN_HAS_ISAS)
    {"avx2", has_avx2},
    {"avx512", has_avx512},
    // Intel's take twice as long for as many products as those of float32.
    {"avx512_bf16", has_avx512_bf16, [] { return !__builtin_cpu_is("intel"); }},
    {"avx512_amx", has_amx},
#endif
};

int choose() {
  const char* wanted = std::getenv("VIDATTN_CPU_ISA");
  int best = -1;
  for (int i = 0; i < int(std::size(kIsas)); ++i) {
    if (!wanted || !*wanted) {
      if (kIsas[i].runs_here() && kIsas[i].is_fast()) best = i;
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

int isa_before(int isa) {
  do --isa;
  while (!kIsas[isa].is_fast());
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
