// The scheduler behind cuda_host.h: fibers, meetings and asynchronous copies.
#include "cuda_host.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <memory>
#include <random>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {
namespace {

constexpr size_t kStack = 128 * 1024;

[[noreturn]] void fail(const char* why, const char* detail = "") {
  fprintf(stderr, "simt: %s %s\n", why, detail);
  fflush(stderr);
  _Exit(3);
}

// Switching between fibers. The x86-64 road saves the callee-saved registers by hand: swapcontext makes a system call.
#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
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
.size simt_switch, .-simt_switch
)");
extern "C" void simt_switch(void** save, void* to);
void switch_context(Context& from, Context& to) { simt_switch(&from.stack_pointer, to.stack_pointer); }
void make_context(Context& context, char* stack, void (*entry)()) {
  uintptr_t top = (reinterpret_cast<uintptr_t>(stack) + kStack) & ~uintptr_t{15};
  void** p = reinterpret_cast<void**>(top);
  *--p = nullptr;  // keeps the stack aligned as after a call
  *--p = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--p = nullptr;
  context.stack_pointer = p;
}
#else
struct Context {
  ucontext_t context;
};
void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack = {stack, 0, kStack};
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
#endif

// A place where `expected` threads meet; everybody goes on when the last has come.
struct Meeting {
  int expected = 0, arrived = 0;
  uint64_t phase = 0;
};

struct Warp {
  Meeting meeting;
  const char* what = nullptr;
  std::vector<char> deposits = std::vector<char>(2 * 32 * kDeposit);  // two, so that one meeting an exchange is enough
};

struct Block {
  dim3 index;
  int rank = 0;
  char* shared = nullptr;
  int running = 0;
  Meeting meeting;
  int any[2] = {0, 0};
  std::vector<Warp> warps;
};

struct Copy {
  char* to;
  const char* from;
  bool valid;
  char early[16];  // the source as it was when issued: the hardware may read then or later
  bool use_early;
};

struct Thread {
  Context context;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  dim3 index;
  Block* block = nullptr;
  Meeting* waits = nullptr;
  uint64_t waits_for = 0;
  bool done = false;
  int block_barriers = 0, cluster_barriers = 0, copy_waits = 0;  // met so far
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
};

struct Machine {
  Context scheduler;
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  dim3 grid, block;
  int64_t shared = 0;
  int launch = -1;  // launches so far, this one not counted
  Meeting cluster;
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<char*> stacks;
  const std::function<void()>* kernel = nullptr;
  std::mt19937_64 random{1};
};
Machine machine;
Thread* current = nullptr;

void to_scheduler(bool for_good) {
  Thread* self = current;
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack, machine.stack_bottom, machine.stack_size);
#endif
  (void)for_good;
  switch_context(self->context, machine.scheduler);
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(self->fake_stack, &machine.stack_bottom, &machine.stack_size);
#endif
}

void fiber() {
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &machine.stack_bottom, &machine.stack_size);
#endif
  (*machine.kernel)();
  current->done = true;
  to_scheduler(true);
}

