// The sums over rows that the weights' gradients are made of, on tensor cores, for ranks and widths whose sums one
// pass (edit_both.cuh) cannot keep in registers:
//     sums[0] = z^T g      sums[1] = gp^T h      sums[2] = gz^T h         each (r, d), absent ones not computed
//
// A CTA of 8 warps owns 128 Pairs columns and one range of rows; a warp owns 16 Pairs of the columns and all
// coordinates. Two more warps bring tiles of 32 rows as in edit_mover.cuh, one of g and of the coordinates (written in
// T by the pass before), the other of h; nobody else waits for anybody. Each CTA leaves one partial sum; finish_kernel
// adds those in order.
#pragma once
#include "edit_mover.cuh"

namespace fastreft {

// z, gp and gz, as the instance has them: with all three of 64 a CTA has 128 columns.
FASTREFT_HOST_DEVICE constexpr int sum_parts(int depth, int pairs) { return packed_parts(depth, pairs == 1); }

template <typename T, int Depth, int Pairs>
struct SumsMover {
  static constexpr int Parts = sum_parts(Depth, Pairs);
  static constexpr SumsLayout at = sums_layout(Depth, Parts == 3);
  const Gradient& p;
  int64_t block;  // the first column
  int columns;    // there are from it on
  bool brings_h;  // or g and the coordinates
  Arrivals *filled, *edited;

  __device__ __forceinline__ T* stages() const { return reinterpret_cast<T*>(shared_memory()); }
  // By one of the movers.
  __device__ __forceinline__ void begin() const {
    if (elected()) {
      for (int stage = 0; stage < p.stages; ++stage) {
        arrivals_init(filled + stage, has_bulk_copies() ? 2 : 64);
        arrivals_init(edited + stage, kFusedWarps);
      }
      arrivals_init_fence();
    }
  }
  __device__ __forceinline__ void run(int64_t begin, int64_t end) const {
    int stage = 0, phase = 1;
    for (int64_t first = begin; first < end; first += kSumsRows) {
      if (first - begin >= static_cast<int64_t>(p.stages) * kSumsRows) arrivals_wait(edited + stage, phase);
      load(stage, first, end);
      if (++stage == p.stages) {
        stage = 0;
        phase ^= 1;
      }
    }
  }

