// Sequences of rows as groups of attention: the frames of a site, the sites of a frame, or the tokens of a frame with
// channels of keys and values from other frames. Nothing is added to a score.
//
// A clip's frames may share a cls token, which opens each of their sequences: its rows lie apart, and each sequence
// leaves its own part of the token's context and gradients.
#pragma once
#include "backward_rows.cuh"
#include "divisor.cuh"

namespace vidattn::cuda {

// Channels [first, last) of keys and values, counted over all heads, are those of the frame `offset` on.
struct ChannelRange {
  int first, last, offset;
};

// The rows of a tensor that a call is about: position p of sequence g of a clip lies at
// data + clip * clip_stride + g * sequence_stride + p * row_stride + head * head_stride. In bytes.
struct SequenceRows {
  char* data;
  int64_t clip_stride, sequence_stride, row_stride, head_stride;
  char* cls;              // row of the cls token of clip 0, head 0
  int64_t cls_stride[2];  // from clip to clip, from sequence to sequence
  int64_t cls_head_stride;
  int unit;  // bytes that all rows are a multiple of: 16, 4 or 2
};

struct SequenceArguments {
  Divisor heads, sequences;  // that attend like this; of a clip
  int first_head, all_heads;
  int cls, keys, head_dim;  // keys: the cls token included
  int slots;                // keys, up to a multiple of the rows that a kernel has room for
  SequenceRows rows[kSlots];
  uint32_t plain;  // a bit for each tensor whose rows are whole pieces of 16 bytes, a stride of 32 bits apart
  int64_t lse_clip, lse_sequence, lse_row;  // strides of log-sum-exp in numbers
  float* lse;
  float* lse_cls;        // of the cls token of clip 0, frame 0
  float* cls_out;        // (clips, frames, all heads, head_dim)
  float* cls_gradients;  // (clips, frames, 3, all heads, head_dim): each frame's share for q, k and v
  float scale, factor;   // scale * log2 e
  bool folds;            // whether the scale allows the folded way
  int ranges;
  ChannelRange range[kMaxRanges];
  bool whole_pieces;  // no range begins or ends within 8 channels of a head
  int bases;          // where the block's own numbers are in shared memory
  int tasks;          // sequences times heads

  // Forward.
  Divisor splits, warps, shares;
  ForwardPlan plan;
  // Backward.
  BackwardPlan backward;
  int gradient_unit;
  bool whole_rows;  // whether statistics of rows come from all their scores, not from the forward pass
  float* dq_sums;   // for each sequence and head its dq; null if keys come in one block
};
static_assert(sizeof(SequenceArguments) <= 4096);

// What a block keeps in shared memory of its sequence.
struct SequenceBases {
  int64_t row[kSlots], cls[kSlots];  // from the start of a tensor: of position 0, less a row if there is a cls token
  // For a channel of keys and values, twice how many frames on it is from, counted around the end of the segment, and 1
  // where it does not go around.
  int source[kMaxHeadDim];
};
static_assert(sizeof(SequenceBases) == kSequenceBytes);

class SequenceGroup {
 public:
  using Arguments = SequenceArguments;
  static constexpr bool kWholeChunks = false, kSharesTokens = true, kHasSums = false;

  // `bases`: where it keeps its own numbers in shared memory.
  __device__ __forceinline__ SequenceGroup(const Arguments& arguments, int head, int group, int bases)
      : a_(arguments), head_(arguments.first_head + head), clip_(group), bases_(bases) {
    sequence_ = arguments.sequences.split(clip_);
  }
  // As the blocks of the forward pass are numbered.
  __device__ __forceinline__ explicit SequenceGroup(const Arguments& arguments)
      : SequenceGroup(arguments, arguments.heads.remainder(int(blockIdx.x)),
                      arguments.splits.quotient(arguments.heads.quotient(int(blockIdx.x))), arguments.bases) {}
  struct Kept {};
  __device__ __forceinline__ SequenceGroup(const Arguments& arguments, Kept) : SequenceGroup(arguments) {}
  __device__ __forceinline__ void keep() const {}