void resume(Thread* thread) {
  current = thread;
#if SIMT_ASAN
  __sanitizer_start_switch_fiber(&machine.fake_stack, thread->stack, kStack);
#endif
  switch_context(machine.scheduler, thread->context);
#if SIMT_ASAN
  __sanitizer_finish_switch_fiber(machine.fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

void arrive(Meeting& meeting) {
  if (++meeting.arrived == meeting.expected) {
    meeting.arrived = 0;
    ++meeting.phase;
    return;
  }
  current->waits = &meeting;
  current->waits_for = meeting.phase;
  to_scheduler(false);
}

void end_block(Block& block) {
#if SIMT_ASAN
  ASAN_POISON_MEMORY_REGION(block.shared, static_cast<size_t>(machine.shared));
#else
  (void)block;
#endif
}

void check_copies(const Thread& thread) {
  bool open = !thread.uncommitted.empty();
  for (const auto& group : thread.groups) open = open || !group.empty();
  if (open) fail("a thread ended with asynchronous copies on their way");
}

// Every lane of a warp that can go on does so until its next meeting; whether any did.
bool turn(std::vector<Thread*>& warp, size_t& alive) {
  std::shuffle(warp.begin(), warp.end(), machine.random);
  bool moved = false;
  for (Thread* thread : warp) {
    if (thread->done || (thread->waits != nullptr && thread->waits->phase == thread->waits_for)) continue;
    thread->waits = nullptr;
    moved = true;
    resume(thread);
    if (!thread->done) continue;
    --alive;
    check_copies(*thread);
    if (--thread->block->running == 0) end_block(*thread->block);
  }
  return moved;
}

void run_cluster(int64_t first_x, int y, int z, int threads, int cluster) {
  machine.blocks.assign(static_cast<size_t>(cluster), Block{});
  machine.threads.clear();
  machine.cluster = {cluster * threads, 0, 0};
  for (int rank = 0; rank < cluster; ++rank) {
    Block& block = machine.blocks[static_cast<size_t>(rank)];
    block.index = {static_cast<unsigned>(first_x + rank), static_cast<unsigned>(y), static_cast<unsigned>(z)};
    block.rank = rank;
    void* shared = nullptr;
    if (posix_memalign(&shared, 128, static_cast<size_t>(std::max<int64_t>(machine.shared, 1))) != 0) fail("no memory");
    block.shared = static_cast<char*>(shared);
    memset(block.shared, 0xff, static_cast<size_t>(machine.shared));
    block.running = threads;
    block.meeting = {threads, 0, 0};
    block.warps.resize(static_cast<size_t>((threads + 31) / 32));
    for (Warp& warp : block.warps) warp.meeting = {32, 0, 0};
    if (threads % 32 != 0) fail("a CTA is not a whole number of warps");
    for (int i = 0; i < threads; ++i) {
      auto thread = std::make_unique<Thread>();
      const size_t slot = machine.threads.size();
      if (slot == machine.stacks.size()) {
        void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) fail("no memory for a stack");
        machine.stacks.push_back(static_cast<char*>(stack));
      }
      thread->stack = machine.stacks[slot];
#if SIMT_ASAN
      ASAN_UNPOISON_MEMORY_REGION(thread->stack, kStack);
#endif
      thread->index = {static_cast<unsigned>(i), 0, 0};
      thread->block = &block;
      make_context(thread->context, thread->stack, fiber);
      machine.threads.push_back(std::move(thread));
    }
  }
  // Warps take turns in a shuffled order. Half of the time a warp goes on for as long as it can before the next one's
  // turn, which drives warps as far apart as the barriers let them; else it stops at its first meeting.
  std::vector<std::vector<Thread*>> warps(machine.threads.size() / 32);
  for (size_t i = 0; i < machine.threads.size(); ++i) warps[i / 32].push_back(machine.threads[i].get());
  const bool greedy = machine.random() % 2 == 0;
  size_t alive = machine.threads.size();
  while (alive > 0) {
    std::shuffle(warps.begin(), warps.end(), machine.random);
    const size_t before = alive;
    bool moved = false;
    for (auto& warp : warps) {
      while (turn(warp, alive)) {
        moved = true;
        if (!greedy) break;
      }
    }
    if (!moved && before == alive) fail("deadlock: some threads wait where others never come");
  }
  for (Block& block : machine.blocks) {
#if SIMT_ASAN
    ASAN_UNPOISON_MEMORY_REGION(block.shared, static_cast<size_t>(machine.shared));
#endif
    free(block.shared);
  }
}

}  // namespace

Device device;
Plant plant;

void seed(uint64_t value) { machine.random.seed(value); }

