// The native ops of the mixing family: attention with channels from other frames, and the shift of channels alone.
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "mixing_call.h"
#include "mixing_kernels.h"

namespace vidattn {
namespace {

const MixingKernels& kernels(const MixingArgs& a, bool backward) {
  return kernels_for<MixingKernels>(a.element, backward, VIDATTN_KERNELS(mixing));
}

// ---- Attention ----

MixingArgs read_call(Arguments& from, std::vector<ChannelShift>& shifts) {
  const Tensor* seed;
  MixingArgs a = read_mixing_call(from, shifts, seed);
  set_seed(a, seed);
  return a;
}

void forward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments from(stack);
  std::vector<ChannelShift> shifts;
  MixingArgs a = read_call(from, shifts);
  a.tensor[kOut] = row_tensor(from.tensor(), a.head_dim);
  STD_TORCH_CHECK(!from.maybe_tensor(), "the CPU's backward pass needs no log-sum-exp");
  run(a, kernels(a, false), false, a.frames * a.heads);
}

void backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments from(stack);
  std::vector<ChannelShift> shifts;
  MixingArgs a = read_call(from, shifts);
  a.tensor[kDout] = row_tensor(from.tensor(), a.head_dim);
  from.maybe_tensor(), from.maybe_tensor();  // out and lse: here a query's scores are at hand all at once
  read_rows(a, Tokens(from), kDq);
  run(a, kernels(a, true), true, a.frames * a.heads);
}

// ---- Shift ----

// Copies the part of a row that comes from one frame: a few cache lines, for which a call of memcpy takes long, and
// which end before a hardware prefetcher has seen where they lead. So those `ahead` bytes on are fetched, on both
// sides. Half a line at a time where the processor can, whatever VIDATTN_CPU_ISA says: a copy has no numbers that could
// differ.
#if defined(VIDATTN_HAS_ISAS)
__attribute__((target_clones("avx2", "default")))
#endif
void copy_part(char* __restrict to, const char* __restrict from, int64_t bytes, int64_t ahead) {
  typedef char Vector __attribute__((vector_size(32), aligned(1), may_alias));
  constexpr int64_t kVector = sizeof(Vector), kLine = 2 * kVector;
  for (int64_t i = 0; i < bytes; i += kLine)
    __builtin_prefetch(from + ahead + i), __builtin_prefetch(to + ahead + i, 1);
  int64_t i = 0;
  for (; i + kLine <= bytes; i += kLine) {
    const Vector first = *reinterpret_cast<const Vector*>(from + i);
    const Vector second = *reinterpret_cast<const Vector*>(from + i + kVector);
    *reinterpret_cast<Vector*>(to + i) = first;
    *reinterpret_cast<Vector*>(to + i + kVector) = second;
  }
  if (i < bytes) std::memcpy(to + i, from + i, bytes - i);
}

// Copies runs of channels of one frame offset.
void temporal_shift(Tensor x, int64_t num_frames, Ints shifts, int64_t dim, Tensor out) {
  const ShiftCall call = read_shift_call(x, num_frames, shifts, dim, out);
  const int64_t outer = call.outer, channels = call.channels, channel_bytes = call.channel_bytes;
  std::vector<ChannelShift> runs;
  int64_t done = 0;
  for (const ChannelShift& shift : call.shifts) {
    if (shift.first > done) runs.push_back({done, shift.first, 0});
    runs.push_back(shift);
    done = shift.last;
  }
  if (done < channels) runs.push_back({done, channels, 0});

  const int64_t row = channels * channel_bytes;
  const char* from = static_cast<const char*>(x.data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  const int64_t rows_at_once = 65536 / (row + 1) + 1;
  const bool long_rows = row > 16384;  // those of channels in front of pixels
  parallel_for(0, call.frames * outer, rows_at_once, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t t = at / outer % num_frames;
      for (const ChannelShift& run : runs) {
        const int64_t place = at * row + run.first * channel_bytes, bytes = (run.last - run.first) * channel_bytes;
        const char* source = from + place + run.offset * outer * row;
        if (t + run.offset < 0 || t + run.offset >= num_frames)
          std::memset(to + place, 0, bytes);
        else if (long_rows)
          std::memcpy(to + place, source, bytes);
        else
          copy_part(to + place, source, bytes, 4 * row);
      }
    }
  });
}

}  // namespace
}  // namespace vidattn

STABLE_TORCH_LIBRARY_IMPL(vidattn, CPU, m) {
  m.impl("_space_time_mixing_attention_forward", &vidattn::forward);
  m.impl("_space_time_mixing_attention_backward", &vidattn::backward);
  m.impl("_temporal_shift", TORCH_BOX(&vidattn::temporal_shift));
}
