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
#include "edit_held.cuh"
#include "edit_mover.cuh"
#include "edit_owner.cuh"

namespace fastreft {

template <typename T, int Rank>
__global__ void __launch_bounds__(kTeamThreads, 1) both_kernel(const __grid_constant__ Both both) {
  using Owners = Owner<T, Rank, kOwnerWarps>;
  constexpr int Depth = both_depth(Rank), Pairs = both_columns(Rank) / kFusedWarps / 16;
  const Pass& p = both.f.pass;
  const FusedShape& s = both.f.shape;
  const int ctas = has_clusters() ? s.cluster : 1;  // of a cluster
  if (blockIdx.x >= both.f.clusters * ctas)
    return wait_for_launch_before(), copy_unlisted<T, 8, kTeamThreads>(p, blockIdx.x - both.f.clusters * ctas);
  const Cta<T, Rank> cta(both.f, static_cast<int>(blockIdx.x % ctas));
  const int pitch = cta.pitch, coordinate_pitch = cta.coordinate_pitch;
  const int64_t cluster = blockIdx.x / ctas, clusters = both.f.clusters;
  const int64_t slice = static_cast<int64_t>(cta.rank) * s.width, column = cta.column(slice);
  const bool wants_second = both.h.p != nullptr, writes = p.out.p != nullptr;
  // Of Rank coordinates that a row is sent: those of the expand, z and gx.
  const int chunks = s.expands + 2;
  if (cta.warp == kMoverWarp) {
    const Mover<T, Rank> mover{cta, slice, both.h, writes};
    mover.begin();
    wait_for_launch_before();
    say_started<kTeamThreads>(s.cluster);
    mover.run(cluster, clusters, both.f.tiles);
    return wait_for_started(s.cluster);
  }
  if (cta.warp > kMoverWarp) {
    const Owners owner(cta, cta.warp - kMoverWarp - 1);
    wait_for_launch_before();
    all_started<kTeamThreads>(s.cluster);
    float vector = 0;  // sum gx of this lane's coordinate
    owner.template run<true, true>(cluster, clusters, both.f.tiles, vector);
    // The lanes' vectors, in one order; nobody is sent sums any more.
    barrier_of<kOwnerWarps * 32, (kMoverWarp + 1) * 32, 3>();
    float* vectors = cta.received(0);
    vectors[owner.member * 32 + cta.lane] = vector;
    barrier_of<kOwnerWarps * 32, (kMoverWarp + 1) * 32, 3>();
    const int k = owner.member * 32 + cta.lane;
    if (k >= p.r) return;
    float total = 0;
#pragma unroll
    for (int lane = 0; lane < kOwnerWarps * 32; lane += Rank) total += vectors[lane + k];
    both.vectors[2 * blockIdx.x * p.r + k] = both.vectors[(2 * blockIdx.x + 1) * p.r + k] = total;
    return;
  }
  cta.begin(chunks, Owners::at_work(cta));
  wait_for_launch_before();
  InShared<T, Rank> matrices;
  matrices.begin(cta, writes, slice);
  all_started<kTeamThreads>(s.cluster);  // as in fused_kernel

  float first_sum[Depth / 16][2 * Pairs][4] = {}, second_sum[Depth / 16][2 * Pairs][4] = {};
  const bool ahead = cta.at.sets > 1;
  Turn at, before;
  arrivals_wait(cta.filled(0), 0);
  cta.shrink_and_send(cta.whole(0), 0);
  matrices.then(cta, writes, slice);
  for (int64_t tile = cluster; tile < both.f.tiles; tile += clusters) {  // as in fused_kernel
    Turn next = at;
    next.step(s, cta.at);
    const bool more = tile + clusters < both.f.tiles;
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      if ((half == 0) == ahead) {
        if (!more) continue;
        if (!ahead || tile > cluster) cta.wait_for_others(ahead ? before : at);
        arrivals_wait(cta.filled(next.stage), next.filled);
        cta.shrink_and_send(cta.whole(next.stage), next.set);
        continue;
      }
      cta.wait_for_coordinates(at.set, at.phase, chunks);
      if (wants_second) arrivals_wait(cta.second_filled(at.second), at.second_filled);
      T* mine = cta.tile(at.stage);
      const T* other = cta.tile(s.stages + at.second);
      const T* rows = cta.coordinates(at.set) + cta.depth;
      for (int m = 0; m < s.rows; m += 16) {
        const T* row = rows + m * coordinate_pitch;
        if (both.wants_first)
          add_products<T, Depth, Pairs>(first_sum, row, coordinate_pitch, mine + m * pitch, pitch, cta.columns);
        if (wants_second)
          add_products<T, Depth, Pairs>(second_sum, row + Depth, coordinate_pitch, other + m * pitch, pitch,
                                        cta.columns);
      }
      if (writes) {
        __syncwarp();  // other lanes' columns of g have been read
        cta.template expand_tile<true>(mine, cta.coordinates(at.set));
      }
      cta.give_back(at.stage);
    }
    before = at;
    at = next;
  }

  const int64_t size = static_cast<int64_t>(p.r) * p.d;
  float* to = both.partial + cluster * (both.wants_first + wants_second) * size;
  if (both.wants_first) store_sums<Depth, Pairs>(to, first_sum, p.r, p.d, cta.columns, column);
  if (wants_second) store_sums<Depth, Pairs>(to + both.wants_first * size, second_sum, p.r, p.d, cta.columns, column);
}

}  // namespace fastreft
