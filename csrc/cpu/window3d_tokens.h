// The tokens of one window: where they lie, which are padding, and what masks them. All of it is index arithmetic on
// the unpadded grid.
#pragma once
#include "tile.h"
#include "window3d_args.h"

namespace vidattn {
namespace VIDATTN_ISA {

template <class T>
class WindowTokens {
 public:
  WindowTokens(const Window3dArgs& args, int64_t padded_tokens, Arena& arena)
      : a_(args), padded_tokens_(padded_tokens) {
    for (int axis = 0; axis < 3; ++axis) source_[axis] = arena.take<int64_t>(a_.window[axis]);
    token_ = arena.take<int64_t>(a_.tokens);
    queries_ = arena.take<int64_t>(a_.tokens);
    for (auto& offset : offset_) offset = arena.take<int64_t>(a_.tokens);
    region_ = arena.take<int>(a_.tokens);
    region_mask_ = arena.take<T>(8 * padded_tokens);
    if (a_.regions) label_ = arena.take<int64_t>(a_.tokens);
  }

  void load(int64_t group) {
    group_ = group;
    known_offsets_ = 0;
    int64_t at[3], rest = group;
    for (int axis = 2; axis >= 0; --axis) at[axis] = rest % a_.count[axis], rest /= a_.count[axis];
    batch_ = rest;
    border_ = 0;
    for (int axis = 0; axis < 3; ++axis) {
      for (int64_t i = 0; i < a_.window[axis]; ++i) source_[axis][i] = source(axis, at[axis] * a_.window[axis] + i);
      if (a_.region_mask[axis] && at[axis] == a_.border[axis] / a_.window[axis]) border_ |= 1 << axis;
    }
    find_tokens();
    if (border_) fill_region_mask();
    if (a_.regions) find_regions(at);
  }

  int64_t group() const { return group_; }
  bool real(int64_t i) const { return token_[i] >= 0; }
  int64_t token(int64_t i) const {
    return token_[i];
  }  // its number in the batch's contiguous token grid; negative for padding
  int64_t query_count() const { return query_count_; }
  const int64_t* queries() const { return queries_; }  // the tokens that are not padding

  int border() const { return border_; }  // bit per axis on which the window holds two regions
  bool has_regions() const { return border_ != 0; }
  int region(int64_t i) const { return region_[i]; }  // 0 to 7; only with has_regions()

  // Mask values of query i for all keys of the window, or null; `room` has place for as many.
  const T* mask_row(int64_t i, T* room) const {
    if (has_labels_) {
      for (int64_t j = 0; j < a_.tokens; ++j) room[j] = label_[j] == label_[i] ? T(0) : T(a_.mask_value);
      return room;
    }
    if (a_.mask) return (const T*)a_.mask + ((group_ % a_.mask_groups) * a_.tokens + i) * a_.tokens;
    return border_ ? region_mask_ + region_[i] * padded_tokens_ : nullptr;
  }

  // Offsets of the tokens in a tensor, in bytes; one with the strides of an earlier slot shares that one's array, as
  // the three parts of a packed qkv do.
  const int64_t* offsets(int slot) {
    const int64_t* stride = a_.tensor[slot].stride;
    for (int s = 0; s <= slot; ++s) {
      bool same = known_offsets_ >> s & 1;
      for (int axis = 0; axis < 4; ++axis) same &= a_.tensor[s].stride[axis] == stride[axis];
      if (same) return offset_[s];
    }
    int64_t* to = offset_[slot];
    for (int64_t x = 0; x < a_.window[0]; ++x)
      for (int64_t y = 0; y < a_.window[1]; ++y) {
        const int64_t start = batch_ * stride[0] + source_[0][x] * stride[1] + source_[1][y] * stride[2];
        for (int64_t z = 0; z < a_.window[2]; ++z) *to++ = start + source_[2][z] * stride[3];
      }
    known_offsets_ |= 1u << slot;
    return offset_[slot];
  }

 private:
  // Where on the grid a place of the shifted, padded one comes from; what is outside is padding.
  int64_t source(int axis, int64_t place) const {
    const int64_t grid = a_.grid[axis], shift = a_.shift[axis], before = a_.before[axis];
    if (!a_.shift_first) return (place + shift) % (a_.count[axis] * a_.window[axis]) - before;
    place -= before;
    return place < 0 || place >= grid ? -1 : (place + shift) % grid;
  }

  void find_tokens() {
    query_count_ = 0;
    int64_t n = 0;
    for (int64_t x = 0; x < a_.window[0]; ++x)
      for (int64_t y = 0; y < a_.window[1]; ++y)
        for (int64_t z = 0; z < a_.window[2]; ++z, ++n) {
          const int64_t i = source_[0][x], j = source_[1][y], k = source_[2][z];
          const bool real = i >= 0 && i < a_.grid[0] && j >= 0 && j < a_.grid[1] && k >= 0 && k < a_.grid[2];
          token_[n] = real ? ((batch_ * a_.grid[0] + i) * a_.grid[1] + j) * a_.grid[2] + k : -1;
          queries_[query_count_] = n;
          query_count_ += real;
        }
  }

  // In the last window of a shifted axis the positions in front of a border and the rest come from opposite ends of the
  // grid. One bit an axis tells them apart; tokens attend to each other freely when all three bits agree.
  void fill_region_mask() {
    int64_t n = 0, late[3];
    for (int axis = 0; axis < 3; ++axis) late[axis] = a_.first_late(axis);
    for (int64_t x = 0; x < a_.window[0]; ++x)
      for (int64_t y = 0; y < a_.window[1]; ++y)
        for (int64_t z = 0; z < a_.window[2]; ++z, ++n) {
          region_[n] = border_ & ((x >= late[0]) | (y >= late[1]) << 1 | (z >= late[2]) << 2);
        }
    for (int region = 0; region < 8; ++region)
      if ((region & ~border_) == 0)
        for (int64_t j = 0; j < n; ++j)
          region_mask_[region * padded_tokens_ + j] = region_[j] == region ? T(0) : T(a_.mask_value);
  }

  // Regions that are numbered by the caller; a window of one region has no mask.
  void find_regions(const int64_t (&at)[3]) {
    const int64_t *w = a_.window, height = a_.count[1] * w[1], width = a_.count[2] * w[2];
    int64_t n = 0;
    for (int64_t x = 0; x < w[0]; ++x)
      for (int64_t y = 0; y < w[1]; ++y)
        for (int64_t z = 0; z < w[2]; ++z, ++n)
          label_[n] = a_.regions[((at[0] * w[0] + x) * height + at[1] * w[1] + y) * width + at[2] * w[2] + z];
    has_labels_ = false;
    for (int64_t i = 1; i < n; ++i) has_labels_ |= label_[i] != label_[0];
  }

  const Window3dArgs& a_;
  const int64_t padded_tokens_;
  int64_t group_ = 0, batch_ = 0, query_count_ = 0;
  int border_ = 0;
  bool has_labels_ = false;     // whether the caller's regions differ in this window
  unsigned known_offsets_ = 0;  // bit per slot
  int64_t *source_[3], *token_, *queries_, *offset_[kSlots];
  int* region_;
  int64_t* label_ = nullptr;
  T* region_mask_;  // [region of the query][key]
};

}  // namespace VIDATTN_ISA
}  // namespace vidattn
