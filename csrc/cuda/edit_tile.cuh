// What the tensor-core kernels are made of: slices of the matrices and tiles of rows between global and shared memory,
// and the two products of a tile. A tile's columns are split among 8 warps, each of which moves and expands its own.
#pragma once
#include "edit_copy.cuh"

namespace fastreft {

// Waits for the oldest of `stages` copies in flight.
__device__ __forceinline__ void wait_for_oldest(int stages) {
  if (stages == 2) {
    copy_wait<1>();
  } else if (stages == 3) {
    copy_wait<2>();
  } else {
    copy_wait<3>();
  }
}

// Batch x 4 neighbouring elements of row k of a matrix, 128 apart, from column j on: all loads are on their way before
// one is used. Past the row's end comes something else of it.
template <bool Fp32, int Batch>
__device__ __forceinline__ void load_quads(const Weight& w, int64_t row, int64_t j, int64_t d, float (&x)[Batch][4]) {
#pragma unroll
  for (int q = 0; q < Batch; ++q) {
    const int64_t at = row + (j + q * 128 < d ? j + q * 128 : 0);
    if constexpr (Fp32) {
      load_pack<float, 4>(w.p, at, x[q]);
    } else {
      load_weight<4>(w, at, x[q]);
    }
  }
}

// Rows [0, depth) of a slice, in T, zeros past r and d and where there is no matrix: row m * Rank + k is row k of the
// m-th. A warp takes a row at a time: with few rows to edit this is the longest stretch of the kernel.
template <typename T, int Rank, bool Fp32>
__device__ __forceinline__ void load_slice_as(T* to, const Matrix2* matrices, int count, int depth, int width,
                                              int pitch, int r, int64_t d, int64_t column) {
  constexpr int Batch = Fp32 ? 4 : 1;
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < depth; row += kFusedWarps) {
    const int k = row % Rank;
    const bool there = row / Rank < count && k < r && matrices[row / Rank].w.p != nullptr;
    const Matrix2& matrix = matrices[there ? row / Rank : 0];
    for (int j0 = lane * 4; j0 < width; j0 += Batch * 128) {
      float x[Batch][4] = {}, y[Batch][4] = {};
      if (there) load_quads<Fp32, Batch>(matrix.w, k * d, column + j0, d, x);
      if (there && matrix.minus.p != nullptr) load_quads<Fp32, Batch>(matrix.minus, k * d, column + j0, d, y);
#pragma unroll
      for (int q = 0; q < Batch; ++q) {
        const int j = j0 + q * 128;
        if (j >= width) continue;
        uint2 words = {};
        if (column + j < d) {
          words.x = pack<T>(x[q][0] - y[q][0], x[q][1] - y[q][1]);
          words.y = pack<T>(x[q][2] - y[q][2], x[q][3] - y[q][3]);
        }
        *reinterpret_cast<uint2*>(to + row * pitch + j) = words;
      }
    }
  }
}

// Where the rows of a tile lie, as offsets from Rows::p, -1 where there is none. Rows that follow one another are
// counted; others a lane looks up two at a time (its own number and 32 more), and the lanes exchange them.
struct TileRows {
  int64_t first, stride;  // where they are counted: the first one's offset
  int count;              // rows there are, where they are counted
  bool looked_up;
  int64_t low, high;
  // Row m, which is below 32 for all lanes or for none; all lanes of a warp ask together.
  __device__ __forceinline__ int64_t of(int m) const { return __shfl_sync(0xffffffffu, m < 32 ? low : high, m % 32); }
  // Row m of `rows`, where m is a lane's own number, or that and 32.
  __device__ __forceinline__ int64_t own(int m, int rows) const {
    if (m >= rows) return -1;
    if (looked_up) return m < 32 ? low : high;
    return m < count ? first + m * stride : -1;
  }
};
// Which rows there are: [0, n), or those of `total` that the index [n] names.
struct Listed {
  const int64_t* index;
  int64_t n, total;
};
// `count` rows from the first-th listed one on. `direct`: the rows are numbered as listed, and only left out where the
// index says so (the rows kept before an edit); else each is the state's row that the index names.
__device__ __forceinline__ TileRows tile_rows(const Listed& listed, const Rows& rows, int64_t first, int count,
                                              bool direct) {
  TileRows tile{first * rows.outer_stride, rows.outer_stride, count, listed.index != nullptr || rows.inner > 1, -1, -1};
  if (!tile.looked_up) {
    if (listed.n - first < count) tile.count = static_cast<int>(listed.n - first);
    return tile;
  }
  const auto offset = [&](int m) {
    const int64_t row = m < count ? listed_row(listed.index, first + m, listed.n, listed.total) : -1;
    return row >= 0 ? row_offset(rows, direct ? first + m : row) : -1;
  };
  const int lane = threadIdx.x % 32;
  tile.low = offset(lane);
  if (count > 32) tile.high = offset(lane + 32);
  return tile;
}

