// The scheduler behind cuda_host.h: fibers, meetings and asynchronous copies.
#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "machine.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define SIMT_ASAN 1
#else
#define SIMT_ASAN 0
#endif

namespace simt {

void fail(const char* why, const char* detail) {
  fprintf(stderr, "simt: %s %s\n", why, detail);
  fflush(stderr);
  _Exit(3);
}

namespace {

constexpr size_t kStack = 128 * 1024;

// Switching between fibers. The x86-64 road saves the callee-saved registers by hand: swapcontext makes a system call.
#if defined(__x86_64__)
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
void switch_context(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
void make_context(Context& context, char* stack, void (*entry)()) {
  getcontext(&context.context);
  context.context.uc_stack = {stack, 0, kStack};
  context.context.uc_link = nullptr;
  makecontext(&context.context, entry, 0);
}
#endif

}  // namespace

Machine machine;
Thread* current = nullptr;
Device device;
Plant plant;

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

namespace {

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

// True for the last to come.
bool count(Meeting& meeting) {
  if (++meeting.arrived < meeting.expected) return false;
  meeting.arrived = 0;
  ++meeting.phase;
  return true;
}

void wait(Meeting& meeting, uint64_t phase) {
  if (meeting.phase != phase) return;
  current->waits = &meeting;
  current->waits_for = phase;
  to_scheduler(false);
}

void arrive(Meeting& meeting) {
  const uint64_t phase = meeting.phase;
  if (!count(meeting)) wait(meeting, phase);
}

void end_block(Block& block) {
#if SIMT_ASAN
  ASAN_POISON_MEMORY_REGION(block.shared, static_cast<size_t>(machine.shared));
#else
  (void)block;
#endif
}

// Every lane of a warp that can go on, or of ragged warps some of them, does so until its next meeting; whether any
// can.
bool turn(std::vector<Thread*>& warp, Cluster& cluster) {
  std::shuffle(warp.begin(), warp.end(), machine.random);
  bool moved = false;
  for (Thread* thread : warp) {
    if (thread->blocked()) continue;
    moved = true;
    if (cluster.ragged && machine.random() % 2 == 0) continue;
    thread->waits = nullptr;
    resume(thread);
    if (!thread->done) continue;
    --cluster.alive;
    check_moves_of(*thread);
    if (--thread->block->running == 0) {
      check_moves_to(*thread->block);
      end_block(*thread->block);
    }
  }
  return moved;
}

std::unique_ptr<Cluster> start(int64_t first_x, int y, int z, int threads, int size) {
  auto cluster = std::make_unique<Cluster>();
  cluster->blocks.resize(static_cast<size_t>(size));
  cluster->meeting = {size * threads, 0, 0};
  for (int rank = 0; rank < size; ++rank) {
    Block& block = cluster->blocks[static_cast<size_t>(rank)];
    block.cluster = cluster.get();
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
      if (machine.free_stacks.empty()) {
        void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (stack == MAP_FAILED) fail("no memory for a stack");
        machine.free_stacks.push_back(static_cast<char*>(stack));
      }
      thread->stack = machine.free_stacks.back();
      machine.free_stacks.pop_back();
#if SIMT_ASAN
      ASAN_UNPOISON_MEMORY_REGION(thread->stack, kStack);
#endif
      thread->index = {static_cast<unsigned>(i), 0, 0};
      thread->block = &block;
      make_context(thread->context, thread->stack, fiber);
      if (i % 32 == 0) cluster->warps.emplace_back();
      cluster->warps.back().push_back(thread.get());
      cluster->threads.push_back(std::move(thread));
    }
  }
  cluster->alive = cluster->threads.size();
  // Half of the time a warp goes on for as long as it can before the next one's turn, which drives warps as far apart
  // as the barriers let them; else it stops at its first meeting.
  cluster->greedy = machine.random() % 2 == 0;
  cluster->ragged = machine.random() % 2 == 0;
  cluster->late_moves = machine.random() % 2 == 0;
  cluster->late_loads = machine.random() % 2 == 0;
  // Often one of a planted fault's warps goes on when nobody else can: what the others miss of it, or it of them.
  const int last = std::min(plant.warps[1], threads / 32 - 1), first = std::min(plant.warps[0], last);
  if (machine.random() % 2 == 0) {
    Block& block = cluster->blocks[machine.random() % cluster->blocks.size()];
    cluster->lazy = &block.warps[static_cast<size_t>(first) + machine.random() % static_cast<size_t>(last - first + 1)];
  }
  return cluster;
}

[[noreturn]] void fail_of_deadlock(const Cluster& cluster) {
  for (const auto& thread : cluster.threads) {
    if (thread->done) continue;
    const Block& block = *thread->block;
    const bool of_some =
        thread->waits >= std::begin(block.some_threads) && thread->waits < std::end(block.some_threads);
    const char* at = thread->waits == &block.meeting || of_some ? "a CTA barrier"
                     : thread->waits == &cluster.meeting        ? "a cluster barrier"
                     : thread->gate != nullptr                  ? "what is sent to it"
                                                                : thread->block->warps[thread->index.x / 32].what;
    fprintf(stderr, "CTA %u thread %u of rank %d waits for %s", thread->block->index.x, thread->index.x,
            thread->block->rank, at);
    if (thread->gate != nullptr)
      fprintf(stderr, ": %d of %d threads have arrived and %ld bytes are missing in phase %ld", thread->gate->arrived,
              thread->gate->threads, static_cast<long>(thread->gate->missing), static_cast<long>(thread->gate->phase));
    fputc('\n', stderr);
  }
  fail("deadlock: some threads wait where others never come");
}

// A turn for every warp but a lazy one, in a shuffled order, sends arriving between them.
void go_round(Cluster& cluster) {
  std::shuffle(cluster.warps.begin(), cluster.warps.end(), machine.random);
  const size_t before = cluster.alive;
  bool moved = false;
  std::vector<Thread*>* lazy = nullptr;
  for (auto& warp : cluster.warps) {
    if (&warp.front()->block->warps[warp.front()->index.x / 32] == cluster.lazy) {
      lazy = &warp;
      continue;
    }
    while (turn(warp, cluster)) {
      moved = true;
      if (!cluster.greedy) break;
    }
    if (!cluster.late_moves && machine.random() % 4 == 0 && arrive_one(cluster)) moved = true;
  }
  if (moved || before != cluster.alive) return;
  // Nobody can go on but who was held back: one of them does.
  const bool move_first = machine.random() % 2 == 0;
  if (move_first && arrive_one(cluster)) return;
  if (lazy != nullptr && turn(*lazy, cluster)) return;
  if (!arrive_one(cluster)) fail_of_deadlock(cluster);
}

void end(Cluster& cluster) {
  for (const auto& read : cluster.late) read();
  for (Block& block : cluster.blocks) {
#if SIMT_ASAN
    ASAN_UNPOISON_MEMORY_REGION(block.shared, static_cast<size_t>(machine.shared));
#endif
    free(block.shared);
  }
  for (auto& thread : cluster.threads) machine.free_stacks.push_back(thread->stack);
}

}  // namespace

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
  // One to three clusters are under way at once and take rounds in a shuffled order.
  const size_t at_once = 1 + machine.random() % 3;
  std::vector<std::unique_ptr<Cluster>> running;
  while (!order.empty() || !running.empty()) {
    while (!order.empty() && running.size() < at_once) {
      const int64_t i = order.back();
      order.pop_back();
      running.push_back(start(i % along_x * cluster, static_cast<int>(i / along_x % grid.y),
                              static_cast<int>(i / along_x / grid.y), threads, cluster));
    }
    const size_t which = machine.random() % running.size();
    go_round(*running[which]);
    if (running[which]->alive > 0) continue;
    end(*running[which]);
    running.erase(running.begin() + static_cast<std::ptrdiff_t>(which));
  }
}