 private:
  __device__ __forceinline__ void load(int stage, int64_t first, int64_t end) const {
    constexpr int Width = 128 * Pairs, Pitch = packed_pitch(Depth, Parts);
    const bool wanted = brings_h ? p.slot[1] >= 0 || p.slot[2] >= 0 : p.slot[0] >= 0;
    const Rows& rows = brings_h ? p.h : p.g;
    const TileRows where = tile_rows({p.index, end, p.total}, rows, first, kSumsRows, brings_h);
    const int there = end - first < kSumsRows ? static_cast<int>(end - first) : kSumsRows;  // with or without a row
    const T* from = static_cast<const T*>(p.coordinates) + first * Pitch;
    T *to = stages() + stage * at.stage + (brings_h ? at.h : 0), *z = stages() + stage * at.stage + at.coordinates;
    if (!has_bulk_copies()) {
      if (wanted) load_tile(to, rows.p, where, kSumsRows, at.pitch, Width, block, p.d);
      if (!brings_h)
        load_tile(z, from, TileRows{0, Pitch, there, false, -1, -1}, kSumsRows, Pitch, Parts * Depth, 0, Parts * Depth);
      arrive_when_copied(filled + stage);
      return;
    }
    const RowMask mask = rows_there(where, kSumsRows);
    const int bytes = columns * 2, coordinate_bytes = brings_h ? 0 : there * Pitch * 2;
    if (wanted) clear_rest(to, mask, kSumsRows, at.pitch, columns, Width);
    if (!brings_h) {
      for (int e = there * Pitch + threadIdx.x % 32 * 8; e < kSumsRows * Pitch; e += 32 * 8)
        *reinterpret_cast<uint4*>(z + e) = make_uint4(0, 0, 0, 0);
    }
    async_fence();
    __syncwarp();
    if (elected()) {
      arrivals_expect(filled + stage, (wanted ? mask.count() * bytes : 0) + coordinate_bytes);
      if (!brings_h) bulk_load(z, from, coordinate_bytes, filled + stage);
    }
    __syncwarp();
    if (wanted) load_rows(to, rows, where, kSumsRows, at.pitch, block, bytes, filled + stage);
  }
};

template <typename T, int Depth, int Pairs>
__device__ __forceinline__ void store_one_sum(const Gradient& p, const float (&sum)[Depth / 16][2 * Pairs][4],
                                              int which, int64_t column) {
  if (p.slot[which] < 0) return;
  float* to = static_cast<float*>(p.partial) +
              (static_cast<int64_t>(blockIdx.y) * p.slots + p.slot[which]) * p.r * static_cast<int64_t>(p.d);
  store_sums<Depth, Pairs>(to, sum, p.r, p.d, 16 * Pairs, column);
}

template <typename T, int Depth, int Pairs>
__global__ void __launch_bounds__(kSumsThreads, 1) sums_kernel(const __grid_constant__ Gradient p) {
  constexpr int Sums = sum_parts(Depth, Pairs), Pitch = packed_pitch(Depth, Sums);
  constexpr SumsLayout at = sums_layout(Depth, Sums == 3);
  const int thread = threadIdx.x, lane = thread % 32;
  const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);
  const int64_t block = static_cast<int64_t>(blockIdx.x) * 128 * Pairs, column = block + warp * 16 * Pairs;
  const int64_t begin = blockIdx.y * p.range, end = begin + p.range < p.n ? begin + p.range : p.n;
  const T* stages = reinterpret_cast<const T*>(shared_memory());
  Arrivals* filled = reinterpret_cast<Arrivals*>(shared_memory() + static_cast<int64_t>(p.stages) * at.stage * 2);
  Arrivals* edited = filled + p.stages;
  if (warp >= kFusedWarps) {
    const int left = p.d - block < 128 * Pairs ? static_cast<int>(p.d - block) : 128 * Pairs;
    const SumsMover<T, Depth, Pairs> mover{p, block, left, warp > kFusedWarps, filled, edited};
    if (warp == kFusedWarps) mover.begin();
    __syncthreads();
    wait_for_launch_before();
    return mover.run(begin, end);
  }
  __syncthreads();
  wait_for_launch_before();

  float sum[Sums][Depth / 16][2 * Pairs][4] = {};
  float vector = 0;  // first column block, thread k: sum gp, and behind them sum gz
  int stage = 0, phase = 0;
  for (int64_t i0 = begin; i0 < end; i0 += kSumsRows) {
    arrivals_wait(filled + stage, phase);
    const T* g = stages + stage * at.stage;
    const T* z = g + at.coordinates;
#pragma unroll
    for (int m = 0; m < kSumsRows; m += 16) {
      const T* tile = g + m * at.pitch + warp * 16 * Pairs;
      const T* row = z + m * Pitch;
      if (p.slot[0] >= 0) add_products<T, Depth, Pairs>(sum[0], row, Pitch, tile, at.pitch, 16 * Pairs);
      if (p.slot[1] >= 0) add_products<T, Depth, Pairs>(sum[1], row + Depth, Pitch, tile + at.h, at.pitch, 16 * Pairs);
      if constexpr (Sums > 2) {
        if (p.slot[2] >= 0)
          add_products<T, Depth, Pairs>(sum[2], row + 2 * Depth, Pitch, tile + at.h, at.pitch, 16 * Pairs);
      }
    }
    if (blockIdx.x == 0 && thread < (Sums - 1) * Depth) {
      for (int m = 0; m < kSumsRows; ++m) vector += to_float(z[m * Pitch + Depth + thread]);
    }
    __syncwarp();  // all lanes have read this stage
    if (lane == 0) arrive(edited + stage);
    if (++stage == p.stages) {
      stage = 0;
      phase ^= 1;
    }
  }
#pragma unroll
  for (int which = 0; which < Sums; ++which) store_one_sum<T, Depth, Pairs>(p, sum[which], which, column);
  if (blockIdx.x > 0 || thread >= (Sums - 1) * Depth || thread % Depth >= p.r) return;
  float* to = static_cast<float*>(p.vectors) + (blockIdx.y * 2 + thread / Depth) * p.r + thread % Depth;
  to[0] = vector;
  if (Sums == 2) to[p.r] = vector;  // gz is gp, or nobody asks
}

}  // namespace fastreft
