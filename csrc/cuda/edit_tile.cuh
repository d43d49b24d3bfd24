// What the tensor-core kernels are made of: slices of the matrices and tiles of rows between global and shared memory,
// and the two products of a tile. A tile's columns are split among 8 warps; each warp moves and multiplies its own.
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

// Four neighbouring elements of matrix row `row` of a slice, zeros past r and d: matrix m's row k is row m * rank + k.
struct Quad {
  float x[4];
};
template <bool Fp32>
__device__ __forceinline__ Quad load_quad(const Matrix2* matrices, int count, int rank, int row, int64_t j, int r,
                                          int64_t d) {
  const int m = row / rank, k = row % rank;
  Quad quad = {};
  if (m >= count || k >= r || j >= d) return quad;
  if constexpr (Fp32) {
    load_pack<float, 4>(matrices[m].w.p, k * d + j, quad.x);
    if (matrices[m].minus.p != nullptr) {
      float y[4];
      load_pack<float, 4>(matrices[m].minus.p, k * d + j, y);
#pragma unroll
      for (int i = 0; i < 4; ++i) quad.x[i] -= y[i];
    }
  } else {
    load_matrix<4>(matrices[m], k * d + j, quad.x);
  }
  return quad;
}

// Rows [0, depth) of a slice, in T. Eight loads are on their way at a time: with few rows to edit this is the longest
// stretch of the kernel.
template <typename T, bool Fp32>
__device__ __forceinline__ void load_slice_as(T* to, const Matrix2* matrices, int count, int rank, int depth, int width,
                                              int64_t pitch, int r, int64_t d, int64_t column) {
  constexpr int Batch = 4, Threads = kFusedThreads;
  const int quads = width / 4, all = depth * quads;
  for (int e0 = threadIdx.x; e0 < all; e0 += Batch * Threads) {
    Quad quad[Batch];
#pragma unroll
    for (int q = 0; q < Batch; ++q) {
      const int e = e0 + q * Threads;
      quad[q] = load_quad<Fp32>(matrices, e < all ? count : 0, rank, e / quads, column + e % quads * 4, r, d);
    }
#pragma unroll
    for (int q = 0; q < Batch; ++q) {
      const int e = e0 + q * Threads;
      if (e >= all) continue;
      uint32_t* words = reinterpret_cast<uint32_t*>(to + e / quads * pitch + e % quads * 4);
      words[0] = pack<T>(quad[q].x[0], quad[q].x[1]);
      words[1] = pack<T>(quad[q].x[2], quad[q].x[3]);
    }
  }
}

template <typename T>
__device__ __forceinline__ void load_slice(T* to, const Matrix2* matrices, int count, int rank, int depth, int width,
                                           int64_t pitch, int r, int64_t d, int64_t column) {
  bool fp32 = true;
  for (int m = 0; m < count; ++m)
    fp32 = fp32 && matrices[m].w.type == DType::f32 &&
           (matrices[m].minus.p == nullptr || matrices[m].minus.type == DType::f32);
  if (fp32) {
    load_slice_as<T, true>(to, matrices, count, rank, depth, width, pitch, r, d, column);
  } else {
    load_slice_as<T, false>(to, matrices, count, rank, depth, width, pitch, r, d, column);
  }
}

// Where the rows of a tile lie, as offsets from Rows::p, -1 where there is none. Without an index that is arithmetic;
// with one, a lane looks up two rows (lane and lane + 32) and the lanes exchange them.
struct TileRows {
  Rows rows;
  int64_t first, n;
  bool listed;
  int64_t low, high;
  // All lanes of a warp ask together.
  __device__ __forceinline__ int64_t of(int m) const {
    if (!listed) return first + m < n ? row_offset(rows, first + m) : -1;
    const int64_t a = __shfl_sync(0xffffffffu, low, m % 32), b = __shfl_sync(0xffffffffu, high, m % 32);
    return m < 32 ? a : b;
  }
};
// `count` rows from the first-th listed one on. `direct`: the rows are numbered as listed, and only left out where the
// index says so (the rows kept before an edit); else each is the state's row that the index names.
__device__ __forceinline__ TileRows tile_rows(const Pass& p, const Rows& rows, int64_t first, int count, bool direct) {
  TileRows tile{rows, first, p.n, p.index != nullptr, -1, -1};
  if (!tile.listed) return tile;
  const auto offset = [&](int m) {
    const int64_t row = m < count ? listed_row(p.index, first + m, p.n, p.total) : -1;
    return row >= 0 ? row_offset(rows, direct ? first + m : row) : -1;
  };
  const int lane = threadIdx.x % 32;
  tile.low = offset(lane);
  tile.high = offset(lane + 32);
  return tile;
}

