// Which instruction sets were built, which this machine has, and which one runs.
#pragma once
#include <string>

namespace vidattn {

enum class Isa { baseline, avx2, avx512, avx512_bf16 };

// The best one of this machine, or the one that VIDATTN_CPU_ISA names (read once).
Isa current_isa();
std::string current_isa_name();
// Comma-separated names of those that this machine can run, the best last.
std::string available_isas();

}  // namespace vidattn