  // ---- Rows ----

  // The numbers of tokens are their places in the sequence, the cls token first.
  struct Tokens {
    int first;
    __device__ __forceinline__ int operator[](int n) const { return first + n; }
    __device__ __forceinline__ Tokens operator+(int n) const { return {first + n}; }
  };
  __device__ __forceinline__ Tokens tokens() const { return {0}; }
  __device__ __forceinline__ int keys() const { return a_.keys; }
  __device__ __forceinline__ int token(int n) const { return n < keys() ? n : kNoToken; }
  __device__ __forceinline__ bool is_real(int n) const { return n < keys(); }
  __device__ __forceinline__ int head_dim() const { return a_.head_dim; }
  __device__ __forceinline__ int unit(Slot slot) const { return a_.rows[slot].unit; }
  __device__ __forceinline__ int dout_unit() const { return min(unit(kDout), unit(kOut)); }

  // Fills what lies in shared memory; to be followed by a barrier.
  __device__ __forceinline__ void find_rows() const {
    if (const int slot = threadIdx.x; slot < kSlots) {
      const SequenceRows& rows = a_.rows[slot];
      bases()->row[slot] = clip_ * rows.clip_stride + sequence_ * rows.sequence_stride + head_ * rows.head_stride -
                           a_.cls * rows.row_stride;
      bases()->cls[slot] = clip_ * rows.cls_stride[0] + sequence_ * rows.cls_stride[1] + head_ * rows.cls_head_stride;
    }
    if (a_.ranges > 0)
      for (int i = threadIdx.x; i < kMaxHeadDim; i += blockDim.x) {
        const int channel = head_ * head_dim() + i;
        int offset = 0;
        for (int r = 0; r < a_.ranges; ++r)
          if (channel >= a_.range[r].first && channel < a_.range[r].last) offset = a_.range[r].offset;
        const int frames = int(a_.sequences.divisor()),
                  there = sequence_ + offset;  // no offset is longer than a segment
        const int turned = there < 0 ? there + frames : there >= frames ? there - frames : there;
        bases()->source[i] = 2 * (turned - sequence_) + (turned == there);
      }
  }

  // Any address of a tensor.
  __device__ __forceinline__ const char* readable(Slot slot) const { return a_.rows[slot].data; }
  // Where the row of token n starts, null if it is none. Of mixed channels: those of this frame.
  __device__ __forceinline__ char* row(Slot slot, int n) const {
    if (n >= keys()) return nullptr;
    return n < a_.cls ? cls_row(slot) : first_row(slot) + n * a_.rows[slot].row_stride;
  }
  __device__ __forceinline__ const char* query(int n) const { return row(kQ, n); }
  __device__ __forceinline__ const char* dout(int n) const { return row(kDout, n); }

  // Rows that lie one distance apart, behind that of a cls token.
  template <class Entry>
  struct SpacedRows {
    Entry *first, *cls;
    uint32_t stride;
    int apart;  // tokens that lie at cls

    __device__ __forceinline__ Entry* at(int token) const {
      return token < apart ? cls : first + uint64_t(uint32_t(token)) * stride;
    }
  };
  struct Piece {
    SpacedRows<const char> rows;
    bool valid;