// For every 8 elements of a warp's columns of a tile, which begin at `column` of `d`, 4 times 4 rows at a time: first
// read(q, element of the tile) for q = 0 .. 3, then move(q, element of the tile, element of the row in global memory,
// whether there is such a row). 8 lanes take a row, so that what moves is whole lines of 128 bytes.
template <typename T, typename G, typename Read, typename Move>
__device__ __forceinline__ void each_eight(T* tile, G* global, const TileRows& rows, int count, int pitch, int columns,
                                           int64_t column, int64_t d, const Read& read, const Move& move) {
  const int lane = threadIdx.x % 32, own = lane / 8, step = 4 * pitch;
  for (int j0 = 0; j0 < columns; j0 += 64) {
    const int j = j0 + lane % 8 * 8;
    const bool mine = j < columns, inside = column + j < d;
    T* there = tile + own * pitch + j;
    G* from = global + (column + j);
    if (!rows.looked_up) {
      if (!mine) continue;
      const int left = inside ? rows.count - own : 0;
      from += rows.first + own * rows.stride;
#pragma unroll 1
      for (int m = 0; m < count; m += 16, there += 4 * step) {
#pragma unroll
        for (int q = 0; q < 4; ++q) read(q, there + q * step);
#pragma unroll
        for (int q = 0; q < 4; ++q, from += 4 * rows.stride) move(q, there + q * step, from, m + 4 * q < left);
      }
    } else {
#pragma unroll 1
      for (int m = 0; m < count; m += 16, there += 4 * step) {
        int64_t offset[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) offset[q] = rows.of(m + 4 * q + own);
        if (!mine) continue;
#pragma unroll
        for (int q = 0; q < 4; ++q) read(q, there + q * step);
#pragma unroll
        for (int q = 0; q < 4; ++q) move(q, there + q * step, from + offset[q], inside && offset[q] >= 0);
      }
    }
  }
}

// The warp's columns of a tile, from global memory into `to`.
template <typename T>
__device__ __forceinline__ void load_tile(T* to, const void* from, const TileRows& rows, int count, int pitch,
                                          int columns, int64_t column, int64_t d) {
  each_eight(
      to, static_cast<const T*>(from), rows, count, pitch, columns, column, d, [](int, T*) {},
      [](int, T* there, const T* here, bool valid) { copy_async(there, here, valid); });
}

// The warp's columns of a tile, from shared memory to global rows.
template <typename T>
__device__ __forceinline__ void store_tile(void* to, const T* from, const TileRows& rows, int count, int pitch,
                                           int columns, int64_t column, int64_t d) {
  Pack<T, 8> x[4];
  each_eight(
      from, static_cast<T*>(to), rows, count, pitch, columns, column, d,
      [&](int q, const T* here) { x[q] = *reinterpret_cast<const Pack<T, 8>*>(here); },
      [&](int q, const T*, T* there, bool valid) {
        if (valid) store_streaming(there, x[q]);
      });
}

