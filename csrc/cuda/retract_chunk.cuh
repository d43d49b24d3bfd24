// Chunks of a matrix in shared memory, and what is done with them: fetched, multiplied, kept. The matrix (r, d) is one
// cluster's; each CTA owns a range of columns, all of which stay in shared memory where they fit (`resident`: one
// chunk, each byte fetched once), else they come chunk by chunk, anew for every pass.
//
// Elements move in quads, 16 bytes of the type that sums run in (kVector<C> of them), or one by one where alignment
// or d do not allow it. A chunk's rows are padded to whole quads, with zeros.
//
// Precision: products in fp32 over at most kTerms columns (fp64 for fp64), everything that adds those up in fp64.
#pragma once
#include "adam.cuh"
#include "edit_common.cuh"
#include "policy_retract.h"

namespace fastreft {

constexpr int kTerms = 32;   // products added up in fp32 before they go to an fp64 sum
constexpr int kFetches = 4;  // loads of a thread that are on their way together

// What a CTA of the cluster works with; in shared memory, in order not to take every thread's registers.
struct Place {
  int rank, cluster;
  int r;                 // rows
  int64_t d;             // columns
  int64_t begin, end;    // its columns
  int terms;             // columns of a chunk
  int pitch;             // elements from one row of a chunk to the next: no bank conflicts between 8 rows' quads
  bool resident;         // one chunk has all of the CTA's columns, and stays
  bool vector;           // all of the item's memory can be accessed in quads
  double* S;             // [r, r] the sum over the cluster, then its factor; in every CTA
  double* part;          // [r, r] the sum over this CTA's columns; later the matrix that is applied, as the sums' type
  double* received;      // [cluster, share] the parts of the sum that this CTA adds up, from all of the cluster
  Arrivals parts, sums;  // count what is received, and what comes to S
  void* Y;               // the matrix in memory, as the sums' type, between the step and the retraction
  int item;              // which of the list it is
  Adam<double> adam;     // of a step
};
// A barrier over the threads of a CTA that retract: others may be at work beside them.
__device__ __forceinline__ void meet() { barrier_of<kRetractThreads>(); }
// [kRetractThreads] for sums across warps, behind the place.
__device__ __forceinline__ double* warp_sums() { return reinterpret_cast<double*>(shared_memory() + sizeof(Place)); }

// f(T{}) of the type in memory of what is worked on as C, asked once for a chunk or an item.
template <typename C, typename F>
__device__ __forceinline__ void by_stored(DType type, const F& f) {
  if constexpr (sizeof(C) == 8) {
    f(double{});
  } else if (type == DType::bf16) {
    f(bf16{});
  } else if (type == DType::f16) {
    f(f16{});
  } else {
    f(float{});
  }
}

// A thread's places in [rows, across], kRetractThreads from one to the next.
struct Walk {
  int rows, across, row, column, row_step, column_step;
  __device__ __forceinline__ Walk(int rows, int across)
      : rows(rows),
        across(across),
        row(static_cast<int>(threadIdx.x / static_cast<unsigned>(across))),
        column(static_cast<int>(threadIdx.x % static_cast<unsigned>(across))),
        row_step(static_cast<int>(kRetractThreads / static_cast<unsigned>(across))),
        column_step(static_cast<int>(kRetractThreads % static_cast<unsigned>(across))) {}
  __device__ __forceinline__ bool there() const { return row < rows; }
  __device__ __forceinline__ void next() {
    row += row_step;
    column += column_step;
    if (column >= across) {
      column -= across;
      ++row;
    }
  }
};

// The places of `valid` columns of r rows, quad by quad or one by one, as memory is accessed.
template <typename C>
__device__ __forceinline__ Walk walk_memory(const Place& at, int valid) {
  return Walk(at.r, at.vector ? valid / kVector<C> : valid);
}

// `valid` columns of rows d elements apart into a chunk, V elements at a time.
template <typename T, int V, typename C>
__device__ __forceinline__ void fetch(int pitch, Walk walk, const T* from, int64_t d, C* to) {
#pragma unroll 1
  while (walk.there()) {
    Pack<T, V> x[kFetches] = {};  // unset, they would count as alive from the kernel's start
    int where[kFetches];
#pragma unroll
    for (int q = 0; q < kFetches; ++q, walk.next()) {
      where[q] = walk.there() ? walk.row * pitch + walk.column * V : -1;
      if (walk.there()) x[q] = *reinterpret_cast<const Pack<T, V>*>(from + walk.row * d + walk.column * V);
    }
#pragma unroll
    for (int q = 0; q < kFetches; ++q) {
      if (where[q] < 0) break;
      Pack<C, V> y;
#pragma unroll
      for (int v = 0; v < V; ++v) y.x[v] = to_float(x[q].x[v]);
      *reinterpret_cast<Pack<C, V>*>(to + where[q]) = y;
    }
  }
}

// The other way, rounded to T.
template <typename T, int V, typename C>
__device__ __forceinline__ void keep(int pitch, Walk walk, const C* from, T* to, int64_t d) {
#pragma unroll 1
  for (; walk.there(); walk.next()) {
    const Pack<C, V> x = *reinterpret_cast<const Pack<C, V>*>(from + walk.row * pitch + walk.column * V);
    Pack<T, V> y;
#pragma unroll
    for (int v = 0; v < V; ++v) y.x[v] = rounded<T>(x.x[v]);
    *reinterpret_cast<Pack<T, V>*>(to + walk.row * d + walk.column * V) = y;
  }
}

// Columns j0, j0 + 1, ... of one or two matrices of memory into chunks, zeros up to the end of the last quad.
template <typename C>
__device__ __forceinline__ void fill(const Place& at, int64_t j0, int valid, DType type, const void* first,
                                     const void* second, C* to, C* to_second) {
  const Walk walk = walk_memory<C>(at, valid);
  const int r = at.r, pitch = at.pitch, padded = (valid + kVector<C> - 1) / kVector<C> * kVector<C>;
  const int64_t d = at.d;
#pragma unroll 1
  for (int which = 0; which < (second != nullptr ? 2 : 1); ++which) {
    C* const chunk = which == 0 ? to : to_second;
    by_stored<C>(type, [&](auto stored) {
      using T = decltype(stored);
      const T* p = static_cast<const T*>(which == 0 ? first : second) + j0;
      at.vector ? fetch<T, kVector<C>>(pitch, walk, p, d, chunk) : fetch<T, 1>(pitch, walk, p, d, chunk);
    });
#pragma unroll 1
    for (int i = threadIdx.x; i < r; i += kRetractThreads) {
#pragma unroll 1
      for (int t = valid; t < padded; ++t) chunk[i * pitch + t] = 0;
    }
  }
}

// part = X Y^T, or part += X Y^T, over a chunk of `valid` columns, in blocks of 32 x 64 pairs of rows. A thread has a
// tile of 2 x 4 of them and, where there are fewer tiles than threads, a share of the quads; the shares meet by
// shuffles and then warp by warp in order.
template <typename C>
__device__ __forceinline__ void gram_of_chunk(const Place& at, int valid, const C* x, const C* y, bool first) {
  constexpr int V = kVector<C>, A = 2, B = 4;
  const int thread = threadIdx.x, r = at.r, pitch = at.pitch;
  const int down = r > 32 ? 16 : (r + A - 1) / A, across = r > 64 ? 16 : (r + B - 1) / B, tiles = down * across;
  int groups = 1;
  while (2 * groups * tiles <= kRetractThreads) groups *= 2;
  const int tile = thread / groups, group = thread % groups, lanes = groups < 32 ? groups : 32;
  const int end = tile < tiles ? valid : 0;
#pragma unroll 1
  for (int from = 0; from < r; from += A * 16) {
#pragma unroll 1
    for (int to = 0; to < r; to += B * 16) {
      const int i0 = from + tile / across, k0 = to + tile % across;
      int left[A],
          right[B];  // rows `down` or `across` apart; those past the end repeat the last, their sums are dropped
#pragma unroll
      for (int p = 0; p < A; ++p) left[p] = (i0 + down * p < r ? i0 + down * p : r - 1) * pitch;
#pragma unroll
      for (int q = 0; q < B; ++q) right[q] = (k0 + across * q < r ? k0 + across * q : r - 1) * pitch;
      double sum[A][B] = {};
#pragma unroll 1
      for (int t0 = group * V; t0 < end; t0 += groups * kTerms) {
        C dot[A][B] = {};
#pragma unroll 1
        for (int t = t0; t < t0 + groups * kTerms && t < end; t += groups * V) {
          Pack<C, V> a[A];
#pragma unroll
          for (int p = 0; p < A; ++p) a[p] = *reinterpret_cast<const Pack<C, V>*>(x + left[p] + t);
#pragma unroll
          for (int q = 0; q < B; ++q) {
            const Pack<C, V> b = *reinterpret_cast<const Pack<C, V>*>(y + right[q] + t);
#pragma unroll
            for (int v = 0; v < V; ++v) {
#pragma unroll
              for (int p = 0; p < A; ++p) dot[p][q] += a[p].x[v] * b.x[v];
            }
          }
        }
#pragma unroll
        for (int q = 0; q < A * B; ++q) sum[q / B][q % B] += static_cast<double>(dot[q / B][q % B]);
      }
#pragma unroll 1
      for (int lane = lanes / 2; lane > 0; lane /= 2) {
#pragma unroll
        for (int q = 0; q < A * B; ++q) sum[q / B][q % B] += __shfl_xor_sync(0xffffffffu, sum[q / B][q % B], lane);
      }
      if (groups > 32) {
        if (thread % 32 == 0) {
#pragma unroll
          for (int q = 0; q < A * B; ++q) warp_sums()[thread / 32 * A * B + q] = sum[q / B][q % B];
        }
      } else if (group == 0 && tile < tiles) {
#pragma unroll
        for (int q = 0; q < A * B; ++q) {
          const int i = i0 + q / B * down, k = k0 + q % B * across;
          if (i < r && k < r) at.part[i * r + k] = first ? sum[q / B][q % B] : at.part[i * r + k] + sum[q / B][q % B];
        }
      }
    }
  }
  if (groups <= 32) return;
  meet();
  if (thread < r * r) {  // r is 8 at most
    const int i = thread / r, k = thread % r, warps = groups / 32;
    const double* of_tile = warp_sums() + (i % down * across + k % across) * warps * A * B + i / down * B + k / across;
    double total = first ? 0 : at.part[thread];
#pragma unroll 1
    for (int w = 0; w < warps; ++w) total += of_tile[w * A * B];
    at.part[thread] = total;
  }
}

// to = T from, or to -= T from, for the quads of a chunk, where T (r, r) lies in `part`. A thread has a quad of columns
// of 4 rows.
template <typename C>
__device__ __forceinline__ void product(const Place& at, int valid, const C* from, C* to, bool subtract) {
  constexpr int V = kVector<C>;
  const int r = at.r, pitch = at.pitch;
  const C* T = reinterpret_cast<const C*>(at.part);
#pragma unroll 1
  for (Walk walk((r + 3) / 4, (valid + V - 1) / V); walk.there(); walk.next()) {
    const C* row[4];
    C sum[4][V] = {};
#pragma unroll
    for (int q = 0; q < 4; ++q) row[q] = T + (4 * walk.row + q < r ? 4 * walk.row + q : r - 1) * r;
    const C* column = from + walk.column * V;
#pragma unroll 2
    for (int k = 0; k < r; ++k) {
      const Pack<C, V> x = *reinterpret_cast<const Pack<C, V>*>(column + k * pitch);
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        const C factor = row[q][k];
#pragma unroll
        for (int v = 0; v < V; ++v) sum[q][v] += factor * x.x[v];
      }
    }
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      if (4 * walk.row + q >= r) continue;
      Pack<C, V>* place = reinterpret_cast<Pack<C, V>*>(to + (4 * walk.row + q) * pitch + walk.column * V);
      Pack<C, V> y;
#pragma unroll
      for (int v = 0; v < V; ++v) y.x[v] = subtract ? place->x[v] - sum[q][v] : sum[q][v];
      *place = y;
    }
  }
}

}  // namespace fastreft
