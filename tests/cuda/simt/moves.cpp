// What moves data without its threads in cuda_host.h: asynchronous copies, and sends between the CTAs of a cluster.
#include "machine.h"

namespace simt {
namespace {

Counter& counter_at(const void* a, Block& block) {
  const auto found = block.cluster->counters.find(a);
  if (found == block.cluster->counters.end()) fail("no arrivals_init of these arrivals");
  return found->second;
}

void end_phase_if_all_came(Counter& counter) {
  if (!counter.armed || counter.missing != 0) return;
  counter.armed = false;
  ++counter.phase;
}

}  // namespace

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

void check_moves_of(const Thread& thread) {
  bool open = !thread.uncommitted.empty();
  for (const auto& group : thread.groups) open = open || !group.empty();
  if (open) fail("a thread ended with asynchronous copies on their way");
}

void arrivals_init(const void* a) {
  if (shared_of_own(a) % 8 != 0) fail("misaligned arrivals");
  if (!current->block->cluster->counters.emplace(a, Counter{}).second) fail("arrivals were initialised twice");
}

void arrivals_expect(const void* a, int bytes) {
  shared_of_own(a);
  Counter& counter = counter_at(a, *current->block);
  if (counter.armed) fail("a phase was to expect bytes twice");
  counter.armed = true;
  counter.missing += bytes;
  if (counter.missing >= 1 << 20) fail("more bytes than an mbarrier counts");
  end_phase_if_all_came(counter);
}

void arrivals_wait(const void* a, int parity) {
  shared_of_own(a);
  if (planted(current->arrival_waits, plant.arrival_wait)) return;
  current->gate = &counter_at(a, *current->block);
  current->parity = static_cast<uint64_t>(parity);
  if (current->blocked()) to_scheduler(false);
  current->gate = nullptr;
}

// Between a send and its arrival nobody may count on what lies there: neither the old nor the new.
void send(void* to, const void* bytes, const void* a, int rank) {
  char* there = shared_of_rank(to, rank);
  if (reinterpret_cast<uintptr_t>(there) % 16 != 0) fail("a misaligned send");
  Cluster& cluster = *current->block->cluster;
  Block& block = cluster.blocks[static_cast<size_t>(rank)];
  if (block.running == 0) fail("a send to a CTA that has ended");
  Send sent{&block, there, {}, &counter_at(shared_of_rank(a, rank), block)};
  memcpy(sent.bytes, bytes, 16);
  memset(there, 0xff, 16);
  cluster.under_way.push_back(sent);
  if (machine.random() % 2 == 0) arrive_one(cluster);
}

bool arrive_one(Cluster& cluster) {
  if (cluster.under_way.empty()) return false;
  std::swap(cluster.under_way[machine.random() % cluster.under_way.size()], cluster.under_way.back());
  const Send sent = cluster.under_way.back();
  cluster.under_way.pop_back();
  memcpy(sent.to, sent.bytes, 16);
  sent.counter->missing -= 16;
  end_phase_if_all_came(*sent.counter);
  return true;
}

void check_moves_to(const Block& block) {
  for (const Send& sent : block.cluster->under_way)
    if (sent.block == &block) fail("a CTA ended before what was sent to it had arrived");
}

}  // namespace simt
