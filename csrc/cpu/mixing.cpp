// The native ops of the mixing family: attention with channels from other frames, and the shift of channels alone.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <optional>
#include <vector>

#include "dispatch.h"
#include "mixing_args.h"

namespace vidattn {
namespace {

using torch::stable::Tensor;

const MixingKernels& kernels(Element element) {
#if defined(__x86_64__)
  return kernels_for(element, mixing_baseline, mixing_avx2, mixing_avx512, mixing_avx512bf16);
#else
  return kernels_for(element, mixing_baseline, mixing_baseline, mixing_baseline, mixing_baseline.float32);
#endif
}

// (first, last, offset) of each range, from a flat list.
std::vector<ChannelShift> channel_shifts(const std::vector<int64_t>& flat, int64_t channels) {
  STD_TORCH_CHECK(flat.size() % 3 == 0, "expected (first, last, offset) of each range of channels");
  std::vector<ChannelShift> shifts;
  int64_t done = 0;
  for (size_t i = 0; i < flat.size(); i += 3) {
    STD_TORCH_CHECK(done <= flat[i] && flat[i] < flat[i + 1] && flat[i + 1] <= channels,
                    "expected ranges of channels in ascending order");
    done = flat[i + 1];
    shifts.push_back({flat[i], flat[i + 1], flat[i + 2]});
  }
  return shifts;
}

// ---- Attention ----

// (frames, tokens, h, d), or its last two dimensions merged.
RowTensor row_tensor(const Tensor& t, int64_t head_dim) {
  STD_TORCH_CHECK(t.stride(-1) == 1 || t.size(-1) == 1, "the last dimension must be contiguous");
  const int64_t bytes = static_cast<int64_t>(t.element_size());
  return {static_cast<char*>(t.data_ptr()),
          {t.stride(0) * bytes, t.stride(1) * bytes, (t.dim() == 3 ? head_dim : t.stride(2)) * bytes}};
}

MixingArgs make_args(const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& seed,
                     int64_t num_frames, const std::vector<ChannelShift>& shifts, double scale, double dropout_p) {
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(),
                  "expected q, k and v of one dtype");
  MixingArgs a{};
  a.element = element_of(q);
  a.frames = q.size(0), a.tokens = q.size(1), a.heads = q.size(2), a.head_dim = q.size(3), a.segment = num_frames;
  STD_TORCH_CHECK(a.head_dim >= 1 && a.head_dim <= 128, "expected head_dim between 1 and 128, got ", a.head_dim);
  STD_TORCH_CHECK(num_frames >= 1 && a.frames % num_frames == 0, "expected whole segments of frames");
  a.tensor[kQ] = row_tensor(q, a.head_dim), a.tensor[kK] = row_tensor(k, a.head_dim);
  a.tensor[kV] = row_tensor(v, a.head_dim);
  a.shifts = shifts.data(), a.num_shifts = static_cast<int64_t>(shifts.size());
  a.scale = scale, a.dropout_p = dropout_p;
  if (dropout_p > 0) {
    STD_TORCH_CHECK(seed.has_value(), "dropout needs a seed");
    a.seed = static_cast<uint64_t>(*seed->const_data_ptr<int64_t>());
  }
  return a;
}

void forward(Tensor q, Tensor k, Tensor v, std::optional<Tensor> seed, int64_t num_frames, std::vector<int64_t> shifts,
             double scale, double dropout_p, Tensor out, std::optional<Tensor> lse) {
  const std::vector<ChannelShift> ranges = channel_shifts(shifts, q.size(2) * q.size(3));
  MixingArgs a = make_args(q, k, v, seed, num_frames, ranges, scale, dropout_p);
  a.tensor[kOut] = row_tensor(out, a.head_dim);
  STD_TORCH_CHECK(!lse, "the CPU's backward pass needs no log-sum-exp");
  run(a, kernels(a.element), false, a.frames * a.heads, kernels(a.element).forward);
}

void backward(Tensor dout, Tensor q, Tensor k, Tensor v, std::optional<Tensor> seed, int64_t num_frames,
              std::vector<int64_t> shifts, double scale, double dropout_p, std::optional<Tensor> out,
              std::optional<Tensor> lse, Tensor dq, Tensor dk, Tensor dv) {
  const std::vector<ChannelShift> ranges = channel_shifts(shifts, q.size(2) * q.size(3));
  MixingArgs a = make_args(q, k, v, seed, num_frames, ranges, scale, dropout_p);
  a.tensor[kDout] = row_tensor(dout, a.head_dim), a.tensor[kDq] = row_tensor(dq, a.head_dim);
  a.tensor[kDk] = row_tensor(dk, a.head_dim), a.tensor[kDv] = row_tensor(dv, a.head_dim);
  run(a, kernels(a.element), true, a.frames * a.heads, kernels(a.element).backward);
}

// ---- Shift ----

// Copies the part of a row that comes from one frame: a few cache lines, for which a call of memcpy takes long. Those
// of another frame no hardware prefetcher foresees, so they are fetched `ahead` bytes before, if that is not 0.
void copy_part(char* __restrict to, const char* __restrict from, int64_t bytes, int64_t ahead) {
  constexpr int64_t kLine = 64;
  if (ahead != 0)
    for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(from + ahead + i);
  int64_t i = 0;
  for (; i + kLine <= bytes; i += kLine) std::memcpy(to + i, from + i, kLine);
  if (i < bytes) std::memcpy(to + i, from + i, bytes - i);
}

// x, out: (frames, outer, channels, inner), contiguous, of any dtype. Copies runs of channels of one frame offset.
void temporal_shift(Tensor x, int64_t num_frames, std::vector<int64_t> shifts, Tensor out) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_contiguous() && out.is_contiguous() && x.numel() == out.numel(),
                  "expected contiguous tensors (frames, outer, channels, inner)");
  const int64_t frames = x.size(0), outer = x.size(1), channels = x.size(2);
  STD_TORCH_CHECK(num_frames >= 1 && frames % num_frames == 0, "expected whole segments of frames");
  std::vector<ChannelShift> runs;
  int64_t done = 0;
  for (const ChannelShift& shift : channel_shifts(shifts, channels)) {
    if (shift.first > done) runs.push_back({done, shift.first, 0});
    runs.push_back(shift);
    done = shift.last;
  }
  if (done < channels) runs.push_back({done, channels, 0});

  const int64_t channel_bytes = x.size(3) * static_cast<int64_t>(x.element_size()), row = channels * channel_bytes;
  const char* from = static_cast<const char*>(x.data_ptr());
  char* to = static_cast<char*>(out.data_ptr());
  const int64_t rows_at_once = 65536 / (row + 1) + 1;
  const bool long_rows = row > 16384;  // those of channels in front of pixels
  torch::stable::parallel_for(0, frames * outer, rows_at_once, [&](int64_t begin, int64_t end) {
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
          copy_part(to + place, source, bytes, run.offset == 0 ? 0 : 4 * row);
      }
    }
  });
}

}  // namespace
}  // namespace vidattn

STABLE_TORCH_LIBRARY_IMPL(vidattn, CPU, m) {
  m.impl("_space_time_mixing_attention_forward", TORCH_BOX(&vidattn::forward));
  m.impl("_space_time_mixing_attention_backward", TORCH_BOX(&vidattn::backward));
  m.impl("_temporal_shift", TORCH_BOX(&vidattn::temporal_shift));
}
