// The whole backward of a tile in one pass on tensor cores: g and h read once, dh written once, and the sums over rows
// that the weights' gradients are made of kept in registers for as long as the CTA lives.
//
// The mapping, the exchange of sums and coordinates and what guards them are those of edit_fused.cuh. On top of
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
  const Cta<T, Rank> cta(both.f, s.cluster > 1 ? cluster_rank() : 0);
  const int pitch = cta.pitch, coordinate_pitch = cta.coordinate_pitch;
  const int64_t cluster = blockIdx.x / s.cluster, clusters = both.f.clusters;
  const int64_t slice = static_cast<int64_t>(cta.rank) * s.width, column = cta.column(slice);
  const bool wants_second = both.h.p != nullptr, writes = p.out.p != nullptr;
  // Of Rank coordinates that a row is sent: those of the expand, z and gx.
  const int chunks = s.expands + 2;

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
  cta.load_slices(true, writes, slice);
  cta.begin(chunks);
  cluster_sync(s.cluster);  // as in fused_kernel

  float first_sum[Depth / 16][2 * Pairs][4] = {}, second_sum[Depth / 16][2 * Pairs][4] = {};
  float vector = 0;  // rank 0, thread k: sum gx of coordinate k
  int stage = 0, parity = 0;
  for (int64_t tile = cluster; tile < both.f.tiles; tile += clusters, parity ^= 1) {
    const int64_t first = tile * s.rows;
    T* mine = cta.tile(2 * stage);
    wait_for_oldest(s.stages);
    __syncthreads();  // as in fused_kernel
    cta.shrink_tile(cta.whole(2 * stage), [&](int row, int coordinate, int part, const float (&four)[4]) {
      cta.send_sums(row, coordinate, part, four);
    });
    const Known next = cta.template known<true>(first, cta.first_unit(), true);
    cta.wait_for_sums(parity);
    cta.template backward_coordinates<true>(first, next);
    cta.wait_for_coordinates(parity, chunks);

    const T* rows = cta.coordinates() + cta.depth;
    if (cta.rank == 0 && threadIdx.x < Rank) {
#pragma unroll 8
      for (int m = 0; m < s.rows; ++m) vector += to_float(rows[m * coordinate_pitch + Depth + threadIdx.x]);
    }
    for (int m = 0; m < s.rows; m += 16) {
      const T* row = rows + m * coordinate_pitch;
      if (both.wants_first)
        add_products<T, Depth, Pairs>(first_sum, row, coordinate_pitch, mine + m * pitch, pitch, cta.columns);
      if (wants_second)
        add_products<T, Depth, Pairs>(second_sum, row + Depth, coordinate_pitch, mine + cta.tile_size + m * pitch,
                                      pitch, cta.columns);
    }
    if (writes) {
      __syncwarp();  // other lanes' columns of g have been read
      cta.template expand_tile<true>(mine);
      __syncwarp();
      cta.store(mine, p.out, first, false, column);
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
