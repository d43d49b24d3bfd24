// The edit on tensor cores, weights stationary: one pass over 16-bit rows, read once and written once.
//
// A cluster of CTAs owns a tile of rows, each CTA a slice of `width` columns, each of its 8 warps an eighth of those. A
// CTA keeps its slices of the matrices in shared memory for as long as it lives and walks over tiles, which a ninth
// warp moves (edit_mover.cuh):
//     shrink      mma: rows x columns of the tile times the matrices' slices. The CTA's warps share that work by rows,
//                 coordinates and parts of the columns (Cta::shrink_tile) and send each sum to the rank that owns its
//                 row
//     coordinate  the owner adds the ranks' sums, in one order, and sends the coordinates to every rank
//     expand      mma: coordinates times the matrices' slices, added to the tile where it lies, a warp its own columns
// What is sent takes hundreds of cycles to arrive. So the next tile is shrunk while this one's coordinates are on their
// way, and this one expanded while the next one's sums are: a turn is coordinate(i), shrink(i + 1), expand(i), with two
// sets of what is received. With two stages, the next tile arriving late, the last two change places, and one set does;
// such tiles are large. Nobody waits for all of a CTA or a cluster, but each warp for what it needs. What guards what,
// with one set and with two:
//     a stage             is filled again when all warps have given it back. Nobody shrinks a tile any more when its
//                         coordinates have come: every warp that shrinks sent its sums of it before
//     `received`          of turn i + sets is sent after the coordinates of turn i have come, which its owners worked
//                         out from what they had received
//     `coordinates`       of turn i + sets are sent when the row's sums have come, of which each CTA sends some, when
//                         all its warps have given back tile i (wait_for_others)
//     the ends of phases  of turn i + sets come after the same wait, so no warp misses one of turn i
// A CTA has received all that is ever sent to it when it ends.
//
// Padding: coordinates past r, columns past d and rows past n are zeros in shared memory, never poison.
#pragma once
#include "edit_mover.cuh"

namespace fastreft {

template <typename T, int Rank, bool Backward>
__global__ void __launch_bounds__(kMovedThreads, per_sm_of_rank(Rank)) fused_kernel(const __grid_constant__ Fused f) {
  const Pass& p = f.pass;
  const FusedShape& s = f.shape;
  if (blockIdx.x >= f.clusters * s.cluster)
    return wait_for_launch_before(), copy_unlisted<T, 8, kMovedThreads>(p, blockIdx.x - f.clusters * s.cluster);
  const Cta<T, Rank> cta(f, static_cast<int>(blockIdx.x % s.cluster));
  const int64_t cluster = blockIdx.x / s.cluster, clusters = f.clusters;
  const int64_t slice = static_cast<int64_t>(cta.rank) * s.width;
  const bool writes = p.out.p != nullptr, wants_z = Backward && p.packed != nullptr;
  if (cta.warp == kFusedWarps) {
    const Mover<T, Rank> mover{cta, slice, Rows{}, writes};
    mover.begin();
    wait_for_launch_before();
    mover.fill(cluster, clusters, f.tiles);
    cluster_sync(s.cluster);
    return mover.run(cluster, clusters, f.tiles);
  }
  cta.begin(s.expands);
  wait_for_launch_before();
  cta.load_slices(true, writes, slice);
  const bool has_b = !Backward && p.b.p != nullptr && cta.k < p.r, has_c = !Backward && p.c.p != nullptr && cta.k < p.r;
  const float b = has_b ? load_weight<float>(p.b, cta.k) : 0.f, c = has_c ? load_weight<float>(p.c, cta.k) : 0.f;
  cluster_sync(s.cluster);  // every CTA of the cluster has started: its shared memory may be written

  const bool ahead = cta.at.sets > 1;
  Turn at, before;
  arrivals_wait(cta.filled(0), 0);
  cta.shrink_and_send(cta.whole(0), 0);
  Known known = cta.template known<Backward>(cluster * s.rows, cta.first_unit(at), wants_z);
  for (int64_t tile = cluster; tile < f.tiles; tile += clusters) {
    const int64_t first = tile * s.rows;
    cta.wait_for_sums(at.set, at.phase);
    if constexpr (Backward) {
      float none = 0;
      cta.template backward_coordinates<false>(at, first, known, none);
    } else {
      cta.forward_coordinates(at, first, known, b, c);
    }
    Turn next = at;
    next.step(s, cta.at);
    const bool more = tile + clusters < f.tiles;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      if ((half == 0) == ahead) {  // the next tile; with two stages it has only just begun to arrive
        if (!more) continue;
        if (!ahead || tile > cluster) cta.wait_for_others(ahead ? before : at);
        arrivals_wait(cta.filled(next.stage), next.filled);
        cta.shrink_and_send(cta.whole(next.stage), next.set);
        known = cta.template known<Backward>(first + clusters * s.rows, cta.first_unit(next), wants_z);
      } else {
        T* mine = cta.tile(at.stage);
        if (!Backward && p.saved != nullptr) cta.store(mine, Rows{p.saved, 1, p.d, 0}, first, true, cta.column(slice));
        cta.wait_for_coordinates(at.set, at.phase, s.expands);
        if (writes) cta.template expand_tile<Backward>(mine, cta.coordinates(at.set));
        cta.give_back(at.stage);
      }
    }
    before = at;
    at = next;
  }
}

}  // namespace fastreft
