// The sums over rows that the weights' gradients are made of, on tensor cores, for ranks and widths whose sums one
// pass (edit_both.cuh) cannot keep in registers:
//     sums[0] = z^T g      sums[1] = gp^T h      sums[2] = gz^T h         each (r, d), absent ones not computed
//
// A CTA of 8 warps owns 128 columns and one range of rows; a warp owns 16 of the columns and all coordinates. Tiles of
// 32 rows of g and h and of their coordinates (written in T by the pass before) are copied asynchronously, three or
// four stages ahead. Each CTA leaves one partial sum; finish_kernel adds those in order.
#pragma once
#include "edit_tile.cuh"

namespace fastreft {

template <typename T, int Depth>
__device__ __forceinline__ void store_one_sum(const Gradient& p, const float (&sum)[Depth / 16][2][4], int which,
                                              int64_t column) {
  if (p.slot[which] < 0) return;
  float* to = static_cast<float*>(p.partial) +
              (static_cast<int64_t>(blockIdx.y) * p.slots + p.slot[which]) * p.r * static_cast<int64_t>(p.d);
  store_sums<Depth, 1>(to, sum, p.r, p.d, 16, column);
}

template <typename T, int Depth>
__global__ void __launch_bounds__(kFusedThreads, sums_compiled_per_sm(Depth))
    sums_kernel(const __grid_constant__ Gradient p) {
  constexpr SumsLayout at = sums_layout(Depth);
  constexpr int Stages = sums_stages(Depth);
  T* stages = reinterpret_cast<T*>(shared_memory());
  const int thread = threadIdx.x, warp = thread / 32;
  const int64_t block = static_cast<int64_t>(blockIdx.x) * kSumsColumns, column = block + warp * 16;
  const int64_t begin = blockIdx.y * p.range, end = begin + p.range < p.n ? begin + p.range : p.n;
  const bool wants_g = p.slot[0] >= 0, wants_h = p.slot[1] >= 0 || p.slot[2] >= 0;
  const T* coordinates = static_cast<const T*>(p.coordinates);

  const auto fetch = [&](int64_t i0, int stage) {
    T* g = stages + stage * at.stage;
    if (i0 < end) {
      for (int e = thread; e < kSumsRows * kSumsColumns / 8; e += kFusedThreads) {
        const int m = e / (kSumsColumns / 8), j = e % (kSumsColumns / 8) * 8;
        const int64_t row = listed_row(p.index, i0 + m, end, p.total);
        const bool valid = row >= 0 && block + j < p.d;
        T* to = g + m * at.pitch + j;
        if (wants_g)
          copy_async(to, static_cast<const T*>(p.g.p) + (valid ? row_offset(p.g, row) + block + j : 0), valid);
        if (wants_h)
          copy_async(to + at.h, static_cast<const T*>(p.h.p) + (valid ? row_offset(p.h, i0 + m) + block + j : 0),
                     valid);
      }
      for (int e = thread; e < kSumsRows * 3 * Depth / 8; e += kFusedThreads) {
        const int m = e / (3 * Depth / 8), k = e % (3 * Depth / 8) * 8;
        const bool valid = i0 + m < end;
        copy_async(g + at.coordinates + m * at.coordinate_pitch + k,
                   coordinates + (valid ? (i0 + m) * 3 * Depth + k : 0), valid);
      }
    }
    copy_commit();
  };
  for (int stage = 0; stage < Stages; ++stage) fetch(begin + stage * kSumsRows, stage);

  float sum[3][Depth / 16][2][4] = {};
  float vector = 0;  // first column block, thread k < 2 Depth: sum gp, sum gz
  int stage = 0;
  for (int64_t i0 = begin; i0 < end; i0 += kSumsRows) {
    copy_wait<Stages - 1>();
    __syncthreads();
    const T* g = stages + stage * at.stage;
    const T* z = g + at.coordinates;
#pragma unroll
    for (int m = 0; m < kSumsRows; m += 16) {
      const T* tile = g + m * at.pitch + warp * 16;
      const T* row = z + m * at.coordinate_pitch;
      if (p.slot[0] >= 0) add_products<T, Depth, 1>(sum[0], row, at.coordinate_pitch, tile, at.pitch, 16);
      if (p.slot[1] >= 0)
        add_products<T, Depth, 1>(sum[1], row + Depth, at.coordinate_pitch, tile + at.h, at.pitch, 16);
      if (p.slot[2] >= 0)
        add_products<T, Depth, 1>(sum[2], row + 2 * Depth, at.coordinate_pitch, tile + at.h, at.pitch, 16);
    }
    if (blockIdx.x == 0 && thread < 2 * Depth) {
      for (int m = 0; m < kSumsRows; ++m) vector += to_float(z[m * at.coordinate_pitch + Depth + thread]);
    }
    __syncthreads();  // everybody has read this stage
    fetch(i0 + Stages * kSumsRows, stage);
    stage = stage + 1 < Stages ? stage + 1 : 0;
  }
  copy_wait<0>();
#pragma unroll
  for (int which = 0; which < 3; ++which) store_one_sum<T, Depth>(p, sum[which], which, column);
  if (blockIdx.x == 0 && thread < 2 * Depth && thread % Depth < p.r)
    static_cast<float*>(p.vectors)[(blockIdx.y * 2 + thread / Depth) * p.r + thread % Depth] = vector;
}

}  // namespace fastreft
