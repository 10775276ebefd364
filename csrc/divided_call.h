// How the native ops of the divided family read their arguments.
#pragma once
#include "arguments.h"
#include "divided_args.h"

namespace vidattn {

inline void read_rows(DividedArgs& a, const Tokens& tokens, Slot first) {
  tokens.read(&a.tensor[first], [&](const Tensor& t) { return row_tensor(t, a.head_dim, a.cls); });
}

// Reads the fields of DividedCall in vidattn/calls.py, which says what they are, and after them the context or its
// gradient, which has the patches of a clip alone, or a cls token that sees all in front of them. The seed lies on the
// device of q, so whoever can reads it.
inline DividedArgs read_divided_call(Arguments& from, Slot context, const Tensor*& seed) {
  DividedArgs a{};
  const Tokens tokens(from);
  seed = from.maybe_tensor();
  a.frames = from.take<int64_t>();
  a.time_fastest = from.take<bool>();
  a.temporal_heads = from.take<int64_t>();
  a.scale = from.take<double>(), a.dropout_p = from.take<double>();
  a.cls_sees_all = from.take<bool>();
  const Tensor& patches = from.tensor();

  set_shape(a, tokens.q);
  STD_TORCH_CHECK(a.temporal_heads >= 0 && a.temporal_heads <= a.heads, "expected 0 to ", a.heads,
                  " temporal heads, got ", a.temporal_heads);
  a.batch = patches.size(0);
  const int64_t count = patches.size(1) - a.cls_sees_all;
  STD_TORCH_CHECK(a.frames >= 1 && count >= 1 && count % a.frames == 0, "expected num_frames * sites rows");
  a.sites = count / a.frames;
  a.cls = tokens.q.size(1) - count;
  STD_TORCH_CHECK(a.cls == a.cls_sees_all || a.cls == 1, "expected a cls token and the patches, got ", tokens.q.size(1),
                  " rows");
  read_rows(a, tokens, kQ);
  a.tensor[context] = row_tensor(patches, a.head_dim, a.cls_sees_all);
  return a;
}

// Turns to the heads that attend over time, or to those that attend over space. Returns whether there are any.
inline bool set_axis(DividedArgs& a, bool over_time) {
  a.first_head = over_time ? 0 : a.temporal_heads;
  a.num_heads = over_time ? a.temporal_heads : a.heads - a.temporal_heads;
  if (a.num_heads == 0) return false;
  STD_TORCH_CHECK(!over_time || !a.cls || a.cls_sees_all, "a cls token attends to frames, not to sites");
  STD_TORCH_CHECK(!a.cls || a.num_heads == a.heads, "with a cls token all heads attend alike");
  a.patches = over_time ? a.frames : a.sites;
  a.groups = over_time ? a.sites : a.frames;
  const int64_t frame_step = a.time_fastest ? 1 : a.sites, site_step = a.time_fastest ? a.frames : 1;
  a.position_step = over_time ? frame_step : site_step;
  a.group_step = over_time ? site_step : frame_step;
  return true;
}

}  // namespace vidattn
