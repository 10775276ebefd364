// The threads of the emulated GPU: a block's threads are fibers, run by one thread of the host, block after block.
#include <dlfcn.h>
#include <link.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <mutex>

#include "machine.h"

// Switching by ucontext takes two calls of the operating system, 50 times as long.
extern "C" void emulator_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.type emulator_switch,@function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch,.-emulator_switch
)");
#else
#error "the switch between fibers is written for x86-64"
#endif

namespace emulator {

Builtins builtins;
Options options;
std::vector<Finding> findings;
Fiber fibers[kMaxThreads];
Warp warps[32];
Fiber* current = nullptr;
int thread_count;
unsigned char* stacks;
unsigned char* shared_base;
uint32_t shared_bytes;
Counts counts;

namespace {

constexpr size_t kMaxFindings = 20;

struct Barrier {
  int arrived, accumulated, result;
};

Barrier barrier;
int warp_count, alive_count;
uint32_t runnable_warps;
void* host_stack_pointer;
Entry entry;
void* entry_arguments;
bool stopped;
uint64_t random_state = 1;
std::mutex one_launch;

__attribute__((noreturn)) void leave_block() {
  void* ignored;
  emulator_switch(&ignored, host_stack_pointer);
  __builtin_unreachable();
}

const char* name(Op op) {
  static const char* const names[] = {"nothing",   "__syncwarp",   "a shuffle",   "a vote",
                                      "ldmatrix",  "mma m16n8k16", "mma m16n8k8", "a barrier, with its warp incomplete",
                                      "a barrier", "exit"};
  return names[int(op)];
}

bool same(Site a, Site b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || !std::strcmp(a.file_name(), b.file_name()));
}
std::string text_of(Site site) {
  return format("%s:%u:%u", site.file_name(), site.line(), site.column());
}

}  // namespace

uint32_t random_bits() {
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return uint32_t(random_state >> 32);
}

std::string format(const char* text, ...) {
  char buffer[2048];
  va_list list;
  va_start(list, text);
  std::vsnprintf(buffer, sizeof buffer, text, list);
  va_end(list);
  return buffer;
}

void found(const char* kind, const std::string& text, const Fiber* fiber, Place place, uint64_t address, bool stop) {
  if (findings.size() < kMaxFindings) {
    Finding f{kind, text, place.file, place.line, "", 0, address, builtins.block, -1, -1};
    if (fiber) f.thread = fiber->id, f.lane = fiber->lane;
    Dl_info info;
    if (place.code && dladdr(place.code, &info) && info.dli_fname) {
      f.image = info.dli_fname;
      // Return addresses point behind the call.
      f.offset = uint64_t(static_cast<char*>(place.code) - static_cast<char*>(info.dli_fbase) - 1);
    }
    findings.push_back(f);
  }
  if (stop || findings.size() >= kMaxFindings) {
    stopped = true;
    leave_block();
  }
}

// ---- Scheduling ----

