// How the passes of windows use blocks of threads and their shared memory: numbers in, numbers out.
#pragma once
#include <stdint.h>

#include <initializer_list>

#include "call.h"

namespace vidattn::cuda {

constexpr int64_t kBlockStep = 48;  // a block of keys that is not all has a multiple of so many, the chunk of a warp
constexpr int64_t kMaxTokens = 1200, kMaxHeadDim = 64;

struct WindowShape {
  int64_t window[3], head_dim;
  int64_t table_rows;                       // of the bias; 0 without a table
  bool plain_bias;                          // none, or a table that is indexed by the coordinates of this window
  int64_t stride_sets;                      // for how many sets of strides the tokens' rows are looked up
  int64_t blocks;                           // groups times heads
  int64_t table_window[3], bias_extent[2];  // what the table is for, and the height and width that tokens unravel over
};

// Where a bias row lies: at plane * depth + row * height + width, for differences of coordinates that start at 0.
struct BiasPitch {
  int64_t plane, row;
};

struct ForwardPlan {
  int dim;               // elements of a row in shared memory: head_dim, filled up with zeros
  int threads;           // of a block
  int tiles;             // of 16 queries
  int splits;            // blocks that share the queries of a group and head
  int block_keys;        // keys and values that come into shared memory at a time
  bool resident;         // all of them; else there is room for two blocks, so that one comes while the other is used
  bool depth_fastest;    // order of the tokens: see WindowGroup
  int bias_floats;       // of the bias in shared memory; 0 if it does not fit
  BiasPitch pitch;       // of the bias in shared memory, if depth is not fastest
  int64_t shared_bytes;  // of a block

