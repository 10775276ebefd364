// What the parts of the emulator share: the block that runs, what is known about memory, and what was found.
#pragma once
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

constexpr int kMaxThreads = 1024;
constexpr size_t kStackBytes = 128 * 1024;
constexpr uint32_t kMaxShared = 227 * 1024;
constexpr uint32_t kSharedStart = 1024;  // shared addresses start here, so that 0 is never one

// Bits of Options::seed; the others seed the random numbers.
enum Seed : uint32_t { kBackwards = 1, kRandomWarps = 2, kCopiesLandEarly = 4 };

struct Options {
  bool checked = true;
  uint32_t seed = 0;
  bool truncate = false;     // tensor cores round toward zero
  bool approximate = false;  // ex2 is off by up to 2 ulp
  uint32_t shared_limit = kMaxShared;
};
extern Options options;

// ---- Findings ----

// Where something happened: a position that a primitive was given by its caller, or the address of an instruction.
struct Place {
  Place() = default;
  Place(Site site) : file(site.file_name()), line(site.line()) {}
  explicit Place(void* instruction) : code(instruction) {}
  const char* file = "";
  unsigned line = 0;
  void* code = nullptr;
};

struct Finding {
  std::string kind, text, file;
  unsigned line;
  std::string image;  // with no file: the library, and the offset of the instruction in it
  uint64_t offset;
  uint64_t address;  // of the memory, 0 if it is not about memory
  uint3 block;
  int thread, lane;  // -1: the whole block
};
extern std::vector<Finding> findings;

struct Fiber;
// Adds a finding. stop: the launch ends here, as going on would be unsafe or impossible.
void found(const char* kind, const std::string& text, const Fiber* fiber, Place place, uint64_t address, bool stop);
__attribute__((format(printf, 1, 2))) std::string format(const char* text, ...);

// ---- Threads ----

enum class Op : uint8_t { none, sync_warp, shuffle, vote, load_matrix, mma16, mma8, barrier_of_warp, barrier, exit };

struct PendingCopy {
  uint32_t shared;
  const unsigned char* source;
  int bytes;
  bool valid;
  uint32_t group;
  std::source_location site;
};

struct SharedLoad {
  uint32_t address, bytes, line;
};

struct Fiber {
  void* stack_pointer;
  uint3 index;
  int id, warp, lane;
  Op waiting;  // what it waits in, with which operands that all lanes must agree on
  uint32_t variant;
  uint32_t mask;
  std::source_location site;
  uint32_t copy_groups;  // of cp.async, committed
  std::vector<PendingCopy> copies;
  std::vector<SharedLoad> loads;  // since its warp last met, to count the conflicts of banks
};

struct Warp {
  uint32_t in[16][32], out[4][32];  // operands and results of a warp operation, a column a lane
  uint32_t lanes, runnable, alive, arrived;
};

extern Fiber fibers[kMaxThreads];
extern Warp warps[32];
extern Fiber* current;  // null outside of kernels
extern int thread_count;
extern unsigned char* stacks;
extern unsigned char* shared_base;  // host address of shared address 0
extern uint32_t shared_bytes;       // of the block

struct Counts {
  uint64_t launches, blocks, switches, operations, accesses, ldmatrix_conflicts, load_conflicts;
};
extern Counts counts;

uint32_t random_bits();
// The lanes of `mask` wait until all of them have come with this operation; then run_operation() does it.
void meet(Op op, uint32_t variant, uint32_t mask, Site site);
// The lanes of a warp have met: counts the conflicts of the loads that they made side by side.
void count_load_conflicts(int warp);
void run_operation(Op op, uint32_t variant, uint32_t mask, int warp);

// ---- Memory ----

enum class Access { read, write, atomic };

// Checks an access of a fiber. Stops the launch if the access itself would be unsafe.
void check(uintptr_t address, size_t bytes, Access access, const Fiber& fiber, Place place, bool aligned = true);
// Accesses of these threads so far come before what they do from now on.
void join_clocks(const int* threads, int count);
void forget_launch();  // a launch begins
void forget_block();   // a block begins
void check_copies_done(const Fiber& fiber);

// Rights to a byte, and whether it is an element of its own.
enum Right : uint8_t { kMayRead = 1, kMayWrite = 2, kInitialised = 4, kSingleByte = 8 };
// Memory that kernels may use from now on, with the rights to each byte.
void add_memory(std::string name, uintptr_t begin, std::vector<uint8_t> rights);
void add_workspace(void* begin, size_t bytes);
void add_image(uintptr_t begin, uintptr_t end);  // constants of the kernels
void forget_memory();
// For each byte of an added memory whether a kernel wrote it. Empty if there is no such memory.
std::vector<uint8_t> written(const std::string& name);

}  // namespace emulator
