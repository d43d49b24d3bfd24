// The edit on tensor cores, weights stationary: one pass over 16-bit rows, read once and written once.
//
// A cluster of CTAs owns a tile of rows, each CTA a slice of `width` columns, each of its 8 warps an eighth of those.
// A CTA keeps its slices of the matrices in shared memory for as long as it lives and walks over tiles:
//     load       a warp copies its columns of the tile asynchronously, `stages` tiles ahead
//     shrink     mma: rows x columns of the tile times the matrices' slices. The CTA's warps share that work by rows,
//                coordinates and parts of the columns (Cta::shrink_tile) and send each sum to the rank that owns its
//                row
//     coordinate the owner adds the ranks' sums, in one order, and sends the coordinates to every rank
//     expand     mma: coordinates times the matrices' slices, added to the tile where it lies, then 16-byte stores; a
//                warp its own columns
// One CTA barrier and two waits for what others send, a tile. What guards what:
//     a tile's buffer     is filled again by a warp that has waited for the coordinates: every warp of the cluster has
//                         then sent its sums of the tile, so nobody shrinks it any more, and only this warp expands it
//     `received`          sums of the next tile are sent after the coordinates of this one have come, which its owners
//                         worked out from what they had received
//     `coordinates`       of the next tile are sent when all sums of it have come, which every warp sends after a CTA
//                         barrier that all warps reach when they have expanded this one
//     the ends of phases  a rank's next phase cannot end before its own warps have sent, so no wait misses one
// A CTA has received all that is ever sent to it when it ends.
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
  const Cta<T, Rank> cta(f, s.cluster > 1 ? cluster_rank() : 0);
  const int64_t cluster = blockIdx.x / s.cluster, clusters = f.clusters;
  const int64_t slice = static_cast<int64_t>(cta.rank) * s.width, column = cta.column(slice);
  const bool writes = p.out.p != nullptr, wants_z = Backward && p.packed != nullptr;

  const auto fetch = [&](int64_t tile, int stage) {
    if (tile < f.tiles) cta.load(cta.tile(stage), p.in, tile * s.rows, false, column);
    copy_commit();
  };
  for (int stage = 0; stage < s.stages; ++stage) fetch(cluster + stage * clusters, stage);
  cta.load_slices(true, writes, slice);
  cta.begin(s.expands);
  const bool has_b = !Backward && p.b.p != nullptr && cta.k < p.r, has_c = !Backward && p.c.p != nullptr && cta.k < p.r;
  const float b = has_b ? load_weight<float>(p.b, cta.k) : 0.f, c = has_c ? load_weight<float>(p.c, cta.k) : 0.f;
  cluster_sync(s.cluster);  // every CTA of the cluster has started: its shared memory may be written

  int stage = 0, parity = 0;
  for (int64_t tile = cluster; tile < f.tiles; tile += clusters, parity ^= 1) {
    const int64_t first = tile * s.rows;
    T* mine = cta.tile(stage);
    wait_for_oldest(s.stages);
    __syncthreads();  // all columns of the tile are there, and nobody reads the coordinates of the tile before

    cta.shrink_tile(cta.whole(stage), [&](int row, int coordinate, int part, const float (&four)[4]) {
      cta.send_sums(row, coordinate, part, four);
    });
    const Known next = cta.template known<Backward>(first, cta.first_unit(), wants_z);
    if (!Backward && p.saved != nullptr) cta.store(mine, Rows{p.saved, 1, p.d, 0}, first, true, column);

    cta.wait_for_sums(parity);
    if constexpr (Backward) {
      cta.template backward_coordinates<false>(first, next);
    } else {
      cta.forward_coordinates(first, next, b, c);
    }
    cta.wait_for_coordinates(parity, s.expands);

    if (writes) {
      cta.template expand_tile<Backward>(mine);
      __syncwarp();  // what other lanes have written is stored
      cta.store(mine, p.out, first, false, column);
    }
    __syncwarp();
    fetch(tile + s.stages * clusters, stage);
    stage = stage + 1 < s.stages ? stage + 1 : 0;
  }
  copy_wait<0>();
}

}  // namespace fastreft
