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
#include "edit_fused.cuh"

namespace fastreft {

template <typename T, int Rank, bool Backward>
__global__ void __launch_bounds__(kFusedWarps * 32, per_sm_of_rank(Rank))
    streamed_kernel(const __grid_constant__ Fused f) {
  const Pass& p = f.pass;
  const FusedShape& s = f.shape;
  if (blockIdx.x >= f.clusters) return copy_unlisted<T, 8, kFusedWarps * 32>(p, blockIdx.x - f.clusters);
  const FusedLayout at = fused_layout(s);
  char* shared = shared_memory();
  T* shrink = reinterpret_cast<T*>(shared + at.shrink);
  T* expand = reinterpret_cast<T*>(shared + at.expand);
  T* tiles = reinterpret_cast<T*>(shared + at.tiles);
  float* partial = reinterpret_cast<float*>(shared + at.partial);
  float* received = reinterpret_cast<float*>(shared + at.received);
  T* coordinates = reinterpret_cast<T*>(shared + at.coordinates);

  const int warp = threadIdx.x / 32, columns = s.width / kFusedWarps;
  const int64_t tile_size = s.rows * at.pitch;
  const int depth = s.expands * Rank > 16 ? s.expands * Rank : 16, sums = s.shrinks * Rank;
  const int shrink_from = only_second(p.shrink), expand_from = only_second(p.expand);
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
      load_tile(tiles + step % s.stages * tile_size + warp * columns, p.in.p,
                tile_rows(p, p.in, tile_of(step) * s.rows, s.rows, false), s.rows, at.pitch, columns,
                static_cast<int64_t>(piece_of(step)) * s.width + warp * columns, p.d);
    copy_commit();
  };
  for (int64_t step = 0; step < s.stages; ++step) fetch(step);
  for (int e = threadIdx.x; e < s.rows * at.coordinate_pitch; e += kFusedWarps * 32) coordinates[e] = rounded<T>(0.f);

  for (int64_t step = 0; step < steps; ++step) {
    const int64_t first = tile_of(step) * s.rows;
    const int turn = static_cast<int>(step % turns);
    const int64_t slice = static_cast<int64_t>(piece_of(step)) * s.width, column = slice + warp * columns;
    T* mine = tiles + step % s.stages * tile_size + warp * columns;
    wait_for_oldest(s.stages);
    __syncwarp();

    if (turn <= last) {
      load_slice(shrink, p.shrink + shrink_from, s.shrinks, Rank, sums, s.width, at.pitch, p.r, p.d, slice);
      __syncthreads();  // (A) the slice is there; nobody reads `partial` any more
      for (int m = 0; m < s.rows; m += 16) {
        for (int q = 0; q < s.shrinks; ++q)
          shrink_rows<T, Rank>(mine + m * at.pitch, shrink + q * Rank * at.pitch + warp * columns, at.pitch, columns,
                               partial + (warp * s.rows + m) * sums + q * Rank, sums);
      }
      if (!Backward && p.saved != nullptr) {
        const Rows saved{p.saved, 1, p.d, 0};
        store_tile(p.saved, mine, tile_rows(p, saved, first, s.rows, true), s.rows, at.pitch, columns, column, p.d);
      }
      __syncthreads();  // (B) `partial` is whole; nobody reads the slice any more
      for (int e = threadIdx.x; e < s.rows * sums; e += kFusedWarps * 32) {
        float sum = turn > 0 ? received[e] : 0.f;  // this very thread's
        for (int w = 0; w < kFusedWarps; ++w) sum += partial[w * s.rows * sums + e];
        received[e] = sum;
      }
      if (turn == last) {
        __syncthreads();  // (C) `received` is whole
        work_out_coordinates<T, Rank, Backward>(p, s, at, first, 0, received, coordinates);
      }
    }
    if (writes && turn >= last) {
      load_slice(expand, p.expand + expand_from, s.expands, Rank, depth, s.width, at.pitch, p.r, p.d, slice);
      __syncthreads();  // (D) the slice and the coordinates are there
      constexpr int most = Backward ? (Rank > 8 ? Rank / 8 : 1) : (Rank > 16 ? Rank / 16 : 1);
      for (int m = 0; m < s.rows; m += 16)
        expand_rows<T, most>(mine + m * at.pitch, coordinates + m * at.coordinate_pitch, at.coordinate_pitch,
                             expand + warp * columns, at.pitch, columns, s.expands > 0 ? depth / 16 : 0);
      __syncwarp();
      store_tile(p.out.p, mine, tile_rows(p, p.out, first, s.rows, false), s.rows, at.pitch, columns, column, p.d);
      __syncthreads();  // (E) nobody reads the slice or the coordinates any more
    }
    __syncwarp();
    fetch(step + s.stages);
  }
  copy_wait<0>();
}

}  // namespace fastreft