namespace {

int pick(uint32_t set) {
  return options.seed & kBackwards ? 31 - std::countl_zero(set) : std::countr_zero(set);
}

void report_stuck() {
  std::string text = "no thread can run:";
  const Fiber* last = nullptr;
  int shown = 0;
  for (int t = 0; t < thread_count && shown < 6; ++t) {
    const Fiber& f = fibers[t];
    if (f.waiting == Op::exit || f.waiting == Op::none) continue;
    if (last && last->waiting == f.waiting && last->mask == f.mask && same(last->site, f.site)) continue;
    text += format(" thread %d waits in %s at %s;", t, name(f.waiting), text_of(f.site).c_str());
    last = &f, ++shown;
  }
  found("deadlock", text, last, last ? Place(last->site) : Place(), 0, true);
}

// Gives the processor to another fiber. The caller is no longer among the runnable ones.
void yield() {
  int w = current->warp;
  if (!warps[w].runnable) {
    runnable_warps &= ~(1u << w);
    if (!runnable_warps) {
      if (!alive_count) leave_block();
      report_stuck();
    }
    if (options.seed & kRandomWarps) {
      const int turn = int(random_bits() & 31);
      w = (std::countr_zero(std::rotr(runnable_warps, turn)) + turn) & 31;
    } else {
      w = pick(runnable_warps);
    }
  }
  Fiber* next = &fibers[w * 32 + pick(warps[w].runnable)];
  if (next == current) return;
  Fiber* previous = current;
  current = next;
  builtins.thread = next->index;
  ++counts.switches;
  emulator_switch(&previous->stack_pointer, next->stack_pointer);
}

void make_runnable(int warp, uint32_t lanes) {
  warps[warp].runnable |= lanes;
  runnable_warps |= 1u << warp;
}

// ---- Where threads meet ----

void complete_barrier() {
  barrier.result = barrier.accumulated;
  barrier.arrived = 0;
  int threads[kMaxThreads], count = 0;
  for (int t = 0; t < thread_count; ++t) {
    if (fibers[t].waiting != Op::barrier) continue;
    threads[count++] = t;
    fibers[t].waiting = Op::none;
    make_runnable(fibers[t].warp, 1u << fibers[t].lane);
  }
  join_clocks(threads, count);
}

// A whole warp comes to the barrier. True if it may go on.
bool arrive(int warp, Combine combine) {
  const Warp& w = warps[warp];
  if (!barrier.arrived) barrier.accumulated = combine == Combine::all;
  for (uint32_t rest = w.lanes; rest; rest &= rest - 1) {
    Fiber& f = fibers[warp * 32 + std::countr_zero(rest)];
    const int value = int(w.in[0][f.lane]);
    if (combine == Combine::all) barrier.accumulated &= value;
    f.waiting = Op::barrier;
  }
  barrier.arrived += std::popcount(w.lanes);
  if (barrier.arrived < alive_count) return false;
  complete_barrier();
  return true;
}

bool needs_whole_warp(Op op) {
  return op == Op::barrier_of_warp || op == Op::load_matrix || op == Op::mma16 || op == Op::mma8;
}

// Runs the operation that the lanes of `mask` wait in, if all of them do.
bool try_to_run(int warp, uint32_t mask) {
  Warp& w = warps[warp];
  const uint32_t need = mask & w.alive;
  if (!need || (w.arrived & need) != need) return false;
  const Fiber& first = fibers[warp * 32 + std::countr_zero(need)];
  for (uint32_t rest = need & (need - 1); rest; rest &= rest - 1) {
    const Fiber& f = fibers[warp * 32 + std::countr_zero(rest)];
    // Lanes may come to __syncwarp at different places.
    if (f.waiting == first.waiting && f.variant == first.variant && f.mask == first.mask &&
        (f.waiting == Op::sync_warp || same(f.site, first.site)))
      continue;
    const std::string text = format("lanes of a warp meet in different operations: lane %d in %s, lane %d in %s at %s",
                                    first.lane, name(first.waiting), f.lane, name(f.waiting), text_of(f.site).c_str());
    found("divergence", text, &first, first.site, 0, true);
  }
  const uint32_t whole = first.waiting == Op::barrier_of_warp ? w.lanes : ~0u;
  if (needs_whole_warp(first.waiting) && need != whole)
    found("divergence", format("%s needs the whole warp, lanes %08x are missing", name(first.waiting), whole & ~need),
          &first, first.site, 0, true);
  ++counts.operations;
  if (need == w.lanes) count_load_conflicts(warp);
  w.arrived &= ~need;
  if (first.waiting == Op::barrier_of_warp) return arrive(warp, Combine(first.variant));
  run_operation(first.waiting, first.variant, need, warp);
  for (uint32_t rest = need; rest; rest &= rest - 1) fibers[warp * 32 + std::countr_zero(rest)].waiting = Op::none;
  make_runnable(warp, need);
  return true;
}

void exit_thread() {
  Fiber& f = *current;
  f.waiting = Op::exit;
  check_copies_done(f);
  Warp& w = warps[f.warp];
  w.alive &= ~(1u << f.lane), w.runnable &= ~(1u << f.lane);
  --alive_count;
  // Others may have waited for this one alone.
  for (uint32_t rest = w.arrived; rest; rest &= rest - 1) {
    const Fiber& other = fibers[f.warp * 32 + std::countr_zero(rest)];
    if ((other.mask >> f.lane & 1) && try_to_run(f.warp, other.mask)) break;
  }
  if (barrier.arrived && barrier.arrived == alive_count) complete_barrier();
  yield();
  __builtin_unreachable();
}

void fiber_main() {
  entry(entry_arguments);
  exit_thread();
}

}  // namespace

void meet(Op op, uint32_t variant, uint32_t mask, Site site) {
  Fiber& f = *current;
  if (!(mask >> f.lane & 1)) found("mask", format("the caller is not in its own mask %08x", mask), &f, site, 0, true);
  f.waiting = op, f.variant = variant, f.mask = mask, f.site = site;
  Warp& w = warps[f.warp];
  w.arrived |= 1u << f.lane;
  w.runnable &= ~(1u << f.lane);
  if (!try_to_run(f.warp, mask)) yield();
}

int block_barrier(Combine combine, int value, Site site) {
  Warp& w = warps[current->warp];
  w.in[0][current->lane] = uint32_t(value);
  meet(Op::barrier_of_warp, uint32_t(combine), w.lanes, site);
  return barrier.result;
}

// ---- Launches ----

