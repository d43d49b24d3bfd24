// The pieces of a retraction: Gram matrices, Cholesky, the inverse factor and its application, for a cluster of CTAs
// that shares one matrix Y (r, d). Each CTA owns a range of columns; sums over columns cross the cluster through
// distributed shared memory in the order of the ranks, so every CTA holds the same bits and factors them redundantly.
//
// Precision: products in fp32 over at most kTerms columns (fp64 for fp64), everything that adds those up in fp64, the
// r x r factor in fp64. Right for every r: the r x r matrices lie in shared memory while they fit and in scratch
// beyond, where a cluster is one CTA.
#pragma once
#include "edit_common.cuh"

namespace fastreft {

constexpr int kRetractThreads = 256;
constexpr int kTerms = 32;  // products added up in fp32 before they go to an fp64 sum
constexpr int kBatch = 4;   // loads a thread has on their way; more spill

// What a CTA of the cluster works with.
struct Place {
  int rank, cluster;
  int64_t begin, end;  // its columns
  int terms;           // columns a staged chunk
  double* S;           // [r, r] the sum over the cluster, then its factor; in every CTA
  double* part;        // [r, r] the sum over this CTA's columns; later the matrix that is applied, as the sums' type
  double* group;       // [kRetractThreads] for sums across groups of threads
  char* chunk;         // [2, r, terms + 1] staged columns
};

// A chunk of columns from j0 on into shared memory, zeros past the CTA's last column. Eight loads on their way at a
// time.
template <typename C, typename From>
__device__ __forceinline__ void stage(const Place& at, int r, int64_t j0, C* to, From&& from) {
#pragma unroll 1
  for (int e0 = threadIdx.x; e0 < r * at.terms; e0 += kBatch * kRetractThreads) {
    C x[kBatch];
#pragma unroll
    for (int q = 0; q < kBatch; ++q) {
      const int e = e0 + q * kRetractThreads, i = e / at.terms;
      const int64_t j = j0 + e % at.terms;
      x[q] = i < r && j < at.end ? from(i, j) : C(0);
    }
#pragma unroll
    for (int q = 0; q < kBatch; ++q) {
      const int e = e0 + q * kRetractThreads;
      if (e < r * at.terms) to[e / at.terms * (at.terms + 1) + e % at.terms] = x[q];
    }
  }
}

// This CTA's part of X Y^T where r * r <= 256: a pair of rows a thread; where there are fewer pairs than threads,
// groups of threads share out the columns of a chunk.
template <typename C, bool Same, typename X, typename Y>
__device__ __forceinline__ void small_gram(const Place& at, int r, X&& x, Y&& y) {
  const int thread = threadIdx.x, pairs = r * r, pitch = at.terms + 1;
  C* xs = reinterpret_cast<C*>(at.chunk);  // [r, pitch]
  C* ys = Same ? xs : xs + r * pitch;
  const int groups = kRetractThreads / pairs, group = thread / pairs, pair = thread % pairs;
  const C* left = xs + pair / r * pitch;
  const C* right = ys + pair % r * pitch;
  double sum = 0;
  for (int64_t j0 = at.begin; j0 < at.end; j0 += at.terms) {
    __syncthreads();
    stage<C>(at, r, j0, xs, x);
    if constexpr (!Same) stage<C>(at, r, j0, ys, y);
    __syncthreads();
    for (int t0 = group; t0 < at.terms; t0 += kTerms * groups) {
      C dot = 0;
      const int end = t0 + kTerms * groups < at.terms ? t0 + kTerms * groups : at.terms;
      for (int t = t0; t < end; t += groups) dot += left[t] * right[t];
      sum += static_cast<double>(dot);
    }
  }
  at.group[thread] = sum;
  __syncthreads();
  if (thread < pairs) {
    double total = 0;
    for (int g = 0; g < groups; ++g) total += at.group[g * pairs + thread];
    at.part[thread] = total;
  }
}

// The same for larger r: blocks of 64 x 64 pairs, a 4 x 4 tile of rows 16 apart in each thread.
template <typename C, bool Same, typename X, typename Y>
__device__ __forceinline__ void large_gram(const Place& at, int r, X&& x, Y&& y) {
  const int pitch = at.terms + 1, ti = threadIdx.x / 16, tj = threadIdx.x % 16;
  C* xs = reinterpret_cast<C*>(at.chunk);  // [r, pitch]
  C* ys = Same ? xs : xs + r * pitch;
  for (int block = 0, across = (r + 63) / 64; block < across * across; ++block) {
    const int i0 = block / across * 64 + ti, k0 = block % across * 64 + tj;
    const C *left[4], *right[4];  // rows past the end repeat the last one; their sums are dropped
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      left[q] = xs + (i0 + 16 * q < r ? i0 + 16 * q : r - 1) * pitch;
      right[q] = ys + (k0 + 16 * q < r ? k0 + 16 * q : r - 1) * pitch;
    }
    double sum[4][4] = {};
    for (int64_t j0 = at.begin; j0 < at.end; j0 += at.terms) {
      __syncthreads();
      stage<C>(at, r, j0, xs, x);
      if constexpr (!Same) stage<C>(at, r, j0, ys, y);
      __syncthreads();
#pragma unroll 1
      for (int t0 = 0; t0 < at.terms; t0 += kTerms) {
        const int end = t0 + kTerms < at.terms ? t0 + kTerms : at.terms;
        C dot[4][4] = {};
#pragma unroll 1
        for (int t = t0; t < end; ++t) {
          C a[4], b[4];
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            a[q] = left[q][t];
            b[q] = right[q][t];
          }
#pragma unroll
          for (int q = 0; q < 16; ++q) dot[q / 4][q % 4] += a[q / 4] * b[q % 4];
        }
#pragma unroll
        for (int q = 0; q < 16; ++q) sum[q / 4][q % 4] += static_cast<double>(dot[q / 4][q % 4]);
      }
    }
#pragma unroll
    for (int q = 0; q < 16; ++q) {
      const int i = i0 + q / 4 * 16, k = k0 + q % 4 * 16;
      if (i < r && k < r) at.part[i * r + k] = sum[q / 4][q % 4];
    }
  }
}

