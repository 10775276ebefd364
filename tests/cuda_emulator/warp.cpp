// What the 32 lanes of a warp do together: shuffles, votes, matrices.
#include "machine.h"

namespace emulator {
namespace {

float value_of(uint32_t word, int half, Element element) {
  const uint16_t bits = uint16_t(half ? word >> 16 : word);
  return element == Element::float16 ? float(std::bit_cast<_Float16>(bits))
                                     : std::bit_cast<float>(uint32_t(bits) << 16);
}

// d = a b + c for a (16, kDepth) and b (kDepth, 8), spread over the lanes as PTX says for mma.m16n8k16 and m16n8k8.
template <int kDepth>
void multiply(Warp& w, Element element) {
  float a[16][kDepth], b[kDepth][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, pair = lane % 4 * 2;
    for (int half = 0; half < 2; ++half) {
      for (int r = 0; r < kDepth / 4; ++r)
        a[group + r % 2 * 8][pair + half + r / 2 * 8] = value_of(w.in[r][lane], half, element);
      for (int r = 0; r < kDepth / 8; ++r) b[pair + half + 8 * r][group] = value_of(w.in[4 + r][lane], half, element);
    }
  }
  for (int i = 0; i < 16; ++i) {
    double sum[8] = {};
    for (int k = 0; k < kDepth; ++k)
      for (int j = 0; j < 8; ++j) sum[j] += double(a[i][k]) * double(b[k][j]);
    for (int j = 0; j < 8; ++j) {
      const int lane = i % 8 * 4 + j / 2, r = i / 8 * 2 + j % 2;
      const double exact = sum[j] + double(std::bit_cast<float>(w.in[6 + r][lane]));
      float rounded = float(exact);
      if (options.truncate && std::isfinite(rounded) && std::fabs(double(rounded)) > std::fabs(exact))
        rounded = std::nextafter(rounded, 0.0f);
      w.out[r][lane] = std::bit_cast<uint32_t>(rounded);
    }
  }
}

// Shared memory has 32 banks of 4 bytes, and 128 bytes are read at a time. Lanes whose words are in one bank and differ
// are served in turns. Gives the turns beyond the first one.
int conflicts_of(const uint32_t* addresses, int lanes, int bytes) {
  uint32_t words[32][32];  // of each bank, those that are asked for
  int count[32] = {}, most = 1;
  for (int i = 0; i < lanes; ++i)
    for (uint32_t word = addresses[i] / 4; word < (addresses[i] + bytes) / 4; ++word) {
      const uint32_t bank = word % 32;
      uint32_t* end = words[bank] + count[bank];
      if (std::find(words[bank], end, word) == end) *end = word, most = std::max(most, ++count[bank]);
    }
  return most - 1;
}

void load_matrices(Warp& w, int warp, int matrices, bool transpose) {
  for (int m = 0; m < matrices; ++m) {
    uint16_t rows[8][8];
    for (int r = 0; r < 8; ++r) {
      const Fiber& f = fibers[warp * 32 + m * 8 + r];
      const uint32_t row = w.in[0][m * 8 + r];
      const uintptr_t host = uintptr_t(shared_base) + row;
      if (options.checked)
        check(host, 16, Access::read, f, f.site);
      else if (row % 16 || row < kSharedStart || row + 16 > kSharedStart + shared_bytes)
        found("out of bounds", "a row of ldmatrix", &f, f.site, host, true);
      std::memcpy(rows[r], shared_base + row, 16);
    }
    counts.ldmatrix_conflicts += conflicts_of(&w.in[0][m * 8], 8, 16);
    for (int lane = 0; lane < 32; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      w.out[m][lane] =
          transpose ? rows[j][i] | uint32_t(rows[j + 1][i]) << 16 : rows[i][j] | uint32_t(rows[i][j + 1]) << 16;
    }
  }
}

int source_of(Shuffle kind, int lane, int operand, int width) {
  const int base = lane & ~(width - 1);
  if (kind == Shuffle::index) return base | (operand & (width - 1));
  return (lane ^ operand) < base + width ? lane ^ operand : lane;
}

void shuffle_lanes(Warp& w, int warp, Shuffle kind, uint32_t mask) {
  for (int lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    int source = source_of(kind, lane, int(w.in[0][lane]), int(w.in[1][lane]));
    if (!(mask >> source & 1)) {
      const Fiber& f = fibers[warp * 32 + lane];
      found("shuffle", format("reads from lane %d, which takes no part", source), &f, f.site, 0, false);
      source = lane;
    }
    w.out[0][lane] = w.in[2][source], w.out[1][lane] = w.in[3][source];
  }
}

}  // namespace

void count_load_conflicts(int warp) {
  Fiber* lanes = &fibers[warp * 32];
  const std::vector<SharedLoad>& first = lanes[0].loads;
  for (size_t i = 0; i < first.size(); ++i) {
    const int together = 128 / int(first[i].bytes) < 32 ? 128 / int(first[i].bytes) : 32;
    uint32_t addresses[32];
    bool side_by_side = warps[warp].lanes == ~0u;
    for (int lane = 0; lane < 32 && side_by_side; ++lane) {
      const std::vector<SharedLoad>& loads = lanes[lane].loads;
      side_by_side = loads.size() == first.size() && loads[i].line == first[i].line && loads[i].bytes == first[i].bytes;
      if (side_by_side) addresses[lane] = loads[i].address;
    }
    if (!side_by_side) break;  // the lanes went different ways: nobody knows what ran together
    for (int lane = 0; lane < 32; lane += together)
      counts.load_conflicts += conflicts_of(addresses + lane, together, int(first[i].bytes));
  }
  for (int lane = 0; lane < 32; ++lane) lanes[lane].loads.clear();
}

void run_operation(Op op, uint32_t variant, uint32_t mask, int warp) {
  Warp& w = warps[warp];
  switch (op) {
    case Op::sync_warp: {
      int threads[32], count = 0;
      for (uint32_t rest = mask; rest; rest &= rest - 1) threads[count++] = warp * 32 + std::countr_zero(rest);
      return join_clocks(threads, count);
    }
    case Op::shuffle:
      return shuffle_lanes(w, warp, Shuffle(variant), mask);
    case Op::vote: {
      uint32_t votes = 0;
      for (int lane = 0; lane < 32; ++lane) votes |= uint32_t((mask >> lane & 1) && w.in[0][lane]) << lane;
      for (uint32_t& result : w.out[0]) result = votes;
      return;
    }
    case Op::load_matrix:
      return load_matrices(w, warp, int(variant & 255), variant >> 8);
    case Op::mma16:
      return multiply<16>(w, Element(variant));
    case Op::mma8:
      return multiply<8>(w, Element(variant));
    default:
      return;
  }
}

// Each lane puts its operands into its column, meets the others, and takes its results.

void sync_warp(uint32_t mask, Site site) {
  meet(Op::sync_warp, 0, mask, site);
}

void shuffle(Shuffle kind, uint32_t mask, void* value, size_t bytes, int operand, int width, Site site) {
  Warp& w = warps[current->warp];
  const int lane = current->lane;
  uint32_t words[2] = {};
  std::memcpy(words, value, bytes);
  w.in[0][lane] = uint32_t(operand), w.in[1][lane] = uint32_t(width);
  w.in[2][lane] = words[0], w.in[3][lane] = words[1];
  meet(Op::shuffle, uint32_t(kind), mask, site);
  words[0] = w.out[0][lane], words[1] = w.out[1][lane];
  std::memcpy(value, words, bytes);
}

uint32_t vote(uint32_t mask, bool predicate, Site site) {
  Warp& w = warps[current->warp];
  w.in[0][current->lane] = predicate;
  const int lane = current->lane;
  meet(Op::vote, 0, mask, site);
  return w.out[0][lane];
}

void load_matrix(uint32_t* out, int matrices, bool transpose, uint32_t row, Site site) {
  Warp& w = warps[current->warp];
  const int lane = current->lane;
  w.in[0][lane] = row;
  meet(Op::load_matrix, uint32_t(matrices) | uint32_t(transpose) << 8, ~0u, site);
  for (int m = 0; m < matrices; ++m) out[m] = w.out[m][lane];
}

void mma(int depth, Element element, float* d, const uint32_t* a, const uint32_t* b, const float* c, Site site) {
  Warp& w = warps[current->warp];
  const int lane = current->lane;
  for (int i = 0; i < depth / 4; ++i) w.in[i][lane] = a[i];
  for (int i = 0; i < depth / 8; ++i) w.in[4 + i][lane] = b[i];
  for (int i = 0; i < 4; ++i) w.in[6 + i][lane] = std::bit_cast<uint32_t>(c[i]);
  meet(depth == 16 ? Op::mma16 : Op::mma8, uint32_t(element), ~0u, site);
  for (int i = 0; i < 4; ++i) d[i] = std::bit_cast<float>(w.out[i][lane]);
}

}  // namespace emulator