    __device__ __forceinline__ void copy(unsigned char* shared, int token) const {
      gpu::cp_async_16(gpu::shared_address(shared), rows.at(token < 0 ? 0 : token), valid && token >= 0);
    }
  };
  __device__ __forceinline__ bool is_plain(Slot slot) const { return a_.plain >> slot & 1; }
  __device__ __forceinline__ SpacedRows<const char> plain_rows(Slot slot) const {
    return {first_row(slot), cls_row(slot), uint32_t(a_.rows[slot].row_stride), a_.cls};
  }
  __device__ __forceinline__ Piece piece(Slot slot, int piece) const {
    SpacedRows<const char> rows = plain_rows(slot);
    bool valid = piece * 8 < head_dim();
    int64_t offset = 16 * piece;
    if (a_.ranges > 0 && (slot == kK || slot == kV) && valid) {
      const Source source = source_of(piece * 8);
      valid = source.is_inside;
      offset += source.frames * a_.rows[slot].sequence_stride;
    }
    if (!valid) rows.first = rows.cls = readable(slot), rows.stride = 0, offset = 0;
    rows.first = gpu::keep(rows.first + offset), rows.cls = gpu::keep(rows.cls + offset);
    return {rows, valid};
  }
  // Starts to copy a piece of a token's row into shared memory, zeros for kNoToken.
  __device__ __forceinline__ void copy_piece(Slot slot, int n, int piece, unsigned char* to) const {
    const char* row = n < 0 ? nullptr : this->row(slot, n);
    if (a_.ranges == 0 || !(slot == kK || slot == kV) || !row) {
      copy_piece_of_row(to, row, piece, head_dim(), unit(slot), readable(slot));
      return;
    }
    uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int channel = piece * 8 + i;
      if (channel >= head_dim()) break;
      const Source source = source_of(channel);
      if (!source.is_inside) continue;
      const char* element = row + source.frames * a_.rows[slot].sequence_stride + 2 * channel;
      words[i / 2] |= uint32_t(*reinterpret_cast<const uint16_t*>(element)) << i % 2 * 16;
    }
    gpu::store_shared(gpu::shared_address(to), make_uint4(words[0], words[1], words[2], words[3]));
  }

  __device__ __forceinline__ SpacedRows<float> log_sums() const {
    float* const first = a_.lse + clip_ * a_.lse_clip + sequence_ * a_.lse_sequence + head_;
    float* const cls = a_.lse_cls + clip_ * a_.lse_clip + sequence_ * a_.all_heads + head_;
    return {first - a_.cls * a_.lse_row, cls, uint32_t(a_.lse_row), a_.cls};
  }
  __device__ __forceinline__ float* lse(int token) const { return log_sums().at(token); }

  // ---- Results ----

  // Whether other sequences have token n too.
  __device__ __forceinline__ bool is_shared(int n) const { return n < a_.cls; }
  // Writes two elements of what this sequence has for such a token: its context, or its gradient for q, k or v.
  __device__ __forceinline__ void write_shared(Slot slot, int at, float x, float y) const {
    const int64_t frame = int64_t(clip_) * a_.sequences.divisor() + sequence_;
    float* to = slot == kOut ? a_.cls_out + (frame * a_.all_heads + head_) * head_dim()
                             : a_.cls_gradients + ((frame * 3 + slot - kDq) * a_.all_heads + head_) * head_dim();
    if (at < head_dim()) to[at] = x;
    if (at + 1 < head_dim()) to[at + 1] = y;
  }
  // Where a gradient goes.
  __device__ __forceinline__ char* gradient(Slot slot, int n) const { return row(slot, n); }
  // Writes some pieces of a gradient's rows, those of `count` tokens from n on, which lie in shared memory from a place
  // on; by a warp. What is shared has been written.
  //
  // Each run of a key's channels goes back to the frame that it came from. Where there is none, the run of the frame
  // that the offset reaches around the end of the segment, which nobody has read, gets zeros: so each element is
  // written once.
  template <int kDim, int kPieces>
  __device__ __forceinline__ void write_rows(Slot slot, int n, int count, int first, const unsigned char* shared,
                                             int lane) const {
    const int piece = first + lane % kPieces, step = 32 / kPieces;
    if (piece * 8 >= head_dim()) return;
    const auto words_of = [&](int row) {
      return gpu::load_shared<uint4>(gpu::shared_address(shared) + Rows<kDim>::place(row, piece));
    };
    const bool mixes = a_.ranges > 0 && slot != kDq;
    const Source source = mixes && a_.whole_pieces ? source_of(piece * 8) : Source{0, true};
    char* const to = first_row(slot) + source.frames * a_.rows[slot].sequence_stride;
    int row = lane / kPieces;
    // Half of each row alone: lanes that read at a time have rows 4 apart, whose pieces lie in other banks.
    if constexpr (kPieces < Rows<kDim>::kPieces)
      row = kDim == 64 ? row / 2 + row % 2 * 4 : (row & 9) | row << 1 & 4 | row >> 1 & 2;
    if (n + row < a_.cls) row += step;
    if (a_.gradient_unit == 16 && (!mixes || a_.whole_pieces)) {
#pragma unroll 2
      for (; row < count; row += step)
        *reinterpret_cast<uint4*>(to + (n + row) * a_.rows[slot].row_stride + 16 * piece) =
            source.is_inside ? words_of(row) : make_uint4(0, 0, 0, 0);
    } else {
#pragma unroll 1
      for (; row < count; row += step) {
        char* const at = to + (n + row) * a_.rows[slot].row_stride;
        const uint4 words = source.is_inside ? words_of(row) : make_uint4(0, 0, 0, 0);
        if (!mixes || a_.whole_pieces)
          write_piece(at, piece, head_dim(), a_.gradient_unit, words);
        else
          write_mixed(slot, at, piece, words);
      }
    }
  }

