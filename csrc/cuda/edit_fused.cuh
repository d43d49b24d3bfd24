// The edit on tensor cores, weights stationary: one pass over 16-bit rows, read once and written once.
//
// A cluster of CTAs owns a tile of rows, each CTA a slice of `width` columns, each of 8 warps an eighth of those. A CTA
// keeps its slices of the matrices in shared memory or in registers (edit_held.cuh) for as long as it lives and walks
// over tiles, which a ninth warp moves (edit_mover.cuh):
//     shrink      mma: rows x columns of the tile times the matrices' slices. The 8 warps share that work by rows,
//                 coordinates and parts of the columns (Cta::shrink_tile) and send each sum to the rank that owns its
//                 row
//     coordinate  three more warps of the owner add the ranks' sums, in one order, and send the coordinates to every
//                 rank (edit_owner.cuh)
//     expand      mma: coordinates times the matrices' slices, added to the tile where it lies, a warp its own columns
// What is sent takes hundreds of cycles to arrive, and to be added. So the next tile is shrunk while this one's
// coordinates are on their way, with two sets of what is received: of the 8 warps a turn is shrink(i + 1), expand(i).
// With two stages, the next tile arriving late, the two change places, and one set does; such tiles are large. Nobody
// waits for all of a CTA or a cluster, but each warp for what it needs. What guards what, with one set and with two:
//     a stage             is filled again when all 8 warps have given it back. Nobody shrinks a tile any more when its
//                         coordinates have come: every warp that shrinks sent its sums of it before
//     `received`          of turn i + sets is sent after the coordinates of turn i have come, which its owners worked
//                         out from what they had received
//     `coordinates`       of turn i + sets are sent when the row's sums have come, of which each CTA sends some, when
//                         all its 8 warps have given back tile i (wait_for_others)
//     the ends of phases  of turn i + sets come after the same wait, so that none of the 8 warps misses one of turn i.
//                         Nor does an owner with rows, whose coordinates of turn i all have waited for; one without
//                         waits for none
// A CTA has received all that is ever sent to it when it ends.
//
// Padding: coordinates past r, columns past d and rows past n are zeros in shared memory, never poison.
#pragma once
#include <type_traits>

#include "edit_held.cuh"
#include "edit_mover.cuh"
#include "edit_owner.cuh"

namespace fastreft {

template <typename T, int Rank, bool Backward, bool Held>
__global__ void __launch_bounds__(kTeamThreads, per_sm_of_rank(Rank)) fused_kernel(const __grid_constant__ Fused f) {
  using Owners = Owner<T, Rank, kOwnerWarps>;
  const Pass& p = f.pass;
  const FusedShape& s = f.shape;
  const int ctas = has_clusters() ? s.cluster : 1;  // of a cluster
  if (blockIdx.x >= f.clusters * ctas)
    return wait_for_launch_before(), copy_unlisted<T, 8, kTeamThreads>(p, blockIdx.x - f.clusters * ctas);
  const Cta<T, Rank> cta(f, static_cast<int>(blockIdx.x % ctas));
  const int64_t cluster = blockIdx.x / ctas, clusters = f.clusters;
  const int64_t slice = static_cast<int64_t>(cta.rank) * s.width;
  const bool writes = p.out.p != nullptr;
  if (cta.warp == kMoverWarp) {
    const Mover<T, Rank> mover{cta, slice, Rows{}, writes};
    mover.begin();
    wait_for_launch_before();
    if (Held) {
      all_started<kTeamThreads>(s.cluster);  // tiles come where the matrices were
      mover.run(cluster, clusters, f.tiles);
    } else {
      say_started<kTeamThreads>(s.cluster);
      mover.run(cluster, clusters, f.tiles);
      wait_for_started(s.cluster);
    }
    return;
  }
  if (cta.warp > kMoverWarp) {
    Owners owner(cta, cta.warp - kMoverWarp - 1);
    wait_for_launch_before();
    if (!Backward) owner.load_vectors();
    all_started<kTeamThreads>(s.cluster);
    float none = 0;
    return owner.template run<Backward, false>(cluster, clusters, f.tiles, none);
  }
  cta.begin(s.expands, Owners::at_work(cta));
  wait_for_launch_before();
  std::conditional_t<Held, InRegisters<T, Rank>, InShared<T, Rank>> matrices;
  matrices.begin(cta, writes, slice);
  all_started<kTeamThreads>(s.cluster);  // every CTA of the cluster has started: its shared memory may be written

  const bool ahead = cta.at.sets > 1;
  Turn at, before;
  arrivals_wait(cta.filled(0), 0);
  matrices.shrink_and_send(cta, cta.whole(0), 0);
  matrices.then(cta, writes, slice);
  for (int64_t tile = cluster; tile < f.tiles; tile += clusters) {
    const int64_t first = tile * s.rows;
    Turn next = at;
    next.step(s, cta.at);
    const bool more = tile + clusters < f.tiles;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      if ((half == 0) == ahead) {  // the next tile; with two stages it has only just begun to arrive
        if (!more) continue;
        if (!ahead || tile > cluster) cta.wait_for_others(ahead ? before : at);
        arrivals_wait(cta.filled(next.stage), next.filled);
        matrices.shrink_and_send(cta, cta.whole(next.stage), next.set);
      } else {
        T* mine = cta.tile(at.stage);
        if (!Backward && p.saved != nullptr) cta.store(mine, Rows{p.saved, 1, p.d, 0}, first, true, cta.column(slice));
        cta.wait_for_coordinates(at.set, at.phase, s.expands);
        if (writes) matrices.template expand_tile<Backward>(cta, mine, cta.coordinates(at.set));
        cta.give_back(at.stage);
      }
    }
    before = at;
    at = next;
  }
}

}  // namespace fastreft
