// The warp that moves a CTA's tiles, beside the 8 that work on them (edit_fused.cuh, edit_both.cuh): it brings the rows
// of a tile to a stage of shared memory and takes them back when they have been edited. Addresses, lists of rows and
// waits for memory are its affair alone; on an H200 they took a third of the time of warps that moved their own
// columns.
//
//     filled   of a stage: its rows have arrived, and what is not there is zeros
//     edited   of a stage: every warp is through with it
//
// From cc 9.0 on a row's slice is one bulk copy, a lane's; before that the lanes copy 16 bytes each.
#pragma once
#include "edit_cta.cuh"

namespace fastreft {

// move(the row in global memory, the row in shared memory) of every row there is of a tile, by one lane each. Where
// rows follow one another one lane does them all, with addresses that are the same for the warp: a bulk copy takes
// those, and lanes with their own take turns, at six times the instructions.
template <typename G, typename T, typename F>
__device__ __forceinline__ void each_row(const TileRows& where, int rows, G* global, T* shared, int pitch,
                                         const F& move) {
  if (!where.looked_up) {
    G* there = global + where.first;
#pragma unroll 4
    for (int m = 0; m < where.count; ++m, there += where.stride, shared += pitch) {
      if (elected()) move(there, shared);
    }
  } else {
#pragma unroll 1
    for (int m = threadIdx.x % 32; m < rows; m += 32) {
      const int64_t offset = where.own(m, rows);
      if (offset >= 0) move(global + offset, shared + m * pitch);
    }
  }
}

// The columns from `column` on, `bytes` of them, of the rows of a tile, in bulk.
template <typename T>
__device__ __forceinline__ void load_rows(T* to, const Rows& rows, const TileRows& where, int count, int pitch,
                                          int64_t column, int bytes, Arrivals* filled) {
  each_row(where, count, static_cast<const T*>(rows.p) + column, to, pitch,
           [&](const T* from, T* there) { bulk_load(there, from, bytes, filled); });
}

// Which rows of a tile there are: bit m % 32 of low or high.
struct RowMask {
  uint32_t low, high;
  __device__ __forceinline__ int count() const { return __popc(low) + __popc(high); }
  __device__ __forceinline__ bool has(int m) const { return ((m < 32 ? low : high) >> m % 32 & 1) != 0; }
};
__device__ __forceinline__ RowMask rows_there(const TileRows& where, int rows) {
  const int lane = threadIdx.x % 32;
  const uint32_t low = __ballot_sync(0xffffffffu, where.own(lane, rows) >= 0);
  return {low, __ballot_sync(0xffffffffu, where.own(lane + 32, rows) >= 0)};
}

// Zeros in a tile where no row is, and past column `there` of `width`. Of a tile before, what lies there may be
// anything.
template <typename T>
__device__ __forceinline__ void clear_rest(T* tile, const RowMask& mask, int rows, int pitch, int there, int width) {
  if (mask.count() == rows && there >= width) return;
#pragma unroll 1
  for (int m = 0; m < rows; ++m) {
    for (int j = (mask.has(m) ? there : 0) + threadIdx.x % 32 * 8; j < width; j += 32 * 8)
      *reinterpret_cast<uint4*>(tile + m * pitch + j) = make_uint4(0, 0, 0, 0);
  }
}

template <typename T, int Rank>
struct Mover {
  const Cta<T, Rank>& cta;
  int64_t slice;  // the CTA's first column
  Rows second;    // streamed beside Pass::in and numbered as listed, or none
  bool writes;    // tiles go back to Pass::out

  __device__ __forceinline__ void begin() const {
    if (cta.lane == 0) {
      const int arriving = has_bulk_copies() ? 1 : 32;
      for (int stage = 0; stage < cta.s.stages; ++stage) {
        arrivals_init(cta.filled(stage), arriving);
        arrivals_init(cta.edited(stage), kFusedWarps);
      }
      for (int stage = 0; stage < cta.at.second_stages; ++stage) arrivals_init(cta.second_filled(stage), arriving);
      arrivals_init_fence();
    }
    __syncwarp();
  }

