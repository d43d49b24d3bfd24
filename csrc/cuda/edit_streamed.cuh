// The edit on tensor cores where the matrices do not fit in shared memory: without clusters (cc 8.x) from some hundred
// columns on. What edit_fused.cuh keeps, this streams.
//
// A CTA owns a tile of rows and goes through its columns in `pieces` of `width`, twice:
//     forth      shrink each piece, the pieces' sums added in order
//     back       expand each piece and store it; the tile is read again, from L2, but for the last piece, which is
//     there
// The matrices' pieces come from L2 each time. Tiles of 64 rows make that a fraction of the tile's own bytes. The
// pieces are copied asynchronously, `stages` ahead, over the ends of tiles; a warp copies its own columns alone. See
// the marks (A) to (D) for what guards the rest.
#pragma once
#include "edit_owner.cuh"

namespace fastreft {

template <typename T, int Rank, bool Backward>
__global__ void __launch_bounds__(kFusedThreads, per_sm_of_rank(Rank))
    streamed_kernel(const __grid_constant__ Fused f) {
  const Pass& p = f.pass;
  const FusedShape& s = f.shape;
  if (blockIdx.x >= f.clusters) return copy_unlisted<T, 8, kFusedThreads>(p, blockIdx.x - f.clusters);
  const Cta<T, Rank> cta(f, 0);
  const bool writes = p.out.p != nullptr;
  const int last = s.pieces - 1,
            turns = writes ? 2 * s.pieces - 1 : s.pieces;  // the last piece forth is the first back
  const int64_t own_tiles = (f.tiles - blockIdx.x + f.clusters - 1) / f.clusters, steps = own_tiles * turns;
  const auto tile_of = [&](int64_t step) { return blockIdx.x + step / turns * f.clusters; };
  const auto piece_of = [&](int64_t step) {
    const int turn = static_cast<int>(step % turns);
    return turn < s.pieces ? turn : 2 * last - turn;
  };
  const auto fetch = [&](int64_t step) {
    if (step < steps)
      cta.load(cta.tile(static_cast<int>(step % s.stages)), p.in, tile_of(step) * s.rows, false,
               cta.column(static_cast<int64_t>(piece_of(step)) * s.width));
    copy_commit();
  };
  for (int64_t step = 0; step < s.stages; ++step) fetch(step);
  cta.clear_coordinates();
  Owner<T, Rank, kFusedWarps> owner(cta, cta.warp);
  if (!Backward) owner.load_vectors();
  const bool wants_z = Backward && p.packed != nullptr;

  for (int64_t step = 0; step < steps; ++step) {
    const int64_t first = tile_of(step) * s.rows;
    const int turn = static_cast<int>(step % turns), stage = static_cast<int>(step % s.stages);
    const int64_t slice = static_cast<int64_t>(piece_of(step)) * s.width, column = cta.column(slice);
    T* mine = cta.tile(stage);
    wait_for_oldest(s.stages);  // this thread's copies; (A) and (C) see to the others'

    if (turn <= last) {
      cta.load_shrink(slice);
      __syncthreads();  // (A) the slice and all columns of the piece are there; nobody reads `received` any more
      cta.shrink_tile(cta.whole(stage), [&](int row, int coordinate, int part, const float (&four)[4]) {
        float* sums =
            cta.received(0) + ((part << cta.work.own_shift) + row) * cta.sums + coordinate;  // this very lane's
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[i] = turn > 0 ? sums[i] + four[i] : four[i];
      });
      if (!Backward && p.saved != nullptr) cta.store(mine, Rows{p.saved, 1, p.d, 0}, first, true, column);
      __syncthreads();  // (B) nobody reads the slice or the piece any more; with the last, `received` is whole
      if (turn == last) {
        const Known next = owner.template known<Backward>(first, owner.first_unit(), wants_z);
        if constexpr (Backward) {
          float none = 0;
          owner.template backward_coordinates<false>(0, first, next, none);
        } else {
          owner.forward_coordinates(0, first, next);
        }
        __syncthreads();  // they are there
      }
    }
    if (writes && turn >= last) {
      cta.load_expand(slice);
      __syncthreads();  // (C) the slice is there
      cta.template expand_tile<Backward>(mine, cta.coordinates(0));
      __syncwarp();
      cta.store(mine, p.out, first, false, column);
      __syncthreads();  // (D) nobody reads the slice, the coordinates or what was stored any more
    }
    fetch(step + s.stages);
  }
  copy_wait<0>();
}

}  // namespace fastreft
