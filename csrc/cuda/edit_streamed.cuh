// The edit on tensor cores where the matrices do not fit in shared memory: without clusters (cc 8.x) from some hundred
// columns on. What edit_fused.cuh keeps, this streams.
//
// A CTA owns a tile of rows and goes through its columns in `pieces` of `width`, twice:
//     forth      shrink each piece, the pieces' sums added in order
//     back       expand each piece and store it; the tile is read again, from L2, but for the last piece, which is
//     there
// The matrices' pieces come from L2 each time. Tiles of 64 rows make that a fraction of the tile's own bytes. The
// pieces are copied asynchronously, `stages` ahead, over the ends of tiles; a warp copies its own columns alone. See
// the marks (A) to (E) for what guards the rest.
#pragma once
#include "edit_cta.cuh"

namespace fastreft {

template <typename T, int Rank, bool Backward>
__global__ void __launch_bounds__(kFusedThreads, per_sm_of_rank(Rank))
    streamed_kernel(const __grid_constant__ Fused f) {
  const Pass& p = f.pass;
  const FusedShape& s = f.shape;
  if (blockIdx.x >= f.clusters) return copy_unlisted<T, 8, kFusedThreads>(p, blockIdx.x - f.clusters);
  const Cta<T, Rank> cta(p, s, 0);
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
      cta.load(cta.tile(step % s.stages), p.in, tile_of(step) * s.rows, false,
               cta.column(static_cast<int64_t>(piece_of(step)) * s.width));
    copy_commit();
  };
  for (int64_t step = 0; step < s.stages; ++step) fetch(step);
  cta.clear_coordinates();

  for (int64_t step = 0; step < steps; ++step) {
    const int64_t first = tile_of(step) * s.rows;
    const int turn = static_cast<int>(step % turns);
    const int64_t slice = static_cast<int64_t>(piece_of(step)) * s.width, column = cta.column(slice);
    T* mine = cta.tile(step % s.stages);
    wait_for_oldest(s.stages);
    __syncwarp();

    if (turn <= last) {
      cta.load_shrink(slice);
      __syncthreads();  // (A) the slice is there; nobody reads `partial` any more
      cta.shrink_tile(mine);
      if (!Backward && p.saved != nullptr) {
        const Rows saved{p.saved, 1, p.d, 0};
        store_tile(p.saved, mine, tile_rows(p, saved, first, s.rows, true), s.rows, cta.at.pitch, cta.columns, column,
                   p.d);
      }
      __syncthreads();  // (B) `partial` is whole; nobody reads the slice any more
      for (int e = threadIdx.x; e < s.rows * cta.sums; e += kFusedThreads)
        cta.received[e] = cta.add_warps(e, turn > 0 ? cta.received[e] : 0.f);  // this very thread's
      if (turn == last) {
        __syncthreads();  // (C) `received` is whole
        cta.template work_out_coordinates<Backward>(first);
      }
    }
    if (writes && turn >= last) {
      cta.load_expand(slice);
      __syncthreads();  // (D) the slice and the coordinates are there
      cta.template expand_tile<Backward>(mine);
      cta.store(mine, first, column);
      __syncthreads();  // (E) nobody reads the slice or the coordinates any more
    }
    __syncwarp();
    fetch(step + s.stages);
  }
  copy_wait<0>();
}

}  // namespace fastreft
