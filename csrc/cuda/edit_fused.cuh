// The edit on tensor cores, weights stationary: one pass over 16-bit rows, read once and written once.
//
// A cluster of CTAs owns a tile of rows, each CTA a slice of `width` columns, each of its 8 warps an eighth of those.
// A CTA keeps its slices of the matrices in shared memory for as long as it lives and walks over tiles:
//     load       a warp copies its columns of the tile asynchronously, `stages` tiles ahead. Nobody else touches them,
//                so no CTA barrier guards the tile buffers
//     shrink     mma: rows x columns of the tile times the matrices' slices -> the warp's partial sums
//     reduce     the 8 warps' sums in order, sent to the rank that owns the row (about rows / cluster rows each)
//     coordinate the owner adds the ranks' sums in order, once, and sends the coordinates to every rank
//     expand     mma: coordinates times the matrices' slices, added to the tile where it lies, then 16-byte stores
// Two cluster barriers a tile. What guards what: `received` and `coordinates` are written only by threads that have
// passed the barrier before which their last readers arrived; see the marks (1) and (2).
//
// Padding: coordinates past r, columns past d and rows past n are zeros in shared memory, never poison.
#pragma once
#include "edit_cta.cuh"

namespace fastreft {

template <typename T, int Rank, bool Backward>
__global__ void __launch_bounds__(kFusedThreads, per_sm_of_rank(Rank)) fused_kernel(const __grid_constant__ Fused f) {
  const Pass& p = f.pass;
  const FusedShape& s = f.shape;
  if (blockIdx.x >= f.clusters * s.cluster)
    return copy_unlisted<T, 8, kFusedThreads>(p, blockIdx.x - f.clusters * s.cluster);
  const Cta<T, Rank> cta(p, s, s.cluster > 1 ? cluster_rank() : 0);
  const int64_t cluster = blockIdx.x / s.cluster, clusters = f.clusters;
  const int64_t slice = static_cast<int64_t>(cta.rank) * s.width, column = cta.column(slice);

  const auto fetch = [&](int64_t tile, int stage) {
    if (tile < f.tiles) cta.load(cta.tile(stage), p.in, tile * s.rows, false, column);
    copy_commit();
  };
  for (int stage = 0; stage < s.stages; ++stage) fetch(cluster + stage * clusters, stage);
  cta.load_shrink(slice);
  cta.load_expand(slice);
  cta.clear_coordinates();
  cluster_sync(s.cluster);  // and every CTA of the cluster has started: its shared memory may be written

  int stage = 0;
  for (int64_t tile = cluster; tile < f.tiles; tile += clusters) {
    const int64_t first = tile * s.rows;
    T* mine = cta.tile(stage);
    wait_for_oldest(s.stages);
    __syncwarp();

    cta.shrink_tile(mine);
    if (!Backward && p.saved != nullptr) {
      const Rows saved{p.saved, 1, p.d, 0};
      store_tile(p.saved, mine, tile_rows(p, saved, first, s.rows, true), s.rows, cta.at.pitch, cta.columns, column,
                 p.d);
    }
    __syncthreads();

    cta.send_sums();
    cluster_sync(s.cluster);  // (1) all sums have arrived; nobody reads the coordinates of the tile before any more

    cta.template work_out_coordinates<Backward>(first);
    cluster_sync(s.cluster);  // (2) all coordinates have arrived; nobody reads `received` any more

    if (p.out.p != nullptr) {
      cta.template expand_tile<Backward>(mine);
      cta.store(mine, first, column);
    }
    __syncwarp();
    fetch(tile + s.stages * clusters, stage);
    stage = stage + 1 < s.stages ? stage + 1 : 0;
  }
  copy_wait<0>();
}

}  // namespace fastreft
