// The state of the simulated device, which its scheduler (cuda_host.cpp) and what moves data without its threads
// (moves.cpp) share.
#pragma once
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>

#include "cuda_host.h"
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simt {

[[noreturn]] void fail(const char* why, const char* detail = "");

#if defined(__x86_64__)
struct Context {
  void* stack_pointer = nullptr;
};
#else
struct Context {
  ucontext_t context;
};
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

struct Cluster;

struct Block {
  Cluster* cluster = nullptr;
  dim3 index;
  int rank = 0;
  char* shared = nullptr;
  int running = 0;
  Meeting meeting, some_threads[4];  // of all, and of those that meet at a barrier of that number
  bool any[2] = {false, false};
  std::vector<Warp> warps;
};

struct Copy {
  char* to;
  const char* from;
  bool valid;
  char early[16];  // the source as it was when issued: the hardware may read then or later
  bool use_early;
};

// An mbarrier: a phase is over when all its threads have arrived and as many bytes as they expected.
struct Counter {
  int threads = 1, arrived = 0;
  int64_t missing = 0;  // bytes expected and not arrived; below 0 where they came before they were expected
  uint64_t phase = 0;
};

// What is on its way to a CTA's shared memory, or the arrival of a thread's copies there.
struct Move {
  Block* block;
  std::function<void()> land;
  Counter* counter;
  int bytes;          // that it counts
  bool arrives;       // as a thread does
  bool load = false;  // from global memory
};

// Bytes on their way out of shared memory, read when issued or when the thread waits.
struct BulkStore {
  char* to;
  const char* from;
  int bytes;
  bool early;
};

struct Thread {
  Context context;
  char* stack = nullptr;
  void* fake_stack = nullptr;
  dim3 index;
  Block* block = nullptr;
  Meeting* waits = nullptr;
  uint64_t waits_for = 0;
  const Counter* gate = nullptr;  // waits for its phase of this parity to be over
  uint64_t parity = 0;
  bool done = false;
  int64_t cluster_phase = -1;  // of the barrier that it has arrived at and not waited for; -1: none, or left out
  int block_barriers = 0, cluster_barriers = 0, copy_waits = 0, arrival_waits = 0, warp_barriers = 0;  // met so far
  std::vector<Copy> uncommitted;
  std::deque<std::vector<Copy>> groups;
  std::vector<BulkStore> bulk_stores;

  bool blocked() const {
    return done || (waits != nullptr && waits->phase == waits_for) || (gate != nullptr && gate->phase % 2 == parity);
  }
};

struct Cluster {
  Meeting meeting;
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<std::vector<Thread*>> warps;
  size_t alive = 0;
  bool greedy = false;
  bool ragged = false;         // a warp's lanes go on when they like
  bool late_moves = false;     // what is on its way arrives when nobody can go on without it
  bool late_loads = false;     // of what is on its way, loads from global memory arrive last
  const Warp* lazy = nullptr;  // goes on when nobody else can
  std::map<const void*, Counter> counters;
  std::vector<Move> under_way;
  std::vector<std::function<void()>> late;  // stores that were not waited for: read when the cluster has ended
};

struct Machine {
  Context scheduler;
  void* fake_stack = nullptr;
  const void* stack_bottom = nullptr;
  size_t stack_size = 0;
  dim3 grid, block;
  int64_t shared = 0;
  int launch = -1;  // launches so far, this one not counted
  std::vector<char*> free_stacks;
  const std::function<void()>* kernel = nullptr;
  std::mt19937_64 random{1};
};
extern Machine machine;
extern Thread* current;

void to_scheduler(bool for_good);
// Whether the fault of that number is the one to plant here; counts what was met.
bool planted(int& met, int fault);

// Lets one move arrive, whichever; false where none is under way.
bool arrive_one(Cluster& cluster);
// What no CTA may leave behind.
void check_moves_of(const Thread& thread);
void check_moves_to(const Block& block);

}  // namespace simt
