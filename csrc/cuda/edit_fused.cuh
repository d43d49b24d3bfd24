// The edit on tensor cores, weights stationary: one pass over 16-bit rows, read once and written once.
//
// A cluster of CTAs owns a tile of rows, each CTA a slice of `width` columns, each of its 8 warps an eighth of those.
// A CTA keeps its slices of the matrices in shared memory for as long as it lives and walks over tiles:
//     load       a warp copies its columns of the tile asynchronously, `stages` tiles ahead. Nobody else touches them,
//                so no CTA barrier guards the tile buffers
//     shrink     mma: rows x columns of the tile times the matrices' slices -> the warp's partial sums
//     reduce     the 8 warps' sums in order, sent to the rank that owns the row (about rows / cluster rows each)
//     coordinate the owner adds the ranks' sums in order, once, and sends the coordinates to every rank
//     expand     mma: coordinates times the matrices' slices, added to the tile where it lies, then 16-byte stores
// Two cluster barriers a tile. What guards what: `received` and `coordinates` are written only by threads that have
// passed the barrier before which their last readers arrived; see the marks (1) and (2).
//
// Padding: coordinates past r, columns past d and rows past n are zeros in shared memory, never poison.
#pragma once
#include "edit_copy.cuh"

namespace fastreft {

struct Fused {
  Pass pass;
  FusedShape shape;
  int64_t tiles = 0;
  int64_t clusters = 0;  // that edit; CTAs behind them copy
};

// Where only one of two matrices is there it comes first in shared memory.
__device__ __forceinline__ int only_second(const Matrix2 (&pair)[2]) { return pair[0].w.p != nullptr ? 0 : 1; }

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
  constexpr int Batch = 4, Threads = kFusedWarps * 32;
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

// The owner's part: two neighbouring coordinates of one row, from the ranks' sums.
template <bool Backward>
__device__ __forceinline__ void coordinate(const Pass& p, int64_t i, int k, float s0, float s1, bool live, float& first,
                                           float& second) {
  first = second = 0;
  if (k >= p.r || i >= p.n) return;
  if constexpr (Backward) {
    const float gz = live ? s0 : 0.f;
    const float gp = live ? backward_coordinate(p, i, k, gz) : 0.f;
    if (p.gz != nullptr) static_cast<float*>(p.gz)[i * p.r + k] = gz;
    if (p.gp != nullptr) static_cast<float*>(p.gp)[i * p.r + k] = gp;
    first = gp;
    second = -gz;
  } else {
    float a = 0;
    if (live) first = forward_coordinate(p, k, s0, s1, a);
    keep_coordinate(p, i, k, first, a);
  }
}

// Coordinates k, k + 1 of row i for sums_kernel, whose depth is 16 at least: zeros follow where Rank is less.
template <typename T, int Rank>
__device__ __forceinline__ void keep_packed(const Pass& p, int64_t i, int k, bool live, const float (&gp)[2],
                                            const float (&minus_gz)[2]) {
  const int kept = p.act == Act::identity ? p.r : 2 * p.r;
  float z[2] = {};
#pragma unroll
  for (int pair = 0; pair < 2; ++pair) {
    if (live && k + pair < p.r) z[pair] = static_cast<const float*>(p.z)[i * kept + k + pair];
  }
  uint32_t* to = reinterpret_cast<uint32_t*>(static_cast<T*>(p.packed) + i * 3 * p.packed_depth + k);
  const int third = p.packed_depth / 2;
  to[0] = pack<T>(z[0], z[1]);
  to[third] = pack<T>(gp[0], gp[1]);
  to[2 * third] = pack<T>(-minus_gz[0], -minus_gz[1]);
  if (p.packed_depth > Rank) to[Rank / 2] = to[third + Rank / 2] = to[2 * third + Rank / 2] = 0;
}

// The coordinates of the rows that this rank of the cluster owns, from what the ranks sent, to every rank.
template <typename T, int Rank, bool Backward>
__device__ __forceinline__ void work_out_coordinates(const Pass& p, const FusedShape& s, const FusedLayout& at,
                                                     int64_t first, int rank, const float* received, T* coordinates) {
  const int sums = s.shrinks * Rank, own = own_rows(s);
  const int shrink_from = only_second(p.shrink), expand_from = only_second(p.expand);
  for (int e = threadIdx.x; e < own * Rank / 2; e += kFusedWarps * 32) {
    const int m = rank * own + e / (Rank / 2), k = e % (Rank / 2) * 2;
    if (m >= s.rows) continue;
    const int64_t i = first + m;
    const bool live = listed_row(p.index, i, p.n, p.total) >= 0;
    float u[2] = {}, v[2] = {};
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      float total[2] = {};
      for (int q = 0; q < s.shrinks; ++q) {
        float sum = 0;
        for (int from = 0; from < s.cluster; ++from)
          sum += received[(from * own + m % own) * sums + q * Rank + k + pair];
        (q + shrink_from == 0 ? total[0] : total[1]) = sum;
      }
      coordinate<Backward>(p, i, k + pair, total[0], total[1], live, u[pair], v[pair]);
    }
    if (Backward && p.packed != nullptr && i < p.n) keep_packed<T, Rank>(p, i, k, live, u, v);
    for (int q = 0; q < s.expands; ++q) {
      const bool gradient_of_p = q + expand_from == 1;
      const uint32_t two = gradient_of_p ? pack<T>(v[0], v[1]) : pack<T>(u[0], u[1]);
      uint32_t* to = reinterpret_cast<uint32_t*>(coordinates + m * at.coordinate_pitch + q * Rank + k);
      for (int other = 0; other < s.cluster; ++other) *(s.cluster > 1 ? of_rank(to, other) : to) = two;
    }
  }
}