// sums (16 Blocks x 8 Eights) = rows of a tile times a matrix's rows, over `columns` columns from where both begin.
template <int Unroll, typename T, int Blocks, int Eights>
__device__ __forceinline__ void shrink_rows(float (&sums)[Blocks][Eights][4], const T* tile, const T* matrix, int pitch,
                                            int columns) {
  const int lane = threadIdx.x % 32;
  const T* a_row = tile + lane % 16 * pitch + lane / 16 * 8;
  // Lanes 16-31 address the next 8 coordinates; with 8 in all they repeat the first.
  const T* b_row = matrix + (lane % 8 + (Eights > 1 ? lane / 16 * 8 : 0)) * pitch + lane / 8 % 2 * 8;
#pragma unroll(Unroll)
  for (int j = 0; j < columns; j += 16) {
    uint32_t b[4];
    load_matrices(b, b_row + j);
#pragma unroll
    for (int m = 0; m < Blocks; ++m) {
      uint32_t a[4];
      load_matrices(a, a_row + m * 16 * pitch + j);
      multiply(sums[m][0], a, b[0], b[1], T{});
      if constexpr (Eights > 1) multiply(sums[m][1], a, b[2], b[3], T{});
    }
  }
}

// 16 Blocks rows and 16 Wide columns of a tile as the sums of products are laid out, which is load_matrices' way; and
// back, when all of them have been loaded.
template <typename T, int Blocks, int Wide>
__device__ __forceinline__ void sums_of_tile(float (&sum)[Wide][Blocks][2][4], const T* tile, int pitch) {
  const int lane = threadIdx.x % 32, at = lane % 16 * pitch + lane / 16 * 8;
#pragma unroll
  for (int w = 0; w < Wide; ++w) {
#pragma unroll
    for (int m = 0; m < Blocks; ++m) {
      uint32_t x[4];
      load_matrices(x, tile + m * 16 * pitch + w * 16 + at);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const float2 two = unpack<T>(x[q]);
        sum[w][m][q / 2][q % 2 * 2] = two.x;
        sum[w][m][q / 2][q % 2 * 2 + 1] = two.y;
      }
    }
  }
}
template <typename T, int Blocks, int Wide>
__device__ __forceinline__ void sums_to_tile(T* tile, const float (&sum)[Wide][Blocks][2][4], int pitch) {
#pragma unroll
  for (int w = 0; w < Wide; ++w) {
#pragma unroll
    for (int m = 0; m < Blocks; ++m) {
      uint32_t x[4];
#pragma unroll
      for (int q = 0; q < 4; ++q) x[q] = pack<T>(sum[w][m][q / 2][q % 2 * 2], sum[w][m][q / 2][q % 2 * 2 + 1]);
      store_block(tile + m * 16 * pitch + w * 16, pitch, x);
    }
  }
}

// 16 Blocks rows and 16 Wide columns of the tile += coordinates (a) times the matrices' slices, in place. `Half`: of
// one step's 16 coordinates there are 8.
template <typename T, int Steps, int Blocks, int Wide, bool Half>
__device__ __forceinline__ void expand_block(T* tile, const uint32_t (&a)[Blocks][Steps][4], const T* matrices,
                                             int pitch, int steps) {
  const int lane = threadIdx.x % 32, at = lane % 16 * pitch + lane / 16 * 8;
  float sum[Wide][Blocks][2][4];
  sums_of_tile(sum, tile, pitch);
  if constexpr (Half) {
    uint32_t b[4];  // 8 rows of 16 Wide columns
    load_matrices_transposed(b, matrices + lane % 8 * pitch + lane / 8 % (2 * Wide) * 8);
#pragma unroll
    for (int w = 0; w < Wide; ++w) {
#pragma unroll
      for (int m = 0; m < Blocks; ++m) {
        multiply(sum[w][m][0], a[m][0], b[2 * w], 0, T{});
        multiply(sum[w][m][1], a[m][0], b[2 * w + 1], 0, T{});
      }
    }
  }
#pragma unroll
  for (int s = 0; s < (Half ? 0 : Steps); ++s) {
    if (s >= steps) continue;
#pragma unroll
    for (int w = 0; w < Wide; ++w) {
      uint32_t b[4];
      load_matrices_transposed(b, matrices + s * 16 * pitch + w * 16 + at);
#pragma unroll
      for (int m = 0; m < Blocks; ++m) {
        multiply(sum[w][m][0], a[m][s], b[0], b[1], T{});
        multiply(sum[w][m][1], a[m][s], b[2], b[3], T{});
      }
    }
  }
  sums_to_tile(tile, sum, pitch);
}