void run(const Shape& grid, int threads, int cluster, int64_t shared, const std::function<void()>& kernel) {
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535) fail("bad grid");
  if (grid.x % cluster != 0) fail("the grid is not a whole number of clusters");
  if (cluster > device.largest_cluster) fail("this device has no such cluster");
  if (shared > device.shared) fail("more shared memory than the device has");
  if (threads > 1024) fail("too many threads");
  machine.grid = {static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)};
  machine.block = {static_cast<unsigned>(threads), 1, 1};
  machine.shared = shared;
  machine.kernel = &kernel;
  ++machine.launch;
  std::vector<int64_t> order;
  const int64_t along_x = grid.x / cluster;
  for (int64_t i = 0; i < along_x * grid.y * grid.z; ++i) order.push_back(i);
  std::shuffle(order.begin(), order.end(), machine.random);
  for (const int64_t i : order)
    run_cluster(i % along_x * cluster, static_cast<int>(i / along_x % grid.y), static_cast<int>(i / along_x / grid.y),
                threads, cluster);
}

const dim3& thread_index() { return current->index; }
const dim3& block_index() { return current->block->index; }
const dim3& block_size() { return machine.block; }
const dim3& grid_size() { return machine.grid; }
char* shared_memory() { return current->block->shared; }
bool planted(int& met, int fault) {
  const bool here = plant.launch < 0 || plant.launch == machine.launch;
  return met++ == fault && here;
}
void block_barrier() {
  if (!planted(current->block_barriers, plant.block_barrier)) arrive(current->block->meeting);
}
int block_any(int mine) {
  Block& block = *current->block;
  int& any = block.any[block.meeting.phase % 2];
  if (block.meeting.arrived == 0) any = 0;
  any |= mine != 0;
  arrive(block.meeting);
  return any;
}
void cluster_barrier() {
  if (!planted(current->cluster_barriers, plant.cluster_barrier)) arrive(machine.cluster);
}
void warp_barrier() { meet("warp barrier", nullptr, 0); }
int cluster_rank() { return current->block->rank; }

char* shared_of_rank(const void* p, int rank) {
  const int64_t offset = static_cast<const char*>(p) - current->block->shared;
  if (offset < 0 || offset >= machine.shared) fail("not an address in this CTA's shared memory");
  if (machine.cluster.phase == 0) fail("another CTA's shared memory touched before a barrier told that it has started");
  if (rank < 0 || rank >= static_cast<int>(machine.blocks.size())) fail("no such rank in the cluster");
  return machine.blocks[static_cast<size_t>(rank)].shared + offset;
}

const char* meet(const char* what, const void* mine, int bytes) {
  Warp& warp = current->block->warps[current->index.x / 32];
  char* deposits = warp.deposits.data() + warp.meeting.phase % 2 * 32 * kDeposit;
  if (warp.meeting.arrived == 0) warp.what = what;
  if (strcmp(warp.what, what) != 0) fail("lanes of one warp met in different instructions:", what);
  if (bytes > kDeposit) fail("too large a deposit");
  if (bytes > 0) memcpy(deposits + lane() * kDeposit, mine, static_cast<size_t>(bytes));
  arrive(warp.meeting);
  return deposits;
}

void copy_async(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % 16 != 0 || (valid && reinterpret_cast<uintptr_t>(from) % 16 != 0))
    fail("a misaligned asynchronous copy");
  Copy copy{static_cast<char*>(to), static_cast<const char*>(from), valid, {}, machine.random() % 2 == 0};
  if (valid) memcpy(copy.early, from, 16);
  memset(to, 0xff, 16);
  current->uncommitted.push_back(copy);
}

void copy_commit() {
  current->groups.push_back(std::move(current->uncommitted));
  current->uncommitted.clear();
}

void copy_wait(int pending) {
  if (planted(current->copy_waits, plant.copy_wait)) return;
  while (static_cast<int>(current->groups.size()) > pending) {
    for (const Copy& copy : current->groups.front()) {
      if (copy.valid) {
        memcpy(copy.to, copy.use_early ? copy.early : copy.from, 16);
      } else {
        memset(copy.to, 0, 16);
      }
    }
    current->groups.pop_front();
  }
}

}  // namespace simt