  // Tiles [from, tiles) in steps of `step`: first one into every stage, then each into that of a tile that all are
  // through with. The second input's follow by as many as there are stages of it. One place in the code loads them all:
  // it is long.
  __device__ __forceinline__ void run(int64_t from, int64_t step, int64_t tiles) const {
    const int stages = cta.s.stages, seconds = second.p != nullptr ? cta.at.second_stages : 0;
    Turn turn;
    int fresh = 0;  // stages filled so far
#pragma unroll 1
    for (int64_t next = from; next < tiles + stages * step; next += step) {
      const bool again = fresh == stages;
      const int stage = again ? turn.stage : fresh, other = again ? turn.second : fresh;
      if (again) arrivals_wait(cta.edited(stage), turn.filled);
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        const bool of_second = seconds > 0 && again == (half == 0);  // a tile's rows are waited for before its second's
        if (seconds == 0 && half == 0) continue;
        if (again && !of_second) {
          if (writes) store(stage, next - stages * step);
          __syncwarp();  // all lanes have read what they store
        }
        const int64_t tile = of_second && again ? next - (stages - seconds) * step : next;
        if (tile >= tiles || (of_second && other >= seconds)) continue;
        Rows rows = cta.p.in;  // by value: to choose between references would put all of them into memory
        if (of_second) rows = second;
        load(rows, tile, of_second, of_second ? stages + other : stage,
             of_second ? cta.second_filled(other) : cta.filled(stage));
      }
      if (again) {
        turn.step(cta.s, cta.at);
      } else {
        ++fresh;
      }
    }
  }

 private:
  __device__ __forceinline__ TileRows rows_of(const Rows& rows, int64_t at, bool direct) const {
    return tile_rows({cta.p.index, cta.p.n, cta.p.total}, rows, at * cta.s.rows, cta.s.rows, direct);
  }

  __device__ __forceinline__ void load(const Rows& rows, int64_t at, bool direct, int i, Arrivals* filled) const {
    const TileRows where = rows_of(rows, at, direct);
    T* const to = cta.whole(i);
    if (!has_bulk_copies()) {
      load_tile(to, rows.p, where, cta.s.rows, cta.pitch, cta.s.width, slice, cta.p.d);
      arrive_when_copied(filled);
      return;
    }
    const RowMask mask = rows_there(where, cta.s.rows);
    const int bytes = bytes_of_row();
    clear_rest(to, mask, cta.s.rows, cta.pitch, columns(), cta.s.width);
    async_fence();  // zeros of now and of before, and then what is copied over them
    __syncwarp();
    if (cta.lane == 0) arrivals_expect(filled, mask.count() * bytes);
    __syncwarp();
    load_rows(to, rows, where, cta.s.rows, cta.pitch, slice, bytes, filled);
  }

  __device__ __forceinline__ void store(int stage, int64_t at) const {
    const TileRows rows = rows_of(cta.p.out, at, false);
    if (!has_bulk_copies())
      return store_tile(cta.p.out.p, cta.whole(stage), rows, cta.s.rows, cta.pitch, cta.s.width, slice, cta.p.d);
    const int bytes = bytes_of_row();
    each_row(rows, cta.s.rows, static_cast<T*>(cta.p.out.p) + slice, cta.whole(stage), cta.pitch,
             [&](T* to, const T* here) { bulk_store(to, here, bytes); });
    bulk_wait();
  }

  // Of the slice there are this many columns.
  __device__ __forceinline__ int columns() const {
    return cta.p.d - slice < cta.s.width ? static_cast<int>(cta.p.d - slice) : cta.s.width;
  }
  __device__ __forceinline__ int bytes_of_row() const { return columns() * static_cast<int>(sizeof(T)); }
};

}  // namespace fastreft