// The warp's columns of a tile, from global memory into `to`.
template <typename T>
__device__ __forceinline__ void load_tile(T* to, const void* from, const TileRows& rows, int count, int64_t pitch,
                                          int columns, int64_t column, int64_t d) {
  const int lane = threadIdx.x % 32, packs = columns / 8;  // count * packs is a multiple of 32: no lane stays behind
  for (int e = lane; e < count * packs; e += 32) {
    const int m = e / packs, j = e % packs * 8;
    const int64_t offset = rows.of(m);
    const bool valid = offset >= 0 && column + j < d;
    copy_async(to + m * pitch + j, static_cast<const T*>(from) + (valid ? offset + column + j : 0), valid);
  }
}

// The warp's columns of a tile, from shared memory to global rows.
template <typename T>
__device__ __forceinline__ void store_tile(void* to, const T* from, const TileRows& rows, int count, int64_t pitch,
                                           int columns, int64_t column, int64_t d) {
  const int lane = threadIdx.x % 32, packs = columns / 8;
  for (int e = lane; e < count * packs; e += 32) {
    const int m = e / packs, j = e % packs * 8;
    const int64_t offset = rows.of(m);
    if (offset >= 0 && column + j < d)
      store_streaming(static_cast<T*>(to) + offset + column + j,
                      *reinterpret_cast<const Pack<T, 8>*>(from + m * pitch + j));
  }
}

// sums (16 x Rank) = 16 rows of the tile times a matrix's slice, over the warp's columns; left in `partial`.
template <typename T, int Rank>
__device__ __forceinline__ void shrink_rows(const T* tile, const T* matrix, int64_t pitch, int columns, float* partial,
                                            int partial_pitch) {
  const int lane = threadIdx.x % 32;
  float sum[Rank / 8][4] = {};
  const T* a_row = tile + lane % 16 * pitch + lane / 16 * 8;
  // Lanes 16-31 address the next 8 coordinates; with 8 in all they repeat the first.
  const T* b_row = matrix + (lane % 8 + (Rank > 8 ? lane / 16 * 8 : 0)) * pitch + lane / 8 % 2 * 8;
  for (int j = 0; j < columns; j += 16) {
    uint32_t a[4];
    load_matrices(a, a_row + j);
#pragma unroll
    for (int k = 0; k < Rank; k += 16) {
      uint32_t b[4];
      load_matrices(b, b_row + k * pitch + j);
      multiply(sum[k / 8], a, b[0], b[1], T{});
      if constexpr (Rank > 8) multiply(sum[k / 8 + 1], a, b[2], b[3], T{});
    }
  }
#pragma unroll
  for (int k = 0; k < Rank / 8; ++k) {
    float* to = partial + lane / 4 * partial_pitch + k * 8 + lane % 4 * 2;
    *reinterpret_cast<float2*>(to) = make_float2(sum[k][0], sum[k][1]);
    *reinterpret_cast<float2*>(to + 8 * partial_pitch) = make_float2(sum[k][2], sum[k][3]);
  }
}

// 16 rows of the tile += coordinates times the matrices' slices, over the warp's columns, in place.
template <typename T, int Steps>
__device__ __forceinline__ void expand_rows(T* tile, const T* coordinates, int64_t coordinate_pitch, const T* matrices,
                                            int64_t pitch, int columns, int steps) {
  const int lane = threadIdx.x % 32;
  uint32_t a[Steps][4];
#pragma unroll
  for (int s = 0; s < Steps; ++s) {
    if (s < steps) load_matrices(a[s], coordinates + lane % 16 * coordinate_pitch + s * 16 + lane / 16 * 8);
  }
  for (int j = 0; j < columns; j += 16) {
    float sum[2][4] = {};
#pragma unroll
    for (int s = 0; s < Steps; ++s) {
      if (s >= steps) continue;
      uint32_t b[4];
      load_matrices_transposed(b, matrices + (s * 16 + lane % 16) * pitch + j + lane / 16 * 8);
      multiply(sum[0], a[s], b[0], b[1], T{});
      multiply(sum[1], a[s], b[2], b[3], T{});
    }
#pragma unroll
    for (int half = 0; half < 4; ++half) {
      uint32_t* place =
          reinterpret_cast<uint32_t*>(tile + (lane / 4 + half % 2 * 8) * pitch + j + half / 2 * 8 + lane % 4 * 2);
      const float2 x = unpack<T>(*place);
      const float* s = sum[half / 2] + half % 2 * 2;
      *place = pack<T>(x.x + s[0], x.y + s[1]);
    }
  }
}

// sums (Depth x 16 Pairs) += coordinates^T (Depth x 16 rows) times 16 rows of a tile, over the warp's columns.
template <typename T, int Depth, int Pairs>
__device__ __forceinline__ void add_products(float (&sums)[Depth / 16][2 * Pairs][4], const T* coordinates,
                                             int64_t coordinate_pitch, const T* tile, int64_t pitch, int columns) {
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
