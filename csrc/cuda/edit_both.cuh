// The whole backward of a tile in one pass on tensor cores: g and h read once, dh written once, and the sums over rows
// that the weights' gradients are made of kept in registers for as long as the CTA lives.
//
// The mapping, the exchange of coordinates and the two cluster barriers a tile are those of edit_fused.cuh. On top of
// them, once a tile's coordinates have arrived and before dh overwrites g in shared memory, each warp adds
//     first  (Rank x columns) += z^T g        second (Rank x columns) += gx^T h
// over the tile's rows, where gx stands for gp and gz alike: this road is taken where they are one (act is the
// identity) or where nothing asks for gz. 64 fp32 registers a thread at Rank 16 and slices 512 wide. At the end every
// cluster leaves one partial sum, and finish_kernel (edit_simple.cuh) adds those in order.
#pragma once
#include "edit_cta.cuh"

namespace fastreft {

template <typename T, int Rank>
__global__ void __launch_bounds__(kFusedThreads, 1) both_kernel(const __grid_constant__ Both both) {
  constexpr int Depth = both_depth(Rank), Pairs = kBothColumns / kFusedWarps / 16;
  const Pass& p = both.f.pass;
  const FusedShape& s = both.f.shape;
  if (blockIdx.x >= both.f.clusters * s.cluster)
    return copy_unlisted<T, 8, kFusedThreads>(p, blockIdx.x - both.f.clusters * s.cluster);
  const Cta<T, Rank, 1> cta(p, s, s.cluster > 1 ? cluster_rank() : 0);
  const FusedLayout& at = cta.at;
  T* const coordinates = cta.coordinates;
  const int64_t cluster = blockIdx.x / s.cluster, clusters = both.f.clusters;
  const int64_t slice = static_cast<int64_t>(cta.rank) * s.width, column = cta.column(slice);
  const int kept = p.act == Act::identity ? p.r : 2 * p.r;
  const bool wants_second = both.h.p != nullptr;

  const auto fetch = [&](int64_t tile, int stage) {
    if (tile < both.f.tiles) {
      const int64_t first = tile * s.rows;
      T* to = cta.tile(2 * stage);
      cta.load(to, p.in, first, false, column);
      if (wants_second) cta.load(to + cta.tile_size, both.h, first, true, column);
    }
    copy_commit();
  };
  for (int stage = 0; stage < s.stages; ++stage) fetch(cluster + stage * clusters, stage);
  cta.load_shrink(slice);
  cta.load_expand(slice);
  cta.clear_coordinates();
  cluster_sync(s.cluster);  // as in fused_kernel

  float first_sum[Depth / 16][2 * Pairs][4] = {}, second_sum[Depth / 16][2 * Pairs][4] = {};
  float vector = 0;  // rank 0, thread k: sum gx of coordinate k
  int stage = 0;
  for (int64_t tile = cluster; tile < both.f.tiles; tile += clusters) {
    const int64_t first = tile * s.rows;
    T* mine = cta.tile(2 * stage);
    wait_for_oldest(s.stages);
    __syncwarp();
    cta.shrink_tile(mine);
    __syncthreads();

    cta.send_sums();
    cluster_sync(s.cluster);  // (1) as in fused_kernel

    for (int e = threadIdx.x; e < cta.own * Rank / 2; e += kFusedThreads) {
      const int m = cta.rank * cta.own + e / (Rank / 2), k = e % (Rank / 2) * 2;
      if (m >= s.rows) continue;
      const int64_t i = first + m;
      const bool live = listed_row(p.index, i, p.n, p.total) >= 0;
      float gp[2], minus_gz[2], z[2];
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        float sum = 0;
        for (int from = 0; from < s.cluster; ++from)
          sum += cta.received[(from * cta.own + m % cta.own) * Rank + k + pair];
        coordinate<true>(p, i, k + pair, sum, 0.f, live, gp[pair], minus_gz[pair]);
        z[pair] = live && k + pair < p.r ? static_cast<const float*>(p.z)[i * kept + k + pair] : 0.f;
      }
      const uint32_t gx = pack<T>(gp[0], gp[1]);
      for (int other = 0; other < s.cluster; ++other) {
        T* row = coordinates + m * at.coordinate_pitch + k;
        if (s.cluster > 1) row = of_rank(row, other);
        for (int q = 0; q < s.expands; ++q)
          *reinterpret_cast<uint32_t*>(row + q * Rank) =
              q + cta.expand_from == 1 ? pack<T>(minus_gz[0], minus_gz[1]) : gx;
        *reinterpret_cast<uint32_t*>(row + cta.depth) = pack<T>(z[0], z[1]);
        *reinterpret_cast<uint32_t*>(row + cta.depth + Depth) = gx;
      }
    }
    cluster_sync(s.cluster);  // (2) as in fused_kernel

    if (cta.rank == 0 && threadIdx.x < Rank) {
      for (int m = 0; m < s.rows; ++m)
        vector += to_float(coordinates[m * at.coordinate_pitch + cta.depth + Depth + threadIdx.x]);
    }
    for (int m = 0; m < s.rows; m += 16) {
      const T* row = coordinates + m * at.coordinate_pitch + cta.depth;
      if (both.wants_first)
        add_products<T, Depth, Pairs>(first_sum, row, at.coordinate_pitch, mine + m * at.pitch, at.pitch, cta.columns);
      if (wants_second)
        add_products<T, Depth, Pairs>(second_sum, row + Depth, at.coordinate_pitch, mine + cta.tile_size + m * at.pitch,
                                      at.pitch, cta.columns);
    }
    if (p.out.p != nullptr) {
      __syncwarp();  // other lanes' columns of g have been read
      cta.template expand_tile<true>(mine);
      cta.store(mine, first, column);
    }
    __syncwarp();
    fetch(tile + s.stages * clusters, stage);
    stage = stage + 1 < s.stages ? stage + 1 : 0;
  }
  copy_wait<0>();

  const int64_t size = static_cast<int64_t>(p.r) * p.d;
  float* to = both.partial + cluster * (both.wants_first + wants_second) * size;
  if (both.wants_first) store_sums<Depth, Pairs>(to, first_sum, p.r, p.d, cta.columns, column);
  if (wants_second) store_sums<Depth, Pairs>(to + both.wants_first * size, second_sum, p.r, p.d, cta.columns, column);
  if (cta.rank == 0 && static_cast<int>(threadIdx.x) < p.r) {
    both.vectors[cluster * 2 * p.r + threadIdx.x] = vector;
    both.vectors[(cluster * 2 + 1) * p.r + threadIdx.x] = vector;
  }
}

}  // namespace fastreft