// The same for all of the warp's columns.
template <typename T, int Steps, int Blocks, bool Half>
__device__ __forceinline__ void expand_rows(T* tile, const T* coordinates, int coordinate_pitch, const T* matrices,
                                            int pitch, int columns, int steps) {
  const int lane = threadIdx.x % 32;
  uint32_t a[Blocks][Steps][4];
#pragma unroll
  for (int m = 0; m < Blocks; ++m) {
#pragma unroll
    for (int s = 0; s < Steps; ++s) {
      if (s < steps)
        load_matrices(a[m][s],
                      coordinates + (m * 16 + lane % 16) * coordinate_pitch + s * 16 + (Half ? 0 : lane / 16 * 8));
      if (Half) a[m][s][2] = a[m][s][3] = 0;
    }
  }
  constexpr int Wide = Blocks == 1 && Steps == 4 ? 1 : 2;  // both_kernel at rank 32 has no registers left
  int j = 0;
  for (; j + 16 * Wide <= columns; j += 16 * Wide)
    expand_block<T, Steps, Blocks, Wide, Half>(tile + j, a, matrices + j, pitch, steps);
  if (Wide > 1 && j < columns) expand_block<T, Steps, Blocks, 1, Half>(tile + j, a, matrices + j, pitch, steps);
}

// sums (Depth x 16 Pairs) += coordinates^T (Depth x 16 rows) times 16 rows of a tile, over the warp's columns.
template <typename T, int Depth, int Pairs>
__device__ __forceinline__ void add_products(float (&sums)[Depth / 16][2 * Pairs][4], const T* coordinates,
                                             int coordinate_pitch, const T* tile, int pitch, int columns) {
  const int lane = threadIdx.x % 32;
  uint32_t a[Depth / 16][4];
#pragma unroll
  for (int k = 0; k < Depth / 16; ++k)
    load_matrices_transposed(a[k],
                             coordinates + (lane % 8 + lane / 16 * 8) * coordinate_pitch + k * 16 + lane / 8 % 2 * 8);
#pragma unroll
  for (int pair = 0; pair < Pairs; ++pair) {
    if (pair * 16 >= columns) continue;
    uint32_t b[4];
    load_matrices_transposed(b, tile + lane % 16 * pitch + pair * 16 + lane / 16 * 8);
#pragma unroll
    for (int k = 0; k < Depth / 16; ++k) {
      multiply(sums[k][2 * pair], a[k], b[0], b[1], T{});
      multiply(sums[k][2 * pair + 1], a[k], b[2], b[3], T{});
    }
  }
}

// The warp's sums to rows [0, r) of a partial sum (r, d).
template <int Depth, int Pairs>
__device__ __forceinline__ void store_sums(float* to, const float (&sums)[Depth / 16][2 * Pairs][4], int r, int64_t d,
                                           int columns, int64_t column) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < Depth / 16; ++k) {
#pragma unroll
    for (int eight = 0; eight < 2 * Pairs; ++eight) {
      const int64_t j = column + eight * 8 + lane % 4 * 2;
      if (eight * 8 >= columns || j >= d) continue;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = k * 16 + half * 8 + lane / 4;
        if (row < r)
          *reinterpret_cast<float2*>(to + row * d + j) =
              make_float2(sums[k][eight][2 * half], sums[k][eight][2 * half + 1]);
      }
    }
  }
}

}  // namespace fastreft
