// Rows of many adapters: the rows are put in order by adapter, and each adapter's run of them goes through the same
// loops, block by block, as rows of its own would.
#include "forward.h"

namespace fastreft {

namespace {

// Weights of one adapter, as Packed takes them.
Weights weights_of(const Pool& pool, const int32_t* entry, int64_t d) {
  const int64_t first = entry[0], r = entry[1];
  const auto form = static_cast<Form>(entry[3]);
  auto at = [&](const Weight& of, int64_t place) {
    return of.p ? Weight{static_cast<const char*>(of.p) + place * size_of(of.type), of.type} : Weight{};
  };
  Weights w;
  w.U = at(pool.U, first * d);
  if (form != Form::constant) w.V = at(pool.A, first * d);
  if (form == Form::apart) w.P = at(pool.A, (first + r) * d);
  w.b = at(pool.b, first);
  w.c = at(pool.c, first);
  w.act = static_cast<Act>(entry[2]);
  return w;
}

void check_entry(const Pool& pool, int64_t adapter, const int32_t* entry) {
  const int64_t vectors = int64_t{entry[1]} * (static_cast<Form>(entry[3]) == Form::apart ? 2 : 1);
  const bool known = entry[2] >= 0 && entry[2] < static_cast<int32_t>(Act::count) && entry[3] >= 0 && entry[3] <= 2;
  if (!known || entry[0] < 0 || entry[1] < 0 || entry[0] + vectors > pool.vectors)
    throw std::out_of_range("table: the vectors of adapter " + std::to_string(adapter) + " are not in the pool");
}

struct Run {  // places [from, to) of one adapter
  int64_t from, to;
  const int32_t* entry;
};

template <typename C>
void pooled(const PooledArgs& args, ParallelFor run, const CpuKernels& k) {
  const int64_t e = size_of(args.type);
  std::vector<int64_t> places = edited_slots(args.index, args.n, args.total);
  auto entry_of = [&](int64_t place) -> const int32_t* {
    const int64_t adapter = args.adapter[place];
    if (adapter < 0) return nullptr;
    if (adapter >= args.pool.adapters)
      throw std::out_of_range("adapters: there is no adapter " + std::to_string(adapter) + " in a pool of " +
                              std::to_string(args.pool.adapters));
    const int32_t* entry = args.pool.table + 4 * adapter;
    check_entry(args.pool, adapter, entry);
    return entry[1] > 0 ? entry : nullptr;
  };
  places.erase(std::remove_if(places.begin(), places.end(), [&](int64_t place) { return !entry_of(place); }),
               places.end());
  std::stable_sort(places.begin(), places.end(),
                   [&](int64_t a, int64_t b) { return args.adapter[a] < args.adapter[b]; });

  std::vector<Packed> packed;     // of each adapter
  std::vector<Run> runs;          // blocks of at most kBlock rows
  std::vector<size_t> packed_of;  // the adapter of each
  int64_t memory = 1, rank = 1;
  for (int64_t from = 0; from < static_cast<int64_t>(places.size());) {
    const int64_t adapter = args.adapter[places[from]];
    const int32_t* entry = args.pool.table + 4 * adapter;
    int64_t to = from;
    while (to < static_cast<int64_t>(places.size()) && args.adapter[places[to]] == adapter) ++to;
    packed.emplace_back(weights_of(args.pool, entry, args.d), args.type, entry[1], args.d, k, false);
    rank = std::max<int64_t>(rank, entry[1]);
    memory = std::max<int64_t>(memory, packed.back().projections);
    for (; from < to; from += kBlock) {
      runs.push_back({from, std::min(from + kBlock, to), entry});
      packed_of.push_back(packed.size() - 1);
    }
    from = to;
  }
  const int64_t grain = std::max<int64_t>(1, kGrainOperations / (kBlock * args.d * (memory + rank)));
  parallel(run, runs.size(), grain, [&](int64_t first, int64_t last) {
    Scratch own = scratch(kBlock * (memory + rank) * sizeof(C));
    C* projected = reinterpret_cast<C*>(own.get());
    const void* src[kBlock];
    void* dst[kBlock];
    for (int64_t i = first; i < last; ++i) {
      const Run& some = runs[i];
      for (int64_t place = some.from; place < some.to; ++place)
        src[place - some.from] = dst[place - some.from] = row_address(args.h, args.index[places[place]], e);
      edit_block<C>(packed[packed_of[i]], static_cast<Act>(some.entry[2]), src, dst,
                    static_cast<int>(some.to - some.from), false, projected, projected + kBlock * memory,
                    [](int) -> C* { return nullptr; });
    }
  });
}

}  // namespace

void edit_pooled_cpu(const PooledArgs& args, ParallelFor parallel_for) {
  if (args.d <= 0) return;
  if (args.type == DType::f64) pooled<double>(args, parallel_for, cpu_kernels());
  else pooled<float>(args, parallel_for, cpu_kernels());
}

}  // namespace fastreft