  constexpr int key_rows() const { return resident ? block_keys : 2 * block_keys; }
};

// What a block keeps in shared memory of a sequence; what the kernels are for at most: tokens, and ranges of channels
// from other frames.
constexpr int64_t kSequenceBytes = 2 * 8 * kSlots + 4 * kMaxHeadDim, kMaxSequence = 400, kMaxRanges = 64;

// Bytes that describe the tokens of a group: where their rows start, for each set of strides; their number in the grid;
// their region; the part of a bias row that depends on them, which depth-fastest windows do not need. Before them stand
// four numbers of the block, the share of each of up to 12 warps, and where the tensors, the log-sum-exp and a dense
// bias start.
constexpr int kShareBytes = 12 * 8, kLogSums = kSlots, kDenseBias = kSlots + 1, kBases = kSlots + 2;
constexpr int kBaseBytes = 8 * kBases;
constexpr int64_t kBlockBytes = round_up(16 + kShareBytes + kBaseBytes, 16);
constexpr int64_t token_bytes(int64_t tokens, int64_t stride_sets, bool depth_fastest) {
  return kBlockBytes + round_up(tokens, 16) * (8 * stride_sets + 4 + (depth_fastest ? 0 : 4) + 2);
}

// Warps that a multiprocessor has registers for: 168 for each thread with rows of 32 elements, 255 with 64.
constexpr int most_warps(int64_t dim) {
  return dim == 32 ? 12 : 8;
}

// Blocks of threads that occupy a GPU: two for each multiprocessor of a large one.
constexpr int64_t kManyBlocks = 264;

// Warps for so many pairs of tiles of queries, at most `most`, that all have about the same number of them.
constexpr int64_t even_warps(int64_t pairs, int64_t most) {
  return ceil_div(pairs, ceil_div(pairs, most));
}

// The same where a block has a multiprocessor for itself: the most warps with which the busiest of its four quarters
// has the least to do.
constexpr int64_t quartered_warps(int64_t pairs, int64_t most) {
  int64_t best = 1, least = pairs;
  for (int64_t warps = 2; warps <= most && warps <= pairs; ++warps) {
    const int64_t busiest = ceil_div(warps, 4) * (pairs / warps) + ceil_div(pairs % warps, 4);
    if (busiest <= least) best = warps, least = busiest;
  }
  return best;
}

// As in the table itself.
constexpr BiasPitch plain_pitch(const int64_t* table_window) {
  const int64_t row = 2 * table_window[2] - 1;
  return {(2 * table_window[1] - 1) * row, row};
}

// Lanes read the bias of 8 neighbouring queries with 4 keys. Where either of them goes on in the next row or plane of
// the window, the place moves on by so many of the 32 banks of shared memory that the lanes before and behind seldom
// meet: 18 and 12 are the best of all for windows of 2 to 8.
constexpr BiasPitch padded_pitch(const int64_t* table_window, const int64_t* extent) {
  const auto at_least = [](int64_t least, int64_t bank) { return least + ((bank - least) % 32 + 32) % 32; };
  const int64_t row = at_least(2 * table_window[2] - 1, extent[1] + 18);
  return {at_least((2 * table_window[1] - 2) * row + 2 * table_window[2] - 1, (extent[0] - 1) * row + extent[1] + 12),
          row};
}
constexpr int64_t bias_floats(const int64_t* table_window, BiasPitch pitch) {
  return (2 * table_window[0] - 2) * pitch.plane + (2 * table_window[1] - 2) * pitch.row + 2 * table_window[2] - 1;
}

// The bias as depth-fastest windows read it: two copies of 14 entries for each difference of depth / 8, height and
// width. The second one starts in the middle of the 32 banks of shared memory, so that no two lanes of a warp, which
// read up to 14 entries of each, meet in a bank.
constexpr int kDepthSteps = 14;
constexpr int64_t second_copy(const WindowShape& s) {
  return round_up((2 * (s.window[0] / 8) - 1) * (2 * s.window[1] - 1) * (2 * s.window[2] - 1) * kDepthSteps + 16, 32) -
         16;
}
// Behind them: the bias of keys that are hidden, for the places of a chunk; two numbers of each warp.
constexpr int64_t kHiddenFloats = 7 * kDepthSteps, kMeasureFloats = 2 * 12;
constexpr int64_t depth_fastest_floats(const WindowShape& s) {
  return 2 * second_copy(s);
}

// Gives a block its warps, and splits the queries of a group where there are few blocks.
constexpr void share_queries(ForwardPlan& plan, int64_t tokens, int64_t blocks, int64_t limit) {
  // Four warps, one for each scheduler of a multiprocessor; more where its shared memory has no room for so many
  // blocks. It keeps 1 KB a block for itself.
  plan.tiles = static_cast<int>(ceil_div(tokens, 16));
  const int64_t pairs = ceil_div(tokens, 32), together = (limit + 1024) / (plan.shared_bytes + 1024);
  const int64_t fill = most_warps(plan.dim) / (together > 0 ? together : 1);
  const int64_t warps = together > 1 ? even_warps(pairs, fill > 4 ? fill : 4) : quartered_warps(pairs, fill);
  plan.threads = static_cast<int>(32 * warps);
  const int64_t wanted = ceil_div(kManyBlocks, blocks > 0 ? blocks : 1), most = pairs / warps;
  plan.splits = static_cast<int>(wanted < most ? wanted : most > 1 ? most : 1);
}

// Keys and values come first, for a multiple of 16 keys or, depth fastest, of 8; what is left is for the bias. `limit`
// is the shared memory that a block may have.
constexpr ForwardPlan plan_forward(const WindowShape& s, int64_t limit) {
  ForwardPlan plan{};
  const int64_t tokens = s.window[0] * s.window[1] * s.window[2];
  plan.dim = s.head_dim <= 32 ? 32 : 64;
  const int64_t pair_bytes = 4 * plan.dim;
  const bool eights = s.window[0] % 8 == 0 && s.window[2] == 7 && s.plain_bias;
  plan.depth_fastest = eights && tokens * pair_bytes + 4 * (depth_fastest_floats(s) + kHiddenFloats + kMeasureFloats) +
                                         token_bytes(tokens, s.stride_sets, true) <=
                                     limit;
  const int64_t all = round_up(tokens, plan.depth_fastest ? 8 : 16);
  const int64_t left = limit - token_bytes(tokens, s.stride_sets, plan.depth_fastest);
  plan.resident = all * pair_bytes <= left;
  const int64_t least_keys = plan.resident ? all : 2 * kBlockStep;
  plan.pitch = plain_pitch(s.table_window);
  int64_t floats = plan.depth_fastest ? depth_fastest_floats(s) : s.table_rows > 0 ? s.table_rows : 1;
  if (s.table_rows > 0 && !plan.depth_fastest) {
    const BiasPitch padded = padded_pitch(s.table_window, s.bias_extent);
    const int64_t more = bias_floats(s.table_window, padded);
    if (least_keys * pair_bytes + round_up(4 * more, 16) <= left) plan.pitch = padded, floats = more;
  }
  const int64_t bias_bytes = round_up(4 * (floats + (plan.depth_fastest ? kHiddenFloats + kMeasureFloats : 0)), 16);
  const bool fits = least_keys * pair_bytes + bias_bytes <= left;
  const int64_t bias = fits ? bias_bytes : 0;
  plan.bias_floats = static_cast<int>(fits ? floats : 0);
  plan.block_keys = static_cast<int>(plan.resident ? all : (left - bias) / (2 * pair_bytes) / kBlockStep * kBlockStep);
  plan.shared_bytes = plan.key_rows() * pair_bytes + limit - left + bias;
  share_queries(plan, tokens, s.blocks, limit);
  return plan;
}

// ---- Backward ----

struct BackwardShape : WindowShape {
  bool table_gradient, pad_gradient;
  bool aligned_rows;  // all are multiples of 16 bytes, at one stride from token to token
  bool is_sequence;   // no window: nothing is kept of a token
};

// A warp owns `warp_keys` keys of a block of keys, and meets the queries tile by tile.
struct BackwardPlan {
  int dim;                 // elements of a row in shared memory
  int warps, threads;      // of a block
  int warp_keys;           // of a warp
  int query_tile;          // queries at a time
  int block_keys, blocks;  // keys of a block of them, and such blocks, one after the other
  int rows;                // of keys in shared memory
  bool depth_fastest;      // order of the tokens: see WindowGroup
  bool short_window;       // all queries at once
  int axes[3];             // of the window that take the places of depth, height and width in that order
  int bias_floats;         // of the bias in shared memory; 0 if it does not fit
  int hidden_bias;         // the first of them that are for keys that only fill up a tile
  int table_floats;        // of a warp's sums of the table's gradient (depth fastest: of the block's); 0 without one
  bool table_is_shared;    // whether they are in shared memory
  int score_tiles;         // gradients of scores of so many tiles of queries are there at a time: 1 or 2
  // Where it begins in shared memory; keys come first, at kKeysPlace, tokens and the bias last.
  int values, queries, scores, records, buffers, table_sums, pad_sums, tokens;
  int64_t shared_bytes;  // of a block; more than the limit if there is no way
  // Sequences: whether a block walks over several of them, and what only that needs (sequence_backward.cuh).
  bool walks, helps;                      // the last warp has no keys
  int half, contexts, log_sums, staging;  // bytes of all keys and values of one; places
  int key_warp, job_warps[2];             // who copies the next keys; who makes which half of dq
};

constexpr int kBasesPlace = 32, kKeysPlace = 128;  // in shared memory; Progress comes first
constexpr int kMaxBackwardWarps = 12;              // 3 on each quarter of a multiprocessor, with 168 registers a thread
constexpr int kWholeRowTokens = 64;                // statistics of so short rows come from all their scores
constexpr int kShortWindow = 144;                  // tokens whose pairs have sums of their own (short_window.cuh)
constexpr int kBufferBytes = 1024;                 // of a warp: 32 keys with 8 queries
constexpr int kSpareRows = 32;                     // of a warp's table, for lanes without a key

// Row of the bias table of token n with token 0, counted from the row of a token with itself.
constexpr int64_t bias_row(const BackwardShape& s, int64_t n) {
  const int64_t height = s.bias_extent[0], width = s.bias_extent[1];
  return (n / width / height * (2 * s.table_window[1] - 1) + n / width % height) * (2 * s.table_window[2] - 1) +
         n % width;
}

// Rows of the bias table between queries and `keys` neighbouring keys, wherever those begin at a multiple of `keys`.
constexpr int64_t bias_span(const BackwardShape& s, int64_t tokens, int64_t keys) {
  int64_t widest = 0;
  for (int64_t first = 0; first < tokens; first += keys) {
    const int64_t last = first + keys < tokens ? first + keys - 1 : tokens - 1;
    const int64_t spread = bias_row(s, last) - bias_row(s, first);
    if (spread > widest) widest = spread;
  }
  return bias_row(s, tokens - 1) + widest + 1 + kSpareRows;
}

// Puts the areas one behind the other for so many warps.
constexpr BackwardPlan place_backward(const BackwardShape& s, BackwardPlan plan, int64_t warps) {
  const int64_t tokens = s.window[0] * s.window[1] * s.window[2], slots = round_up(tokens, 32);
  const int64_t keys = round_up(warps * plan.warp_keys + (plan.warp_keys % 16), 16);  // a half tile reads on
  const int64_t row = 2 * plan.dim, score_row = plan.query_tile <= 32 ? 64 : 128;
  int64_t at = kKeysPlace + keys * row;
  const auto take = [&](int64_t bytes) {
    const int64_t place = at;
    at += round_up(bytes, 16);
    return static_cast<int>(place);
  };
  plan.warps = static_cast<int>(warps), plan.threads = 32 * plan.warps;
  plan.block_keys = static_cast<int>(warps * plan.warp_keys), plan.rows = static_cast<int>(keys);
  plan.blocks = static_cast<int>(ceil_div(tokens, plan.block_keys));
  plan.values = take(keys * row);
  plan.queries = take(4 * plan.query_tile * row);
  plan.scores = take(plan.score_tiles * keys * score_row);
  plan.records = take(16 * slots);
  plan.buffers = take(plan.table_floats > 0 ? warps * kBufferBytes : 0);
  plan.table_sums = take(plan.table_is_shared ? warps * plan.table_floats * 4 : 0);
  plan.pad_sums = take(s.pad_gradient ? warps * 2 * plan.dim * 4 : 0);
  plan.tokens = take(s.is_sequence ? kSequenceBytes : slots * (8 * s.stride_sets + 4 + 4 + 2));
  take(4 * plan.bias_floats);
  plan.shared_bytes = at;
  return plan;
}

// The most warps that fit, shared out evenly among as few blocks of keys as that allows.
constexpr BackwardPlan fit_backward(const BackwardShape& s, const BackwardPlan& plan, int64_t limit) {
  const int64_t tokens = s.window[0] * s.window[1] * s.window[2], needed = ceil_div(tokens, plan.warp_keys);
  const int64_t limit_of_warps = s.is_sequence ? most_warps(plan.dim) : kMaxBackwardWarps;
  for (int64_t most = needed < limit_of_warps ? needed : limit_of_warps; most > 1; --most) {
    const BackwardPlan placed = place_backward(s, plan, even_warps(needed, most));
    if (placed.shared_bytes <= limit) return placed;
  }
  return place_backward(s, plan, 1);
}

// Windows that are 8 deep and 7 wide, or have two other axes of such a length: a warp owns the 56 keys of one height
// (depth_fastest.cuh). Of 7 depths, one in eight is filled up. Everything is in shared memory, or this is not the way.
// There is room for 7 heights, whatever the window has, so that the compiler knows all distances.
struct DepthFastestPlaces {
  static constexpr int kTokens = 8 * 7 * 7, kSlots = 416, kRowBytes = 56 * 64;
  static constexpr int kQueries = kKeysPlace + 7 * kRowBytes;  // two rows, each with the gradients of its context
  static constexpr int kScores = kQueries + 4 * kRowBytes, kScoreBytes = kTokens * 112;  // dS of two rows of queries
  static constexpr int kValues = kScores + kScoreBytes;  // in place of the second, until the warps have loaded them
  static constexpr int kContext = kScores + 2 * kScoreBytes;  // of a row of queries; exact: the records of all
  static constexpr int kPairs = kContext + 16 * kSlots, kRecordBytes = 8 * kTokens;
  static constexpr int kBias = kPairs + kRecordBytes, kBiasFloats = (13 * 14 + 1) * 13 * 4;
  static constexpr int kTable = kBias + 4 * kBiasFloats, kTableFloats = 13 * 13 * 64;
  static constexpr int kPads = kTable + 4 * kTableFloats;
  static constexpr int kMasks = kPads + 7 * 2 * 32 * 4;        // whether the window has several regions
  static constexpr int kWritten = kMasks + 16;                 // tokens whose gradients are written, and where to
  static constexpr int kTables = kWritten + 4 * kTokens + 32;  // of the tokens
  static constexpr int kBytes = kTables + kSlots * (4 + 4 + 2);
};
constexpr BackwardPlan plan_depth_fastest(const BackwardShape& s, const int (&axes)[3]) {
  using Place = DepthFastestPlaces;
  BackwardPlan plan{};
  plan.dim = 32, plan.warps = 7, plan.threads = 32 * plan.warps, plan.warp_keys = plan.query_tile = 56;
  plan.block_keys = static_cast<int>(56 * s.window[axes[1]]), plan.rows = Place::kTokens;
  plan.blocks = plan.score_tiles = 1, plan.depth_fastest = true, plan.table_is_shared = s.table_gradient;
  for (int i = 0; i < 3; ++i) plan.axes[i] = axes[i];
  plan.bias_floats = Place::kBiasFloats, plan.table_floats = s.table_gradient ? Place::kTableFloats : 0;
  plan.values = Place::kValues, plan.queries = Place::kQueries, plan.scores = Place::kScores;
  plan.records = Place::kContext, plan.table_sums = Place::kTable, plan.pad_sums = Place::kPads;
  plan.tokens = Place::kTables, plan.shared_bytes = Place::kBytes;
  return plan;
}

// Windows whose sums of pairs fit into registers.
constexpr BackwardPlan plan_short_window(const BackwardShape& s) {
  const int64_t tokens = s.window[0] * s.window[1] * s.window[2], slots = round_up(tokens, 32);
  const int64_t warps = ceil_div(tokens, 16), keys = 16 * warps;
  BackwardPlan plan{};
  plan.dim = 32, plan.warps = static_cast<int>(warps), plan.threads = 32 * plan.warps, plan.warp_keys = 16;
  plan.query_tile = tokens <= kWholeRowTokens ? kWholeRowTokens : kShortWindow;
  plan.block_keys = plan.rows = static_cast<int>(keys), plan.blocks = plan.score_tiles = 1;
  plan.short_window = true, plan.table_is_shared = s.table_gradient;
  for (int i = 0; i < 3; ++i) plan.axes[i] = i;
  plan.hidden_bias = static_cast<int>(s.table_rows > 0 ? s.table_rows : 1);
  const int64_t last_row = s.table_rows > 0 ? bias_row(s, tokens - 1) : 0;
  plan.bias_floats = plan.hidden_bias + static_cast<int>(tokens % 16 > 0 ? last_row + 1 : 0);
  plan.table_floats = static_cast<int>(s.table_gradient ? bias_span(s, tokens, 16) : 0);
  int64_t at = kKeysPlace + 64 * keys;
  const auto take = [&](int64_t bytes) {
    const int64_t place = at;
    at += round_up(bytes, 16);
    return static_cast<int>(place);
  };
  plan.values = take(64 * keys);
  plan.queries = take(2 * 64 * plan.query_tile);
  plan.scores = plan.buffers = take(keys * (2 * plan.query_tile + 16));
  plan.records = take(16 * slots);
  plan.table_sums = take(4 * warps * plan.table_floats);
  plan.pad_sums = take(s.pad_gradient ? warps * 2 * 32 * 4 : 0);
  plan.tokens = take(slots * (8 * s.stride_sets + 4 + 4 + 2));
  take(4 * plan.bias_floats);
  plan.shared_bytes = at;
  return plan;
}

constexpr int kAxisOrders[6][3] = {{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}};

constexpr BackwardPlan plan_backward(const BackwardShape& s, int64_t limit) {
  const int64_t tokens = s.window[0] * s.window[1] * s.window[2];
  const BackwardPlan short_plan = plan_short_window(s);
  const bool fits_short = tokens <= kShortWindow && s.head_dim <= 32 && short_plan.shared_bytes <= limit;
  if (fits_short && tokens <= kWholeRowTokens) return short_plan;
  BackwardPlan plan{};
  for (const auto& axes : kAxisOrders) {
    const int64_t depth = s.window[axes[0]], rows = s.window[axes[1]], places = s.window[axes[2]];
    if (depth < 7 || depth > 8 || rows > 7 || places != 7) continue;
    const BackwardPlan placed = plan_depth_fastest(s, axes);
    if (!plan.depth_fastest || placed.block_keys < plan.block_keys) plan = placed;
  }
  const bool fits_depth = s.head_dim <= 32 && s.plain_bias && s.aligned_rows && plan.shared_bytes <= limit;
  if (plan.depth_fastest && fits_depth) return plan;
  if (fits_short) return short_plan;
  plan = {};
  for (int i = 0; i < 3; ++i) plan.axes[i] = i;
  plan.dim = s.head_dim <= 32 ? 32 : 64;
  plan.warp_keys = plan.dim == 32 ? 32 : 16;
  plan.query_tile = 32;
  const int bias_floats = static_cast<int>(s.table_rows > 0 ? s.table_rows : 1);
  const int64_t few = ceil_div(tokens, plan.warp_keys) < 4 ? ceil_div(tokens, plan.warp_keys) : 4;
  if (s.table_gradient) plan.table_floats = static_cast<int>(bias_span(s, tokens, plan.warp_keys));
  // What is given up first: the sums of the table in shared memory, if few warps are left; then the bias.
  for (const bool with_bias : {true, false})
    for (const bool shared_table : {true, false}) {
      if (shared_table && !s.table_gradient) continue;
      plan.bias_floats = with_bias ? bias_floats : 0, plan.table_is_shared = shared_table;
      plan.score_tiles = 1;
      const BackwardPlan one = fit_backward(s, plan, limit);
      if (one.shared_bytes > limit || one.threads < 32 * few) continue;
      plan.score_tiles = 2;
      const BackwardPlan two = fit_backward(s, plan, limit);
      return two.shared_bytes <= limit && two.blocks == one.blocks ? two : one;
    }
  plan.score_tiles = 1;
  return fit_backward(s, plan, limit);
}

// Shares of the windows of one head, each walked over by one block of threads. A large GPU takes the blocks in four
// waves, or in two where several share a multiprocessor, as each begins with a table. At most 64 windows a share, so
// that long sums lose no digits, and at most 16 MB of tables.
constexpr int64_t backward_shares(int64_t groups, int64_t heads, const BackwardPlan& plan, int64_t table_rows) {
  const int64_t by_warps = 32 * kMaxBackwardWarps / (plan.threads > 32 ? plan.threads : 32);
  const int64_t by_memory = (228 << 10) / (plan.shared_bytes + 1024);
  const int64_t together = by_warps < by_memory ? by_warps : by_memory;
  int64_t shares = (together < 2 ? 512 : 264 * together) / heads;
  if (shares < ceil_div(groups, 64)) shares = ceil_div(groups, 64);
  const int64_t most = table_rows > 0 ? (int64_t(16) << 20) / (4 * heads * table_rows) : shares;
  if (shares > most) shares = most;
  if (shares > groups) shares = groups;
  return shares > 0 ? shares : 1;
}

// ---- Sequences ----

// Keys and values come first, for a multiple of 16 keys.
constexpr ForwardPlan plan_sequence_forward(int64_t keys, int64_t head_dim, int64_t blocks, int64_t limit) {
  ForwardPlan plan{};
  plan.dim = head_dim <= 32 ? 32 : 64;
  const int64_t pair_bytes = 4 * plan.dim, own = kSequenceBytes + kShareBytes, all = round_up(keys, 16);
  plan.resident = all * pair_bytes + own <= limit;
  const int64_t room = (limit - own) / (2 * pair_bytes) / kBlockStep * kBlockStep;
  plan.block_keys = static_cast<int>(plan.resident ? all : room);
  plan.shared_bytes = plan.key_rows() * pair_bytes + own;
  share_queries(plan, keys, blocks, limit);
  return plan;
}

// Shares the parts of dq among warps so that the partitions of a multiprocessor, which have their warps in turn, have
// about the same to do, and then these. In halves of a product with 16 keys, a warp does eight with each 16 of its own.
constexpr void share_jobs(BackwardPlan& plan, int64_t keys) {
  int64_t own[kMaxBackwardWarps] = {}, load[4] = {};
  for (int warp = 0; warp < plan.warps; ++warp) {
    const int64_t left = keys - warp * plan.warp_keys;
    own[warp] = left > 0 ? 8 * ceil_div(left < plan.warp_keys ? left : plan.warp_keys, 16) : 0;
    load[warp % 4] += own[warp];
  }
  for (int& job : plan.job_warps) {
    job = 0;
    for (int warp = 1; warp < plan.warps; ++warp)
      if (load[warp % 4] < load[job % 4] || (load[warp % 4] == load[job % 4] && own[warp] < own[job])) job = warp;
    load[job % 4] += ceil_div(keys, 16), own[job] += ceil_div(keys, 16);
  }
}

// Keys and values of two sequences, one behind the other; three tiles of queries, two of the context. A warp without
// keys helps the others, unless fewer blocks have room then.
constexpr BackwardPlan plan_sequence_walk(int64_t keys, int64_t head_dim) {
  BackwardPlan plan{};
  plan.dim = head_dim <= 32 ? 32 : 64, plan.warp_keys = plan.query_tile = 32, plan.blocks = 1, plan.score_tiles = 2;
  const int owners = static_cast<int>(ceil_div(keys, 32)), most = most_warps(plan.dim);
  plan.helps = most / (owners + 1) == most / owners;
  plan.warps = owners + plan.helps, plan.threads = 32 * plan.warps;
  plan.rows = plan.block_keys = 32 * owners, plan.walks = true;
  plan.key_warp = plan.helps || owners == 1 ? plan.warps - 1 : plan.warps - 2;
  const int row = 2 * plan.dim, keys_bytes = plan.rows * row, tile = plan.query_tile * row;
  plan.half = 2 * keys_bytes, plan.values = kKeysPlace + keys_bytes;
  plan.queries = kKeysPlace + 2 * plan.half, plan.contexts = plan.queries + 6 * tile;
  plan.scores = plan.contexts + (keys > kWholeRowTokens ? 2 * tile : 0), plan.records = plan.scores + plan.rows * 128;
  plan.log_sums = plan.records + 2 * 16 * plan.rows, plan.staging = plan.log_sums + 2 * 4 * plan.rows;
  plan.tokens = plan.staging + tile, plan.shared_bytes = plan.tokens + 3 * kSequenceBytes;
  share_jobs(plan, keys);
  return plan;
}

constexpr BackwardPlan plan_sequence_backward(int64_t keys, int64_t head_dim, int64_t limit) {
  BackwardShape s{};
  s.window[0] = s.window[1] = 1, s.window[2] = keys, s.head_dim = head_dim, s.is_sequence = true;
  BackwardPlan plan{};
  if (keys <= 32 * most_warps(head_dim <= 32 ? 32 : 64)) plan = plan_sequence_walk(keys, head_dim);
  if (plan.walks && plan.shared_bytes <= limit) return plan;
  plan = {};
  plan.dim = 64, plan.warp_keys = plan.query_tile = 32;  // rare with fewer elements
  plan.score_tiles = 1;
  return fit_backward(s, plan, limit);
}

// Blocks that a multiprocessor has at a time, each of which walks over sequences.
constexpr int64_t walking_blocks(const BackwardPlan& plan, int64_t limit) {
  const int64_t by_memory = (limit + 1024) / (plan.shared_bytes + 1024), by_warps = most_warps(plan.dim) / plan.warps;
  return by_memory < by_warps ? by_memory : by_warps;
}

}  // namespace vidattn::cuda
