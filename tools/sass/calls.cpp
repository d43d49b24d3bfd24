// Which kernels an edit, its backward, one with a pool or an optimizer step launches on a device, and with which
// arguments: the host code of csrc/cuda itself is run, with a launch that writes down what it was given. A line a
// launch:
//     <the recorder's signature, which names the kernel> | grid x y z threads cluster shared |
//     rows bytes tiles groups pieces | <the arguments' bytes, hex>
// where a tile is `rows` rows and moves `bytes` bytes between a CTA and global memory, and `groups` clusters or CTAs
// share the `tiles`, each in so many `pieces` one after the other; all 0 but pieces for a kernel without tiles.
// Addresses are made up; what is asked for and how large it is comes from the command line (calls.py).
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "edit_args.h"
#include "launch.h"

namespace fastreft {
namespace {

Device described;

template <typename Arg>
void append(std::vector<unsigned char>& bytes, const Arg& arg) {
  bytes.resize((bytes.size() + alignof(Arg) - 1) / alignof(Arg) * alignof(Arg));
  const auto* from = reinterpret_cast<const unsigned char*>(&arg);
  bytes.insert(bytes.end(), from, from + sizeof(Arg));
}

struct Tiles {
  int64_t rows = 0, bytes = 0, tiles = 0, groups = 0, pieces = 1, sets = 0;
};
Tiles tiles_of(const Fused& f) {
  const FusedShape& shape = f.shape;
  const int moved = 1 + shape.second + (f.pass.out.p != nullptr);
  const int64_t columns = int64_t{shape.width} * shape.pieces;
  const int64_t bytes = 2 * shape.rows * (columns < f.pass.d ? columns : f.pass.d) * moved;
  return {shape.rows, bytes, f.tiles, f.clusters, shape.pieces, shape.pieces > 1 ? 0 : f.at.sets};
}
Tiles tiles_of(const Both& both) { return tiles_of(both.f); }
Tiles tiles_of(const Gradient& s) {
  const int depth = both_depth(padded_rank(s.r));
  // A row's coordinates are read once from memory, and by the other CTAs with columns of that row from L2.
  const int columns = sums_columns(depth, s.three), pitch = packed_pitch(depth, packed_parts(depth, s.three));
  const int of_a_row = 2 * columns + static_cast<int>(ceil_div(pitch, ceil_div(s.d, columns)));
  return {kSumsRows, int64_t{2} * kSumsRows * of_a_row, ceil_div(s.n, kSumsRows), s.splits};
}
template <typename Arg>
Tiles tiles_of(const Arg&) {
  return {};
}

template <auto Kernel, typename First, typename... Args>
int recorded(const Grid& grid, void*, const First& first, const Args&... args) {
  const auto wide = [](int64_t x) { return static_cast<long long>(x); };
  printf("%s | %lld %d %d %d %d %lld | ", __PRETTY_FUNCTION__, wide(grid.x), grid.y, grid.z, grid.threads, grid.cluster,
         wide(grid.shared));
  const Tiles t = tiles_of(first);
  printf("%lld %lld %lld %lld %lld %lld | ", wide(t.rows), wide(t.bytes), wide(t.tiles), wide(t.groups), wide(t.pieces),
         wide(t.sets));
  std::vector<unsigned char> bytes;
  append(bytes, first);
  (append(bytes, args), ...);
  for (const unsigned char byte : bytes) printf("%02x", byte);
  puts("");
  return 0;
}

// A made-up address, 4 GB from the one before it.
uint64_t last_place = 0x7f0000000000;
template <typename T = void>
T* somewhere() {
  last_place += uint64_t{1} << 32;
  return reinterpret_cast<T*>(last_place);
}

}  // namespace

int current_device(Device& device) {
  device = described;
  return 0;
}

}  // namespace fastreft

#define launch recorded
FASTREFT_UNITS  // #include of every unit of csrc/cuda that launches

    using namespace fastreft;

int main(int count, char** words) {
  std::vector<int64_t> number;
  for (int i = 2; i < count; ++i) number.push_back(atoll(words[i]));
  const std::string what = words[1];
  size_t at = 0;
  const auto next = [&] { return number.at(at++); };
  described.major = static_cast<int>(next());
  described.minor = static_cast<int>(next());
  described.multiprocessors = static_cast<int>(next());
  described.shared = next();
  described.largest_cluster = static_cast<int>(next());
  described.asked = described.largest_cluster > 1;
  for (auto& per_sm : described.resident)
    for (int c = 1; c <= 16; ++c) per_sm[c] = static_cast<int>(next());
  const int64_t n = next(), total = next(), d = next(), r = next();  // a step: n items of r x d
  const bool listed = next(), kept = next(), dh = next();
  const int64_t* index = listed ? somewhere<int64_t>() : nullptr;
  const bool pooled = what == "pooled";
  const int64_t* adapter = pooled ? somewhere<int64_t>() : nullptr;
  const int32_t* table = pooled ? somewhere<int32_t>() : nullptr;
  const auto place = [](const void* at) { return reinterpret_cast<unsigned long long>(at); };
  printf("index %llu %llu %llu\n", place(index), place(adapter), place(table));
  const Weight U{somewhere()}, V{somewhere()}, b{somewhere()};
  const Rows state{somewhere(), 1, d, 0}, other{somewhere(), 1, d, 0}, saved{somewhere(), 1, d, 0};
  const auto fill = [&](auto& args) {
    args.n = n;
    args.total = total;
    args.d = d;
    args.r = r;
    args.type = DType::bf16;
    args.index = index;
    args.w.U = args.w.P = U;
    args.w.V = V;
    args.w.b = b;
    args.w.tied = true;
  };
  if (what == "forward") {
    EditArgs args;
    fill(args);
    args.h = state;
    args.out = listed ? state : other;
    if (kept) args.z = somewhere();
    if (kept && listed) args.saved = saved.p;
    return edit_forward_cuda(args);
  }
  if (what == "backward") {
    EditGradArgs args;
    fill(args);
    args.g = state;
    if (dh) args.dh = other;
    args.h = listed ? saved : Rows{somewhere(), 1, d, 0};
    args.z = somewhere();
    args.dU = somewhere();
    args.dV = somewhere();
    args.db = somewhere();
    args.scratch = somewhere();
    return edit_backward_cuda(args);
  }
  if (pooled) {
    PooledArgs args;
    args.n = n;
    args.total = total;
    args.d = d;
    args.type = DType::bf16;
    args.h = state;
    args.index = index;
    args.adapter = adapter;
    args.pool.A = V;
    args.pool.U = U;
    args.pool.b = b;
    args.pool.table = table;
    args.pool.adapters = 1024;  // of one rank
    args.pool.vectors = args.pool.adapters * r;
    args.most_r = r;
    return edit_pooled_cuda(args);
  }
  // As ReftAdamW steps: all rotations before all other parameters.
  std::vector<StepItem> items;
  const auto item = [](int64_t rows, int64_t columns, bool orthonormal) {
    StepItem made;
    made.param = {somewhere(), rows, columns, DType::f32};
    made.g = somewhere();
    made.m = somewhere();
    made.v = somewhere();
    made.orthonormal = orthonormal;
    return made;
  };
  for (int64_t i = 0; i < n; ++i) items.push_back(item(r, d, true));
  for (int64_t i = 0; i < n; ++i) {
    items.push_back(item(r, d, false));
    items.push_back(item(1, r, false));
  }
  StepArgs step;
  step.lr = 1e-3;
  return adamw_step_cuda(items.data(), static_cast<int>(items.size()), step, somewhere(), nullptr);
}
