// What moves data without its threads in cuda_host.h: asynchronous copies, bulk copies, and sends between the CTAs of a
// cluster.
#include "machine.h"

namespace simt {
namespace {

Counter& counter_at(const void* a, Block& block) {
  const auto found = block.cluster->counters.find(a);
  if (found == block.cluster->counters.end()) fail("no arrivals_init of these arrivals");
  return found->second;
}

void end_phase_if_all_came(Counter& counter) {
  if (counter.arrived < counter.threads || counter.missing != 0) return;
  counter.arrived = 0;
  ++counter.phase;
}

void arrive_at(Counter& counter) {
  if (++counter.arrived > counter.threads) fail("more threads arrived in a phase than were to");
  end_phase_if_all_came(counter);
}

void land(const Copy& copy) {
  if (copy.valid) {
    memcpy(copy.to, copy.use_early ? copy.early : copy.from, 16);
  } else {
    memset(copy.to, 0, 16);
  }
}

void store(const BulkStore& bulk) { memcpy(bulk.to, bulk.from, static_cast<size_t>(bulk.bytes)); }

void set_out(const Move& move) {
  move.block->cluster->under_way.push_back(move);
  Cluster& cluster = *move.block->cluster;
  if (!cluster.late_moves && machine.random() % 2 == 0) arrive_one(cluster);
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
    for (const Copy& copy : current->groups.front()) land(copy);
    current->groups.pop_front();
  }
}

void check_moves_of(const Thread& thread) {
  bool open = !thread.uncommitted.empty();
  for (const auto& group : thread.groups) open = open || !group.empty();
  if (open) fail("a thread ended with asynchronous copies on their way");
  if (!thread.bulk_stores.empty()) fail("a thread ended before what it stores had been read");
}

void arrivals_init(const void* a, int threads) {
  if (shared_of_own(a) % 8 != 0) fail("misaligned arrivals");
  Counter counter;
  counter.threads = threads;
  if (!current->block->cluster->counters.emplace(a, counter).second) fail("arrivals were initialised twice");
}

void arrivals_expect(const void* a, int bytes) {
  shared_of_own(a);
  Counter& counter = counter_at(a, *current->block);
  counter.missing += bytes;
  if (counter.missing >= 1 << 20) fail("more bytes than an mbarrier counts");
  arrive_at(counter);
}

void arrive(const void* a) {
  shared_of_own(a);
  arrive_at(counter_at(a, *current->block));
}

// All that this thread has copied lands at some time, and then it arrives.
void arrive_when_copied(const void* a) {
  shared_of_own(a);
  std::vector<Copy> copies;
  copy_commit();
  for (auto& group : current->groups) copies.insert(copies.end(), group.begin(), group.end());
  current->groups.clear();
  Block& block = *current->block;
  set_out({&block,
           [copies] {
             for (const Copy& copy : copies) land(copy);
           },
           &counter_at(a, block), 0, true, true});
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
  Cluster& cluster = *current->block->cluster;
  if (cluster.blocks.size() == 1) fail("a send in a launch without clusters: an illegal instruction");
  char* there = shared_of_rank(to, rank);
  if (reinterpret_cast<uintptr_t>(there) % 16 != 0) fail("a misaligned send");
  Block& block = cluster.blocks[static_cast<size_t>(rank)];
  if (block.running == 0) fail("a send to a CTA that has ended");
  const std::vector<char> sent(static_cast<const char*>(bytes), static_cast<const char*>(bytes) + 16);
  memset(there, 0xff, 16);
  const auto land = [there, sent] { memcpy(there, sent.data(), 16); };
  set_out({&block, land, &counter_at(shared_of_rank(a, rank), block), 16, false});
  // What comes next may come later: threads change places at barriers and waits only, and here.
  if (machine.random() % 8 == 0) to_scheduler(false);
}

void check_bulk(const void* shared, const void* global, int bytes) {
  const int64_t offset = shared_of_own(shared);
  if (bytes <= 0 || bytes % 16 != 0) fail("a bulk copy of other than whole 16 bytes");
  if (offset % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) fail("a misaligned bulk copy");
  if (offset + bytes > machine.shared) fail("a bulk copy past the end of shared memory");
}

void bulk_load(void* to, const void* from, int bytes, const void* a) {
  check_bulk(to, from, bytes);
  const auto size = static_cast<size_t>(bytes);
  const bool early = machine.random() % 2 == 0;  // the source as it was when issued, or as it is when it arrives
  const std::vector<char> then(static_cast<const char*>(from), static_cast<const char*>(from) + bytes);
  memset(to, 0xff, size);
  const auto land = [=] { memcpy(to, early ? then.data() : from, size); };
  Block& block = *current->block;
  set_out({&block, land, &counter_at(a, block), bytes, false, true});
}

void bulk_store(void* to, const void* from, int bytes) {
  check_bulk(from, to, bytes);
  const BulkStore bulk{static_cast<char*>(to), static_cast<const char*>(from), bytes, machine.random() % 2 == 0};
  if (bulk.early) store(bulk);
  current->bulk_stores.push_back(bulk);
}

// What was not read at once is read now; where the wait is left out, when the cluster has ended.
void bulk_wait() {
  std::vector<BulkStore> stores;
  stores.swap(current->bulk_stores);
  const auto read = [stores] {
    for (const BulkStore& bulk : stores)
      if (!bulk.early) store(bulk);
  };
  if (planted(current->copy_waits, plant.copy_wait)) {
    current->block->cluster->late.push_back(read);
  } else {
    read();
  }
}

bool arrive_one(Cluster& cluster) {
  std::vector<Move>& moves = cluster.under_way;
  if (moves.empty()) return false;
  const auto loads =
      std::partition(moves.begin(), moves.end(), [&](const Move& m) { return !(m.load && cluster.late_loads); });
  const auto choices = static_cast<size_t>((loads == moves.begin() ? moves.end() : loads) - moves.begin());
  std::swap(moves[machine.random() % choices], moves.back());
  const Move move = moves.back();
  moves.pop_back();
  move.land();
  move.counter->missing -= move.bytes;
  if (move.arrives) {
    arrive_at(*move.counter);
  } else {
    end_phase_if_all_came(*move.counter);
  }
  return true;
}

void check_moves_to(const Block& block) {
  for (const Move& move : block.cluster->under_way)
    if (move.block == &block) fail("a CTA ended before what was sent to it had arrived");
}

}  // namespace simt