// S = X Y^T over all columns of the cluster, X and Y given as functions (row, column) -> C.
template <typename C, bool Same, typename X, typename Y>
__device__ __forceinline__ void gram(const Place& at, int r, X&& x, Y&& y) {
  if (r <= 16) {
    small_gram<C, Same>(at, r, x, y);
  } else {
    large_gram<C, Same>(at, r, x, y);
  }
  cluster_sync(at.cluster);
  for (int e = threadIdx.x; e < r * r; e += kRetractThreads) {
    double total = 0;
    for (int rank = 0; rank < at.cluster; ++rank) total += at.cluster > 1 ? of_rank(at.part, rank)[e] : at.part[e];
    at.S[e] = total;
  }
  cluster_sync(at.cluster);  // nobody overwrites a part that others still read
}

// Whether every entry of S is finite; the same answer in all threads, since all hold the same S.
__device__ __forceinline__ bool all_finite(const Place& at, int r) {
  double worst = 0;
  for (int e = threadIdx.x; e < r * r; e += kRetractThreads) worst += at.S[e] - at.S[e];  // 0, or NaN
  return __syncthreads_or(!(worst == 0)) == 0;
}

// How a Cholesky factorisation went.
struct Pivots {
  bool full_rank;
  double spread;  // the largest diagonal entry over its pivot
};

// S = L L^T, L in S's lower triangle. Stops at a pivot that is not above `least` times its diagonal entry, or times
// `floor` where that is more.
__device__ __forceinline__ Pivots cholesky(const Place& at, int r, double least, double floor) {
  double spread = 1;
  const int thread = threadIdx.x;
  double* S = at.S;
  for (int k = thread; k < r; k += kRetractThreads) at.part[k] = S[k * r + k];
  __syncthreads();
  for (int k = 0; k < r; ++k) {
    const double pivot = S[k * r + k], diagonal = at.part[k];
    if (!(pivot > least * (diagonal > floor ? diagonal : floor))) return {false, spread};
    spread = diagonal / pivot > spread ? diagonal / pivot : spread;
    const double root = sqrt(pivot);
    __syncthreads();
    for (int i = k + thread; i < r; i += kRetractThreads) S[i * r + k] = i == k ? root : S[i * r + k] / root;
    __syncthreads();
    const int rest = r - k - 1;
    for (int e = thread; e < rest * rest; e += kRetractThreads) {
      const int i = k + 1 + e / rest, j = k + 1 + e % rest;
      if (j <= i) S[i * r + j] -= S[i * r + k] * S[j * r + k];
    }
    __syncthreads();
  }
  return {true, spread};
}