  // ---- Scores ----

  struct Query {};
  struct Keys {};
  struct Pairs {};
  struct Seen {};
  __device__ __forceinline__ float factor() const { return a_.factor; }
  __device__ __forceinline__ float scale() const { return a_.scale; }
  __device__ __forceinline__ float exact(float product, int, int) const { return product * a_.scale; }
  static constexpr __device__ bool masks() { return false; }
  __device__ __forceinline__ bool load_bias(float&) const { return a_.folds; }
  __device__ __forceinline__ Seen all_seen() const { return {}; }
  __device__ __forceinline__ void describe(Query (&)[2], int, int, Seen) const {}
  __device__ __forceinline__ Keys first_keys(int, int) const { return {}; }
  template <bool kMasked>
  __device__ __forceinline__ Pairs pairs(const Query (&)[2], int, Keys) const {
    return {};
  }
  template <bool kMasked>
  __device__ __forceinline__ void folded(float (&)[4], Pairs, Keys, int) const {}
  __device__ __forceinline__ uint32_t key_bias(int) const { return 0; }
  __device__ __forceinline__ float bias_at(uint32_t, int) const { return 0.0f; }
  __device__ __forceinline__ float mask_of(int, int) const { return 0.0f; }
  __device__ __forceinline__ int region(int) const { return 0; }
  __device__ __forceinline__ int bias_offset(int) const { return 0; }

  // For each warp of the forward pass: the first of its pairs of tiles, and where they end.
  __device__ __forceinline__ int2* shares() const { return reinterpret_cast<int2*>(bases() + 1); }

 private:
  __device__ __forceinline__ SequenceBases* bases() const {
    return reinterpret_cast<SequenceBases*>(gpu::shared_memory<unsigned char>() + bases_);
  }
  __device__ __forceinline__ char* first_row(Slot slot) const { return a_.rows[slot].data + bases()->row[slot]; }
  __device__ __forceinline__ char* cls_row(Slot slot) const { return a_.rows[slot].cls + bases()->cls[slot]; }
  // A piece whose elements may go to several frames; `row` is that of this one.
  __device__ __forceinline__ void write_mixed(Slot slot, char* row, int piece, const uint4& words) const {
    const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int channel = piece * 8 + i;
      if (channel >= head_dim()) break;
      const Source source = source_of(channel);
      char* to = row + source.frames * a_.rows[slot].sequence_stride + 2 * channel;
      *reinterpret_cast<uint16_t*>(to) = source.is_inside ? uint16_t(pairs[i / 2] >> i % 2 * 16) : uint16_t(0);
    }
  }

  // The frame that a channel of keys and values is from, in frames from this one on; if it is outside of the segment,
  // the one that the offset reaches around its end.
  struct Source {
    int frames;
    bool is_inside;
  };
  __device__ __forceinline__ Source source_of(int channel) const {
    const int source = bases()->source[channel];
    return {source >> 1, (source & 1) != 0};
  }

 protected:
  const Arguments& a_;

 private:
  int head_, clip_, sequence_;  // clip_ is a segment of frames where channels are mixed
  int bases_;
};

}  // namespace vidattn::cuda