const dim3& thread_index() { return current->index; }
const dim3& block_index() { return current->block->index; }
const dim3& block_size() { return machine.block; }
const dim3& grid_size() { return machine.grid; }
char* shared_memory() { return current->block->shared; }
bool planted(int& met, int fault) {
  const bool here = plant.launch < 0 || plant.launch == machine.launch;
  const int warp = static_cast<int>(current->index.x) / 32;
  const bool mine = warp >= plant.warps[0] && warp <= plant.warps[1];
  return met++ == fault && here && mine;
}
void block_barrier() {
  if (!planted(current->block_barriers, plant.block_barrier)) arrive(current->block->meeting);
}
void barrier_of(int barrier, int threads, int from) {
  Meeting& meeting = current->block->some_threads[barrier];
  if (meeting.expected != 0 && meeting.expected != threads) fail("two groups of threads at one barrier");
  const int thread = static_cast<int>(current->index.x);
  if (thread < from || thread >= from + threads) fail("a thread at a barrier that is not for it");
  meeting.expected = threads;
  if (!planted(current->block_barriers, plant.block_barrier)) arrive(meeting);
}
bool any_of(int threads, bool mine) {
  Block& block = *current->block;
  Meeting& meeting = block.some_threads[1];
  if (static_cast<int>(current->index.x) >= threads) fail("a thread at a barrier that is not for it");
  bool& any = block.any[meeting.phase % 2];
  if (meeting.arrived == 0) any = false;
  any = any || mine;
  meeting.expected = threads;
  arrive(meeting);
  return any;
}
void start_barrier(int threads, bool waits) {
  Meeting& meeting = current->block->some_threads[2];
  meeting.expected = threads;
  if (planted(current->cluster_barriers, plant.cluster_barrier)) return;
  if (waits) {
    arrive(meeting);
  } else {
    count(meeting);
  }
}
void cluster_arrive() {
  Meeting& meeting = current->block->cluster->meeting;
  if (current->cluster_phase >= 0) fail("a cluster barrier arrived at twice and not waited for");
  if (planted(current->cluster_barriers, plant.cluster_barrier)) return;
  current->cluster_phase = static_cast<int64_t>(meeting.phase);
  count(meeting);
}
void cluster_wait() {
  const int64_t phase = current->cluster_phase;
  current->cluster_phase = -1;
  if (phase >= 0) wait(current->block->cluster->meeting, static_cast<uint64_t>(phase));
}
void warp_barrier() {
  if (!planted(current->warp_barriers, plant.warp_barrier)) meet("warp barrier", nullptr, 0);
}
int cluster_rank() { return current->block->rank; }

int64_t shared_of_own(const void* p) {
  const int64_t offset = static_cast<const char*>(p) - current->block->shared;
  if (offset < 0 || offset >= machine.shared) fail("not an address in this CTA's shared memory");
  return offset;
}

char* shared_of_rank(const void* p, int rank) {
  const int64_t offset = shared_of_own(p);
  Cluster& cluster = *current->block->cluster;
  const bool alone = cluster.blocks.size() == 1;
  if (!alone && cluster.meeting.phase == 0)
    fail("another CTA's shared memory touched before a barrier told that it has started");
  if (rank < 0 || rank >= static_cast<int>(cluster.blocks.size())) fail("no such rank in the cluster");
  return cluster.blocks[static_cast<size_t>(rank)].shared + offset;
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

}  // namespace simt
