// How the native ops of the mixing family read their arguments.
#pragma once
#include <vector>

#include "arguments.h"
#include "mixing_args.h"

namespace vidattn {

// (first, last, offset) of each range, from a flat list.
inline std::vector<ChannelShift> channel_shifts(const Ints& flat, int64_t channels) {
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

inline void read_rows(MixingArgs& a, const Tokens& tokens, Slot first) {
  tokens.read(&a.tensor[first], [&](const Tensor& t) { return row_tensor(t, a.head_dim); });
}

// Reads the fields of MixingCall in vidattn/calls.py, which says what they are. The ranges of channels go to `shifts`.
// The seed lies on the device of q, so whoever can reads it.
inline MixingArgs read_mixing_call(Arguments& from, std::vector<ChannelShift>& shifts, const Tensor*& seed) {
  MixingArgs a{};
  const Tokens tokens(from);
  seed = from.maybe_tensor();
  a.segment = from.take<int64_t>();
  const Ints flat = from.take<Ints>();
  a.scale = from.take<double>(), a.dropout_p = from.take<double>();

  set_shape(a, tokens.q);
  a.frames = tokens.q.size(0), a.tokens = tokens.q.size(1);
  STD_TORCH_CHECK(a.segment >= 1 && a.frames % a.segment == 0, "expected whole segments of frames");
  read_rows(a, tokens, kQ);
  shifts = channel_shifts(flat, a.heads * a.head_dim);
  a.shifts = shifts.data(), a.num_shifts = static_cast<int64_t>(shifts.size());
  return a;
}

// What ShiftArgs tell of a temporal shift.
struct ShiftCall {
  std::vector<ChannelShift> shifts;
  int64_t frames, outer, channels;
  int64_t channel_bytes;  // of one channel, all that is inner
};

// Of x and out: (frames, ...), contiguous, of any dtype, with the channels in dimension `dim`.
inline ShiftCall read_shift_call(const Tensor& x, int64_t num_frames, const Ints& shifts, int64_t dim,
                                 const Tensor& out) {
  STD_TORCH_CHECK(1 <= dim && dim < x.dim(), "expected channels in a dimension behind the frames");
  STD_TORCH_CHECK(x.is_contiguous() && out.is_contiguous() && x.numel() == out.numel(),
                  "expected contiguous tensors of one size");
  ShiftCall call{channel_shifts(shifts, x.size(dim)), x.size(0), 1, x.size(dim),
                 static_cast<int64_t>(x.element_size())};
  for (int64_t i = 1; i < dim; ++i) call.outer *= x.size(i);
  for (int64_t i = dim + 1; i < x.dim(); ++i) call.channel_bytes *= x.size(i);
  STD_TORCH_CHECK(num_frames >= 1 && call.frames % num_frames == 0, "expected whole segments of frames");
  return call;
}

}  // namespace vidattn