namespace {

void allocate_once() {
  if (stacks) return;
  constexpr size_t page = 4096;
  constexpr int protection = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  stacks = static_cast<unsigned char*>(mmap(nullptr, kStackBytes * kMaxThreads, protection, flags, -1, 0));
  for (int t = 0; t < kMaxThreads; ++t) mprotect(stacks + t * kStackBytes, page, PROT_NONE);  // an overflow faults
  shared_base =
      static_cast<unsigned char*>(mmap(nullptr, kSharedStart + kMaxShared + 4 * page, protection, flags, -1, 0)) + page;
}

void start_fiber(int t, dim3 block) {
  Fiber& f = fibers[t];
  f.id = t, f.warp = t / 32, f.lane = t % 32, f.waiting = Op::none, f.copy_groups = 0;
  f.copies.clear(), f.loads.clear();
  f.index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
  // Stacks a power of two apart would share the same sets of the cache: each is shifted by a few lines.
  unsigned char* top = stacks + (t + 1) * kStackBytes - 64 - (t % 29) * 1088;
  void** pointer = reinterpret_cast<void**>(uintptr_t(top) & ~uintptr_t(15));
  *--pointer = nullptr;
  *--pointer = reinterpret_cast<void*>(fiber_main);
  for (int saved = 0; saved < 6; ++saved) *--pointer = nullptr;
  f.stack_pointer = pointer;
}

void run_block(dim3 block) {
  ++counts.blocks;
  std::memset(shared_base + kSharedStart, 0xff, shared_bytes);  // NaN in any format
  forget_block();
  barrier = {};
  for (int w = 0; w < warp_count; ++w) {
    const int lanes = std::min(32, thread_count - w * 32);
    warps[w].lanes = warps[w].alive = warps[w].runnable = lanes == 32 ? ~0u : (1u << lanes) - 1;
    warps[w].arrived = 0;
  }
  runnable_warps = warp_count == 32 ? ~0u : (1u << warp_count) - 1;
  alive_count = thread_count;
  for (int t = 0; t < thread_count; ++t) start_fiber(t, block);
  const int warp = options.seed & kBackwards ? warp_count - 1 : 0;
  current = &fibers[warp * 32 + pick(warps[warp].runnable)];
  builtins.thread = current->index;
  emulator_switch(&host_stack_pointer, current->stack_pointer);
  current = nullptr;
}

// The constants of the library that the kernel is in may be read.
void add_image_of(Entry function) {
  uintptr_t code = reinterpret_cast<uintptr_t>(function);
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* code) {
        for (bool adding : {false, true}) {
          bool mine = false;
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& header = info->dlpi_phdr[i];
            const uintptr_t begin = info->dlpi_addr + header.p_vaddr;
            if (header.p_type != PT_LOAD) continue;
            mine |= *static_cast<uintptr_t*>(code) - begin < header.p_memsz;
            if (adding) add_image(begin, begin + header.p_memsz);
          }
          if (!mine) return 0;
        }
        return 1;
      },
      &code);
}

const char* why_not_launched(dim3 grid, dim3 block, size_t dynamic_bytes, size_t argument_bytes) {
  if (block.x == 0 || block.y == 0 || block.z == 0 || uint64_t(block.x) * block.y * block.z > kMaxThreads ||
      block.z > 64)
    return "invalid number of threads in a block";
  if (dynamic_bytes > options.shared_limit) return "more shared memory than a block may have";
  if (argument_bytes > 4096 + sizeof(void*))
    return "more than 4096 bytes of arguments";  // the pointer is that of the kernel
  if (!grid.x || !grid.y || !grid.z || grid.x > 2147483647u || grid.y > 65535 || grid.z > 65535)
    return "invalid number of blocks";
  return nullptr;
}

}  // namespace

const char* launch(Entry function, void* arguments, size_t argument_bytes, dim3 grid, dim3 block,
                   size_t dynamic_bytes) {
  std::lock_guard<std::mutex> guard(one_launch);
  allocate_once();
  if (const char* reason = why_not_launched(grid, block, dynamic_bytes, argument_bytes)) return reason;
  ++counts.launches;
  stopped = false;
  random_state = 0x9e3779b97f4a7c15ull ^ options.seed;
  thread_count = int(block.x * block.y * block.z);
  warp_count = (thread_count + 31) / 32;
  builtins.grid = grid, builtins.threads = block;
  entry = function, entry_arguments = arguments;
  shared_bytes = uint32_t(dynamic_bytes);
  forget_launch();
  add_image_of(function);
  const uintptr_t begin = reinterpret_cast<uintptr_t>(arguments);
  add_image(begin, begin + argument_bytes);
  const int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
  for (int64_t i = 0; i < blocks && !stopped; ++i) {
    const int64_t b = options.seed & kBackwards ? blocks - 1 - i : i;
    builtins.block = {unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)};
    run_block(block);
  }
  return findings.empty() ? nullptr : "the emulated GPU found mistakes";
}

void* shared_memory() {
  return shared_base + kSharedStart;
}
uint32_t shared_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - shared_base);
}
int shared_memory_limit() {
  return int(options.shared_limit);
}

float approximate(float exact) {
  // Two steps from these, a number is still a normal one.
  if (!options.approximate || !(std::fabs(exact) > 0x1p-125f && std::fabs(exact) < 0x1p127f)) return exact;
  const int ulps = int(random_bits() % 5) - 2;
  return std::bit_cast<float>(std::bit_cast<int32_t>(exact) + ulps);
}

}  // namespace emulator
