// What is known about memory: which bytes may be used, which were written, and who used them in which order.
//
// Races are found with clocks, as in FastTrack (Flanagan and Freund, 2009): each thread has a vector of the last step
// of every other thread that is known to come before its own next one. Barriers and __syncwarp alone bring the vectors
// together; shuffles, votes and products order nothing, as on the GPU.
#include "machine.h"

namespace emulator {
namespace {

// Who used a byte (two bytes of global memory, where no element has one). Blocks are numbered over all launches. A
// reader that comes before a newer one is forgotten: a write that races with it races with the newer one too, or comes
// after both.
struct Cell {
  static constexpr int kReaders = 8;
  uint32_t write_block = 0, write_step = 0, read_block = 0;
  int32_t many = -1;  // more readers than fit: the index of a vector with a step for each thread
  uint16_t writer = 0, count = 0;
  bool atomic = false;  // the last write
  uint16_t reader[kReaders];
  uint32_t reader_step[kReaders];
};
constexpr uint16_t kInFlight = 0xffff;  // the writer of what cp.async may write at any time

struct Memory {
  std::string name;
  uintptr_t begin, end;
  std::vector<uint8_t> rights;
  int shift;                // of a byte's place, to that of its cell
  std::vector<Cell> cells;  // of what may be written
};
struct Image {
  uintptr_t begin, end;
};

std::vector<Memory> memories;
std::vector<Image> images;
std::vector<Cell> shared_cells(kMaxShared + 1);
std::vector<uint32_t> clocks;  // thread_count columns
std::vector<std::vector<uint32_t>> reader_vectors;
std::vector<int> free_vectors;
uint32_t used_shared = 0;                    // by the last launch
uint32_t block_number = 0, first_block = 0;  // the current block, the first one of this launch

uint32_t* clock_of(int thread) {
  return clocks.data() + size_t(thread) * thread_count;
}

bool in_shared(uintptr_t a) {
  return a - uintptr_t(shared_base) < kSharedStart + kMaxShared + 4096;
}

std::string owner(uintptr_t a) {
  if (in_shared(a)) return format("shared byte %ld", long(a - uintptr_t(shared_base)) - long(kSharedStart));
  for (const Memory& m : memories)
    if (a >= m.begin && a < m.end) return format("byte %ld of %s", long(a - m.begin), m.name.c_str());
  return format("address %p, which belongs to no argument", reinterpret_cast<void*>(a));
}

void forget_readers(Cell& c) {
  if (c.many >= 0) free_vectors.push_back(c.many);
  c.many = -1, c.count = 0, c.read_block = 0;
}

void report_race(const char* what, uintptr_t a, int other, uint32_t block, const Fiber& f, Place place) {
  std::string who = other == kInFlight ? "a cp.async that was not waited for" : format("thread %d", other);
  if (block != block_number) who += " of another block";
  found("race", format("%s: %s; the other one is %s", owner(a).c_str(), what, who.c_str()), &f, place, a, false);
}

void remember_reader(Cell& c, const Fiber& f, const uint32_t* mine) {
  const uint32_t now = mine[f.id];
  if (c.read_block != block_number) forget_readers(c), c.read_block = block_number;
  if (c.many >= 0) {
    reader_vectors[c.many][f.id] = now;
    return;
  }
  int i = 0;
  while (i < c.count && c.reader[i] != f.id && c.reader_step[i] > mine[c.reader[i]]) ++i;
  if (i < Cell::kReaders) {
    c.reader[i] = uint16_t(f.id), c.reader_step[i] = now;
    c.count += i == c.count;
    return;
  }
  if (free_vectors.empty()) free_vectors.push_back(int(reader_vectors.size())), reader_vectors.emplace_back();
  c.many = free_vectors.back();
  free_vectors.pop_back();
  auto& steps = reader_vectors[c.many];
  steps.assign(thread_count, 0);
  for (i = 0; i < c.count; ++i) steps[c.reader[i]] = c.reader_step[i];
  steps[f.id] = now;
}

// A thread whose read of the cell does not come before what `f` does now; -1 if there is none.
int unordered_reader(const Cell& c, const Fiber& f, const uint32_t* mine) {
  for (int i = 0; i < c.count && c.many < 0; ++i)
    if (c.reader[i] != f.id && c.reader_step[i] > mine[c.reader[i]]) return c.reader[i];
  for (int t = 0; t < thread_count && c.many >= 0; ++t)
    if (t != f.id && reader_vectors[c.many][t] > mine[t]) return t;
  return -1;
}

// Judges and remembers an access of one cell. True if something was found.
bool use(Cell& c, uintptr_t a, Access access, bool initialised, const Fiber& f, Place place) {
  const uint32_t* mine = clock_of(f.id);
  bool bad = false;
  const bool both_atomic = access == Access::atomic && c.atomic;
  if (c.write_block >= first_block && c.write_block && !both_atomic) {
    const bool here = c.write_block == block_number;
    if (!here || c.writer == kInFlight || (c.writer != f.id && c.write_step > mine[c.writer])) {
      report_race(access == Access::read ? "a read and a write that nothing orders" : "two writes that nothing orders",
                  a, c.writer, c.write_block, f, place);
      bad = true;
    }
  }
  if (access == Access::read) {
    if (!initialised && !c.write_block && !bad) {
      found("uninitialised", owner(a) + " is read before it is written", &f, place, a, false);
      bad = true;
    }
    remember_reader(c, f, mine);
    return bad;
  }
  if (c.read_block == block_number) {
    const int other = unordered_reader(c, f, mine);
    if (other >= 0 && !bad) {
      report_race("a write while another thread may still read", a, other, block_number, f, place);
      bad = true;
    }
  } else if (c.read_block && c.read_block >= first_block && !bad) {
    report_race("a write of what another block of the launch reads", a, c.count ? c.reader[0] : 0, c.read_block, f,
                place);
    bad = true;
  }
  forget_readers(c);
  c.write_block = block_number, c.writer = uint16_t(f.id), c.write_step = mine[f.id];
  c.atomic = access == Access::atomic;
  return bad;
}

void use_all(Cell* cells, size_t first, size_t last, uintptr_t a, Access access, bool initialised, const Fiber& f,
             Place place) {
  bool told = false;  // one finding an access is enough
  for (size_t i = first; i <= last; ++i) told = use(cells[i], a, access, initialised, f, place) || told;
}

const char* verb(Access access) {
  return access == Access::read ? "read" : "write";
}

void check_global(Memory& m, uintptr_t a, size_t bytes, Access access, const Fiber& f, Place place) {
  if (a + bytes > m.end)
    found("out of bounds", format("%zu-byte %s across the end of %s", bytes, verb(access), m.name.c_str()), &f, place,
          a, true);
  const uint8_t* rights = m.rights.data() + (a - m.begin);
  uint8_t have = 0xff;
  for (size_t i = 0; i < bytes; ++i) have &= rights[i];
  if (!(have & kMayRead))
    found("out of bounds", format("%zu-byte %s of %s, between its elements", bytes, verb(access), owner(a).c_str()), &f,
          place, a, true);
  if (access != Access::read && !(have & kMayWrite)) found("write to an input", owner(a), &f, place, a, true);
  if (m.cells.empty()) return;
  if (access == Access::read && !(have & kMayWrite)) return;  // nobody can write it
  const size_t offset = a - m.begin;
  use_all(m.cells.data(), offset >> m.shift, (offset + bytes - 1) >> m.shift, a, access, have & kInitialised, f, place);
}

}  // namespace

void check(uintptr_t a, size_t bytes, Access access, const Fiber& f, Place place, bool aligned) {
  ++counts.accesses;
  if (aligned && bytes <= 16 && std::has_single_bit(bytes) && a % bytes)
    found("misaligned", format("%zu-byte %s of %s", bytes, verb(access), owner(a).c_str()), &f, place, a, true);
  if (in_shared(a)) {
    const uintptr_t first = uintptr_t(shared_base) + kSharedStart;
    if (a < first || a + bytes > first + shared_bytes)
      found("out of bounds",
            format("%zu-byte %s of %s, the block has %u", bytes, verb(access), owner(a).c_str(), shared_bytes), &f,
            place, a, true);
    use_all(shared_cells.data(), a - first, a - first + bytes - 1, a, access, false, f, place);
    return;
  }
  for (Memory& m : memories)
    if (a >= m.begin && a < m.end) return check_global(m, a, bytes, access, f, place);
  if (access == Access::read)
    for (const Image& image : images)
      if (a >= image.begin && a < image.end) return;
  found("out of bounds", format("%zu-byte %s of %s", bytes, verb(access), owner(a).c_str()), &f, place, a, true);
}

void join_clocks(const int* threads, int count) {
  if (!options.checked) return;
  static std::vector<uint32_t> all;
  all.assign(thread_count, 0);
  for (int i = 0; i < count; ++i) {
    const uint32_t* clock = clock_of(threads[i]);
    for (int t = 0; t < thread_count; ++t) all[t] = std::max(all[t], clock[t]);
  }
  for (int i = 0; i < count; ++i) {
    std::copy(all.begin(), all.end(), clock_of(threads[i]));
    ++clock_of(threads[i])[threads[i]];
  }
}

void forget_launch() {
  images.clear();
  first_block = block_number + 1;
  // Vectors of readers have an entry a thread, and launches have different numbers of those.
  for (Memory& m : memories)
    for (Cell& c : m.cells) c.many = -1, c.count = 0, c.read_block = 0;
  std::fill(shared_cells.begin(), shared_cells.begin() + used_shared, Cell{});
  used_shared = shared_bytes;
  reader_vectors.clear(), free_vectors.clear();
  clocks.assign(options.checked ? size_t(thread_count) * thread_count : 0, 0);
}

void forget_block() {
  ++block_number;
  if (!options.checked) return;
  for (uint32_t i = 0; i < shared_bytes; ++i) {
    forget_readers(shared_cells[i]);
    shared_cells[i] = Cell{};
  }
  std::fill(clocks.begin(), clocks.end(), 0);
  for (int t = 0; t < thread_count; ++t) clock_of(t)[t] = 1;
}

void add_memory(std::string name, uintptr_t begin, std::vector<uint8_t> rights) {
  uint8_t some = 0;
  for (uint8_t right : rights) some |= right;
  Memory m{std::move(name), begin, begin + rights.size(), std::move(rights), some & kSingleByte ? 0 : 1, {}};
  if (some & kMayWrite && options.checked) m.cells.resize(((m.end - m.begin) >> m.shift) + 2);
  memories.push_back(std::move(m));
}

void add_image(uintptr_t begin, uintptr_t end) {
  images.push_back({begin, end});
}

// Memory that an op made for its kernels, which they may read where they wrote it.
void add_workspace(void* begin, size_t bytes) {
  add_memory("the workspace", uintptr_t(begin), std::vector<uint8_t>(bytes, kMayRead | kMayWrite));
}
void forget_memory() {
  memories.clear();
}

std::vector<uint8_t> written(const std::string& name) {
  for (const Memory& m : memories) {
    if (m.name != name || m.cells.empty()) continue;
    std::vector<uint8_t> result(m.end - m.begin);
    for (size_t i = 0; i < result.size(); ++i) result[i] = m.cells[i >> m.shift].write_block != 0;
    return result;
  }
  return {};
}

void load_shared(uint32_t address, void* to, size_t bytes, Site site) {
  Fiber& f = *current;
  const uintptr_t from = uintptr_t(shared_base) + address;
  if (options.checked)
    check(from, bytes, Access::read, f, site);
  else if (address < kSharedStart || address + bytes > kSharedStart + shared_bytes)
    found("out of bounds", "a read of " + owner(from), &f, site, from, true);
  std::memcpy(to, shared_base + address, bytes);
  f.loads.push_back({address, uint32_t(bytes), site.line()});
}

void store_shared(uint32_t address, const void* from, size_t bytes, Site site) {
  Fiber& f = *current;
  const uintptr_t to = uintptr_t(shared_base) + address;
  if (options.checked)
    check(to, bytes, Access::write, f, site);
  else if (address < kSharedStart || address + bytes > kSharedStart + shared_bytes)
    found("out of bounds", "a write of " + owner(to), &f, site, to, true);
  std::memcpy(shared_base + address, from, bytes);
  f.loads.push_back({address, uint32_t(bytes), site.line()});
}

// ---- Asynchronous copies ----
//
// Until its thread waits, a copy may write at any time: every other access of these bytes is a race.

namespace {

void land(const PendingCopy& c) {
  unsigned char* to = shared_base + c.shared;
  if (c.valid)
    std::memcpy(to, c.source, c.bytes);
  else
    std::memset(to, 0, c.bytes);
}

}  // namespace

void async_copy(uint32_t shared, const void* source, int bytes, bool valid, Site site) {
  Fiber& f = *current;
  const uintptr_t to = uintptr_t(shared_base) + shared;
  if (shared % bytes || uintptr_t(source) % bytes)
    found("misaligned", format("%d-byte cp.async", bytes), &f, site, shared % bytes ? to : uintptr_t(source), true);
  if (options.checked) {
    if (valid) check(uintptr_t(source), bytes, Access::read, f, site);
    check(to, bytes, Access::write, f, site);
    for (int i = 0; i < bytes; ++i) shared_cells[shared - kSharedStart + i].writer = kInFlight;
  } else if (shared < kSharedStart || shared + bytes > kSharedStart + shared_bytes) {
    found("out of bounds", "cp.async to " + owner(to), &f, site, to, true);
  }
  const PendingCopy copy{shared, static_cast<const unsigned char*>(source), bytes, valid, f.copy_groups, site};
  if (options.seed & kCopiesLandEarly)
    land(copy);
  else
    std::memset(shared_base + shared, 0xff, bytes);
  f.copies.push_back(copy);
}

void async_commit() {
  ++current->copy_groups;
}

void async_wait(int pending, Site site) {
  Fiber& f = *current;
  const auto waits = [&](const PendingCopy& c) { return int(f.copy_groups - c.group) > pending; };
  const size_t count = f.copies.size();
  for (size_t i = 0; i < count; ++i) {  // copies land in no particular order
    const PendingCopy& c = f.copies[options.seed & kBackwards ? i : count - 1 - i];
    if (!waits(c)) continue;
    land(c);
    for (int b = 0; b < c.bytes && options.checked; ++b) {
      Cell& cell = shared_cells[c.shared - kSharedStart + b];
      if (cell.writer != kInFlight && b == 0)
        report_race("written while a cp.async was in flight", uintptr_t(shared_base) + c.shared, cell.writer,
                    cell.write_block, f, site);
      cell.writer = uint16_t(f.id), cell.write_step = clock_of(f.id)[f.id], cell.write_block = block_number;
    }
  }
  std::erase_if(f.copies, waits);
}

void check_copies_done(const Fiber& f) {
  if (f.copies.empty()) return;
  found("cp.async", "the thread exits before it has waited for its copies", &f, f.copies[0].site, 0, false);
}

void atomic_begin(void* address, int bytes, Site site) {
  if (options.checked) check(uintptr_t(address), bytes, Access::atomic, *current, site);
}

}  // namespace emulator