template <typename T, int Rank, bool Backward>
__global__ void __launch_bounds__(kFusedWarps * 32, per_sm_of_rank(Rank))
    fused_kernel(const __grid_constant__ Fused f) {
  const Pass& p = f.pass;
  const FusedShape& s = f.shape;
  if (blockIdx.x >= f.clusters * s.cluster)
    return copy_unlisted<T, 8, kFusedWarps * 32>(p, blockIdx.x - f.clusters * s.cluster);
  const FusedLayout at = fused_layout(s);
  char* shared = shared_memory();
  T* shrink = reinterpret_cast<T*>(shared + at.shrink);
  T* expand = reinterpret_cast<T*>(shared + at.expand);
  T* tiles = reinterpret_cast<T*>(shared + at.tiles);
  float* partial = reinterpret_cast<float*>(shared + at.partial);
  float* received = reinterpret_cast<float*>(shared + at.received);
  T* coordinates = reinterpret_cast<T*>(shared + at.coordinates);

  const int warp = threadIdx.x / 32, rank = s.cluster > 1 ? cluster_rank() : 0;
  const int64_t cluster = blockIdx.x / s.cluster, clusters = f.clusters;
  const int columns = s.width / kFusedWarps;
  const int64_t slice = static_cast<int64_t>(rank) * s.width, column = slice + warp * columns;
  const int64_t tile_size = s.rows * at.pitch;
  const int depth = s.expands * Rank > 16 ? s.expands * Rank : 16;
  const int sums = s.shrinks * Rank, own = own_rows(s);
  const int shrink_from = only_second(p.shrink), expand_from = only_second(p.expand);

  const auto fetch = [&](int64_t tile, int stage) {
    if (tile < f.tiles)
      load_tile(tiles + stage * tile_size + warp * columns, p.in.p, tile_rows(p, p.in, tile * s.rows, s.rows, false),
                s.rows, at.pitch, columns, column, p.d);
    copy_commit();
  };
  for (int stage = 0; stage < s.stages; ++stage) fetch(cluster + stage * clusters, stage);
  load_slice(shrink, p.shrink + shrink_from, s.shrinks, Rank, s.shrinks * Rank, s.width, at.pitch, p.r, p.d, slice);
  load_slice(expand, p.expand + expand_from, s.expands, Rank, depth, s.width, at.pitch, p.r, p.d, slice);
  for (int e = threadIdx.x; e < s.rows * at.coordinate_pitch; e += kFusedWarps * 32) coordinates[e] = rounded<T>(0.f);
  cluster_sync(s.cluster);  // and every CTA of the cluster has started: its shared memory may be written

  int stage = 0;
  for (int64_t tile = cluster; tile < f.tiles; tile += clusters) {
    const int64_t first = tile * s.rows;
    T* mine = tiles + stage * tile_size + warp * columns;
    wait_for_oldest(s.stages);
    __syncwarp();

    for (int m = 0; m < s.rows; m += 16) {
      for (int q = 0; q < s.shrinks; ++q)
        shrink_rows<T, Rank>(mine + m * at.pitch, shrink + q * Rank * at.pitch + warp * columns, at.pitch, columns,
                             partial + (warp * s.rows + m) * sums + q * Rank, sums);
    }
    if (!Backward && p.saved != nullptr) {
      const Rows saved{p.saved, 1, p.d, 0};
      store_tile(p.saved, mine, tile_rows(p, saved, first, s.rows, true), s.rows, at.pitch, columns, column, p.d);
    }
    __syncthreads();

    for (int e = threadIdx.x; e < s.rows * sums; e += kFusedWarps * 32) {
      float sum = 0;
      for (int w = 0; w < kFusedWarps; ++w) sum += partial[w * s.rows * sums + e];
      const int m = e / sums, k = e % sums;
      float* to = received + (rank * own + m % own) * sums + k;
      *(s.cluster > 1 ? of_rank(to, m / own) : to) = sum;
    }
    cluster_sync(s.cluster);  // (1) all sums have arrived; nobody reads the coordinates of the tile before any more

    work_out_coordinates<T, Rank, Backward>(p, s, at, first, rank, received, coordinates);
    cluster_sync(s.cluster);  // (2) all coordinates have arrived; nobody reads `received` any more

    if (p.out.p != nullptr) {
      constexpr int steps = Backward ? (Rank > 8 ? Rank / 8 : 1) : (Rank > 16 ? Rank / 16 : 1);
      for (int m = 0; m < s.rows; m += 16)
        expand_rows<T, steps>(mine + m * at.pitch, coordinates + m * at.coordinate_pitch, at.coordinate_pitch,
                              expand + warp * columns, at.pitch, columns, s.expands > 0 ? depth / 16 : 0);
      __syncwarp();
      store_tile(p.out.p, mine, tile_rows(p, p.out, first, s.rows, false), s.rows, at.pitch, columns, column, p.d);
    }
    __syncwarp();
    fetch(tile + s.stages * clusters, stage);
    stage = stage + 1 < s.stages ? stage + 1 : 0;
  }
  copy_wait<0>();
}

}  // namespace fastreft
