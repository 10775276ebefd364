// What the native ops of the window family hand to the kernels of a device.
#pragma once
#include <stdint.h>

#include "call.h"

namespace vidattn {

struct TokenTensor {  // (batch, depth, height, width, heads, head_dim), contiguous head_dim; null data = absent
  char* data = nullptr;
  int64_t stride[5] = {0, 0, 0, 0, 0};  // bytes
};

struct Window3dArgs {
  int64_t batch, heads, head_dim;
  int64_t grid[3], window[3], shift[3],
      count[3];         // unpadded tokens, effective window and shift, windows along each axis
  bool region_mask[3];  // shifted and not cyclic: one window of the axis, the last as a rule, holds two regions
  int64_t tokens;       // of one window
  int64_t groups;       // windows in all, batch outermost

  Element element;
  TokenTensor tensor[kSlots];
  const char* pad_qkv;  // (3, heads, head_dim) of these elements, or null: zeros
  void* lse;            // (batch, depth, height, width, heads): log-sum-exp

  // Padding in front of each axis; whether the shift comes before the padding; where on the shifted, padded grid the
  // tokens that wrapped around begin; the numbers of the regions there, in place of those of the shift, or null.
  int64_t before[3];
  bool shift_first;
  int64_t border[3];
  const int64_t* regions;

  // Bias, in the accumulator's type. Dense: (types, heads, tokens, tokens). Table: (rows, heads), for the configured
  // window `bias_window`, with tokens unravelled over (*, bias_extent[0], bias_extent[1]).
  const void* bias;
  bool bias_is_table;
  int64_t bias_window[3], bias_extent[2];
  int64_t bias_size;                          // entries of one head: table rows, or tokens^2
  int64_t bias_row_stride, bias_head_stride;  // of a table, in entries

  // Which dense bias a window takes: group g that of window_types[g % type_groups]; null where all take the one there
  // is.
  const int32_t* window_types;
  int64_t types, type_groups;

  const void* mask;  // (mask_groups, tokens, tokens) or null
  int64_t mask_groups;
  double scale, mask_value, dropout_p;
  uint64_t seed;

  // Backward: the windows are cut into `chunks` fixed ranges of one type; each (head, chunk) sums its bias and padding
  // gradients in window order. With types, `order` lists the windows type by type, and chunk c begins at
  // chunk_begin[c].
  int64_t chunks;
  const int64_t *order, *chunk_begin;
  void* dbias_partial;  // (chunks, heads, bias_size) or null
  void* dpad_partial;   // (chunks, heads, 2, head_dim) or null

  // Where on an axis of the window at the border the tokens that wrapped around begin.
  int64_t first_late(int axis) const { return border[axis] % window[axis]; }
};

}  // namespace vidattn
