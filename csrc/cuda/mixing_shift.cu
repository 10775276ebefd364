// Temporal shift on CUDA: moves bytes, in the largest words that everything is a multiple of.
#include <primitives.cuh>

#include <algorithm>

#include "divisor.cuh"
#include "mixing_cuda.h"

namespace vidattn::cuda {
namespace {

constexpr int kThreads = 128, kWords = 4;  // of a block; of a thread
constexpr int kBlockWords = kThreads * kWords;
constexpr int kRanges = 128;  // of a launch: its arguments have room for 4 KB

// A line is what the channels of one place hold. All sizes are in words.
struct ShiftArguments {
  const char* x;
  char* out;
  int64_t frame_words, line_words;
  int64_t begin, end;  // places in a line that the launch is for
  Divisor blocks;      // of a frame
  Divisor segment, line;
  uint32_t frames;  // of a segment
  int num_ranges;
  ChannelShift ranges[kRanges];  // places in a line, offsets no larger than a segment
};
static_assert(sizeof(ShiftArguments) <= 4096);

// Index counts the words of a frame.
template <class Word, class Index>
__global__ void __launch_bounds__(kThreads) shift_channels(const __grid_constant__ ShiftArguments a) {
  int frame = int(blockIdx.x);
  const int block = a.blocks.split(frame);
  const uint32_t t = uint32_t(a.segment.remainder(frame));
  const int64_t first = int64_t(frame) * a.frame_words;
  const Index start = Index(block) * kBlockWords + Index(threadIdx.x);
  Index place[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    if constexpr (sizeof(Index) == 8)
      place[i] = (start + i * kThreads) % a.line_words;
    else
      place[i] = a.line.remainder(start + i * kThreads);
  }
  int offset[kWords] = {};
#pragma unroll 1
  for (int range = 0; range < a.num_ranges; ++range)
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      if (place[i] >= Index(a.ranges[range].first) && place[i] < Index(a.ranges[range].last))
        offset[i] = int(a.ranges[range].offset);
  bool wanted[kWords];
  Word words[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) {
    const Index at = start + i * kThreads;
    wanted[i] = at < Index(a.frame_words) && place[i] >= Index(a.begin) && place[i] < Index(a.end);
    words[i] = Word{};
    if (wanted[i] && t + uint32_t(offset[i]) < a.frames)  // a frame below 0 is a large number
      words[i] = reinterpret_cast<const Word*>(a.x)[first + offset[i] * a.frame_words + at];
  }
#pragma unroll
  for (int i = 0; i < kWords; ++i)
    if (wanted[i]) reinterpret_cast<Word*>(a.out)[first + start + i * kThreads] = words[i];
}

template <class Word>
auto kernel_for(bool is_long) {
  return is_long ? shift_channels<Word, int64_t> : shift_channels<Word, int32_t>;
}

auto kernel_for(int64_t width, bool is_long) {
  switch (width) {
    case 16:
      return kernel_for<uint4>(is_long);
    case 8:
      return kernel_for<uint2>(is_long);
    case 4:
      return kernel_for<uint32_t>(is_long);
    case 2:
      return kernel_for<uint16_t>(is_long);
    default:
      return kernel_for<uint8_t>(is_long);
  }
}

// The largest of 16, 8, 4, 2 and 1 that tensors, lines and ranges of channels start at a multiple of.
int64_t word_bytes(const ShiftArgs& call) {
  uint64_t bits = reinterpret_cast<uintptr_t>(call.x) | reinterpret_cast<uintptr_t>(call.out) | 16;
  bits |= uint64_t(call.channels * call.channel_bytes);
  for (int64_t i = 0; i < call.num_shifts; ++i)
    bits |= uint64_t(call.shifts[i].first * call.channel_bytes) | uint64_t(call.shifts[i].last * call.channel_bytes);
  return int64_t(bits & -bits);
}

}  // namespace

const char* temporal_shift(const ShiftArgs& call, void* stream) {
  const int64_t width = word_bytes(call);
  ShiftArguments a{};
  a.x = call.x, a.out = call.out;
  a.line_words = call.channels * call.channel_bytes / width, a.frame_words = call.outer * a.line_words;
  const int64_t blocks = ceil_div(a.frame_words, kBlockWords);
  const bool is_long = blocks * kBlockWords > INT32_MAX;
  if (call.frames * blocks > INT32_MAX) return "more than 2^31 - 1 blocks";
  a.blocks = Divisor(blocks), a.segment = Divisor(call.segment), a.frames = uint32_t(call.segment);
  if (!is_long) a.line = Divisor(a.line_words);
  int64_t done = 0;
  do {  // in order, so that each launch is for what lies behind the ranges of the one before
    a.num_ranges = int(std::min<int64_t>(call.num_shifts - done, kRanges));
    for (int i = 0; i < a.num_ranges; ++i) {
      const ChannelShift& shift = call.shifts[done + i];
      a.ranges[i] = {shift.first * call.channel_bytes / width, shift.last * call.channel_bytes / width,
                     std::clamp(shift.offset, -call.segment, call.segment)};
    }
    done += a.num_ranges;
    a.begin = a.end, a.end = done < call.num_shifts ? a.ranges[a.num_ranges - 1].last : a.line_words;
    const char* error =
        gpu::launch(kernel_for(width, is_long), dim3(uint32_t(call.frames * blocks)), dim3(kThreads), 0, stream, a);
    if (error) return error;
  } while (done < call.num_shifts);
  return nullptr;
}

}  // namespace vidattn::cuda
