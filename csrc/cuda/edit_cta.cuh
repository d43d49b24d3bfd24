// What a CTA of the three tensor-core kernels (edit_fused.cuh, edit_both.cuh, edit_streamed.cuh) knows of its place:
// what lies where in its shared memory, which columns are its warp's, which matrices are there; and the steps of a tile
// that are the same in all three.
#pragma once
#include "edit_tile.cuh"

namespace fastreft {

// Where only one of two matrices is there it comes first in shared memory.
__device__ __forceinline__ int only_second(const Matrix2 (&pair)[2]) { return pair[0].w.p != nullptr ? 0 : 1; }

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

// mma's steps of 16 over the coordinates of an expand: the backward's can be two matrices' (gp and gz).
template <int Rank, bool Backward>
constexpr int kExpandSteps = Backward ? (Rank > 8 ? Rank / 8 : 1) : (Rank > 16 ? Rank / 16 : 1);

// `Shrinks`: how many matrices shrink, the first ones, where the kernel knows it; 0 where the shape says it.
template <typename T, int Rank, int Shrinks = 0>
struct Cta {
  const Pass& p;
  const FusedShape& s;
  FusedLayout at;
  T *shrink, *expand, *tiles;  // in shared memory, as FusedLayout says
  float *partial, *received;
  T* coordinates;
  int rank;                      // in the cluster
  int warp, columns;             // this warp, and how many columns it has
  int64_t tile_size;             // elements
  int shrinks, sums;             // matrices that shrink, and their sums of a row
  int depth;                     // coordinates of a row that expand, padded to mma's 16
  int own;                       // rows whose coordinates this rank works out
  int shrink_from, expand_from;  // the first matrix that is there

  __device__ __forceinline__ Cta(const Pass& p, const FusedShape& s, int rank)
      : p(p), s(s), at(fused_layout(s)), rank(rank) {
    char* shared = shared_memory();
    shrink = reinterpret_cast<T*>(shared + at.shrink);
    expand = reinterpret_cast<T*>(shared + at.expand);
    tiles = reinterpret_cast<T*>(shared + at.tiles);
    partial = reinterpret_cast<float*>(shared + at.partial);
    received = reinterpret_cast<float*>(shared + at.received);
    coordinates = reinterpret_cast<T*>(shared + at.coordinates);
    warp = threadIdx.x / 32;
    columns = s.width / kFusedWarps;
    tile_size = s.rows * at.pitch;
    shrinks = Shrinks > 0 ? Shrinks : s.shrinks;
    sums = shrinks * Rank;
    depth = s.expands * Rank > 16 ? s.expands * Rank : 16;
    own = own_rows(s);
    shrink_from = Shrinks > 0 ? 0 : only_second(p.shrink);
    expand_from = only_second(p.expand);
  }

  // The warp's columns of the i-th tile in shared memory.
  __device__ __forceinline__ T* tile(int64_t i) const { return tiles + i * tile_size + warp * columns; }

  // Where they begin in global memory, of a slice that begins at `slice` there.
  __device__ __forceinline__ int64_t column(int64_t slice) const { return slice + warp * columns; }

  // The warp's columns of a tile, which begin at `column`, from `rows` in global memory (see tile_rows) and to
  // Pass::out.
  __device__ __forceinline__ void load(T* to, const Rows& rows, int64_t first, bool direct, int64_t column) const {
    load_tile(to, rows.p, tile_rows(p, rows, first, s.rows, direct), s.rows, at.pitch, columns, column, p.d);
  }
  __device__ __forceinline__ void store(const T* mine, int64_t first, int64_t column) const {
    store_tile(p.out.p, mine, tile_rows(p, p.out, first, s.rows, false), s.rows, at.pitch, columns, column, p.d);
  }

  // The slices of the matrices that begin at column `slice`.
  __device__ __forceinline__ void load_shrink(int64_t slice) const {
    load_slice(shrink, p.shrink + shrink_from, shrinks, Rank, sums, s.width, at.pitch, p.r, p.d, slice);
  }
  __device__ __forceinline__ void load_expand(int64_t slice) const {
    load_slice(expand, p.expand + expand_from, s.expands, Rank, depth, s.width, at.pitch, p.r, p.d, slice);
  }

  // Padding is zeros for as long as the CTA lives.
  __device__ __forceinline__ void clear_coordinates() const {
    for (int e = threadIdx.x; e < s.rows * at.coordinate_pitch; e += kFusedThreads) coordinates[e] = rounded<T>(0.f);
  }

  // The warp's sums of a tile, left in `partial`.
  __device__ __forceinline__ void shrink_tile(const T* mine) const {
    for (int m = 0; m < s.rows; m += 16) {
      for (int q = 0; q < shrinks; ++q)
        shrink_rows<T, Rank>(mine + m * at.pitch, shrink + q * Rank * at.pitch + warp * columns, at.pitch, columns,
                             partial + (warp * s.rows + m) * sums + q * Rank, sums);
    }
  }

  // `sum` and the warps' e-th sums, in order.
  __device__ __forceinline__ float add_warps(int e, float sum) const {
    for (int w = 0; w < kFusedWarps; ++w) sum += partial[w * s.rows * sums + e];
    return sum;
  }

  // The CTA's sums, each to the rank that owns its row.
  __device__ __forceinline__ void send_sums() const {
    for (int e = threadIdx.x; e < s.rows * sums; e += kFusedThreads) {
      const float sum = add_warps(e, 0);
      const int m = e / sums, k = e % sums;
      float* to = received + (rank * own + m % own) * sums + k;
      *(s.cluster > 1 ? of_rank(to, m / own) : to) = sum;
    }
  }

  // The coordinates of the rows that this rank of the cluster owns, from what the ranks sent, to every rank.
  template <bool Backward>
  __device__ __forceinline__ void work_out_coordinates(int64_t first) const {
    for (int e = threadIdx.x; e < own * Rank / 2; e += kFusedThreads) {
      const int m = rank * own + e / (Rank / 2), k = e % (Rank / 2) * 2;
      if (m >= s.rows) continue;
      const int64_t i = first + m;
      const bool live = listed_row(p.index, i, p.n, p.total) >= 0;
      float u[2] = {}, v[2] = {};
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        float total[2] = {};
        for (int q = 0; q < shrinks; ++q) {
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

  // The coordinates times the matrices' slices, added to the warp's columns of the tile.
  template <bool Backward>
  __device__ __forceinline__ void expand_tile(T* mine) const {
    for (int m = 0; m < s.rows; m += 16)
      expand_rows<T, kExpandSteps<Rank, Backward>>(mine + m * at.pitch, coordinates + m * at.coordinate_pitch,
                                                   at.coordinate_pitch, expand + warp * columns, at.pitch, columns,
                                                   s.expands > 0 ? depth / 16 : 0);
    __syncwarp();
  }
};

}  // namespace fastreft