// part <- L^-1 as C, zeros above the diagonal. A thread a column; the sums run in fp64 over the columns done so far,
// which are kept in S's unused upper triangle: entry (i, j), i > j, of the inverse lies at S[j][i].
template <typename C>
__device__ __forceinline__ void invert(const Place& at, int r) {
  double* S = at.S;
  C* T = reinterpret_cast<C*>(at.part);
  __syncthreads();
  for (int j = threadIdx.x; j < r; j += kRetractThreads) {
    const double head = 1 / S[j * r + j];
    for (int i = j + 1; i < r; ++i) {
      double sum = S[i * r + j] * head;
      for (int k = j + 1; k < i; ++k) sum += S[i * r + k] * S[j * r + k];
      S[j * r + i] = -sum / S[i * r + i];
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < r * r; e += kRetractThreads) {
    const int i = e / r, j = e % r;
    T[e] = static_cast<C>(i > j ? S[j * r + i] : (i == j ? 1 / S[i * r + i] : 0.0));
  }
  __syncthreads();
}

// part <- 3/2 I - 1/2 S as C: one Newton-Schulz step towards the nearest orthonormal matrix.
template <typename C>
__device__ __forceinline__ void polish(const Place& at, int r) {
  C* T = reinterpret_cast<C*>(at.part);
  for (int e = threadIdx.x; e < r * r; e += kRetractThreads)
    T[e] = static_cast<C>((e / r == e % r ? 1.5 : 0.0) - 0.5 * at.S[e]);
  __syncthreads();
}

// finish(i, j, sum_k T[i][k] from(k, j), load(i, j)) over the CTA's columns. A chunk is staged first, so that `finish`
// may overwrite what `from` reads; the loads of a few places are on their way together.
template <typename C, typename From, typename Load, typename Finish>
__device__ __forceinline__ void apply(const Place& at, int r, From&& from, Load&& load, Finish&& finish) {
  constexpr int Batch = 4;
  const C* T = reinterpret_cast<const C*>(at.part);
  C* ys = reinterpret_cast<C*>(at.chunk);
  const int pitch = at.terms + 1;
  for (int64_t j0 = at.begin; j0 < at.end; j0 += at.terms) {
    __syncthreads();
    stage<C>(at, r, j0, ys, from);
    __syncthreads();
#pragma unroll 1
    for (int e0 = threadIdx.x; e0 < r * at.terms; e0 += Batch * kRetractThreads) {
      decltype(load(0, j0)) loaded[Batch] = {};
#pragma unroll
      for (int q = 0; q < Batch; ++q) {
        const int e = e0 + q * kRetractThreads, i = e / at.terms;
        const int64_t j = j0 + e % at.terms;
        if (i < r && j < at.end) loaded[q] = load(i, j);
      }
#pragma unroll
      for (int q = 0; q < Batch; ++q) {
        const int e = e0 + q * kRetractThreads, i = e / at.terms, t = e % at.terms;
        if (i >= r || j0 + t >= at.end) continue;
        C sum = 0;
#pragma unroll 1
        for (int k = 0; k < r; ++k) sum += T[i * r + k] * ys[k * pitch + t];
        finish(i, j0 + t, sum, loaded[q]);
      }
    }
  }
}

// The sum of x over the CTA, in every thread, in fp64 and in a fixed order.
__device__ __forceinline__ double block_sum(const Place& at, double x) {
  const double warp = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) at.group[threadIdx.x / 32] = warp;
  __syncthreads();
  double total = 0;
  for (int w = 0; w < kRetractThreads / 32; ++w) total += at.group[w];
  return total;
}

// Gram-Schmidt, twice over, on all of Y (r, d) by one CTA: for matrices whose rows are dependent to working
// precision. A row that vanishes becomes the coordinate direction that the rows before it leave most room for. Rare.
template <typename C>
__device__ __forceinline__ void gram_schmidt(const Place& at, int r, int64_t d, C* Y, double least) {
  const int thread = threadIdx.x;
  for (int k = 0; k < r; ++k) {
    C* y = Y + k * d;
    bool replaced = false;
    double before = 0;
    for (int64_t j = thread; j < d; j += kRetractThreads) before += static_cast<double>(y[j]) * y[j];
    before = sqrt(block_sum(at, before));
    while (true) {
      for (int pass = 0; pass < 2; ++pass) {
        for (int i = 0; i < k; ++i) {
          const C* q = Y + i * d;
          double dot = 0;
          for (int64_t j = thread; j < d; j += kRetractThreads) dot += static_cast<double>(q[j]) * y[j];
          dot = block_sum(at, dot);
          for (int64_t j = thread; j < d; j += kRetractThreads) y[j] = static_cast<C>(y[j] - dot * q[j]);
        }
      }
      double norm = 0;
      for (int64_t j = thread; j < d; j += kRetractThreads) norm += static_cast<double>(y[j]) * y[j];
      norm = sqrt(block_sum(at, norm));
      if (replaced || norm > least * before) {
        for (int64_t j = thread; j < d; j += kRetractThreads) y[j] = static_cast<C>(y[j] / norm);
        break;
      }
      // The thread's best column, then the CTA's: the smallest sum of squares above, the first column among equals.
      double best = 2;
      int64_t column = d;
      for (int64_t j = thread; j < d; j += kRetractThreads) {
        double used = 0;
        for (int i = 0; i < k; ++i) used += static_cast<double>(Y[i * d + j]) * Y[i * d + j];
        if (used < best) {
          best = used;
          column = j;
        }
      }
      __syncthreads();
      at.group[thread] = best;
      __syncthreads();
      for (int other = 0; other < kRetractThreads; ++other) best = at.group[other] < best ? at.group[other] : best;
      int winner = 0;
      while (at.group[winner] > best) ++winner;
      for (int64_t j = thread; j < d; j += kRetractThreads) y[j] = C(0);
      if (thread == winner) y[column] = C(1);
      replaced = true;
    }
  }
  __syncthreads();
}

}  // namespace fastreft
