// The r x r part of a retraction: Gram matrices summed over the cluster, Cholesky, the inverse factor; and Gram-Schmidt
// for rows that are dependent. Sums over columns cross the cluster through distributed shared memory in the order of
// the ranks, so every CTA holds the same bits and factors them redundantly, in fp64. Right for every r: the r x r
// matrices lie in shared memory while they fit and in scratch beyond, where a cluster is one CTA.
#pragma once
#include "retract_chunk.cuh"

namespace fastreft {

// S = the sum of the parts of all CTAs of the cluster.
__device__ __forceinline__ void sum_over_cluster(const Place& at) {
  const int r = at.r;
  if (at.begin == at.end) {  // without columns, and so without a chunk
    __syncthreads();         // what was multiplied with last lies in the same memory
#pragma unroll 1
    for (int e = threadIdx.x; e < r * r; e += kRetractThreads) at.part[e] = 0;
  }
  cluster_sync(at.cluster);
#pragma unroll 1
  for (int e = threadIdx.x; e < r * r; e += kRetractThreads) {
    double part[kRetractCluster] = {};  // all on their way together
#pragma unroll
    for (int rank = 0; rank < kRetractCluster; ++rank) {
      if (rank < at.cluster) part[rank] = at.cluster > 1 ? of_rank(at.part, rank)[e] : at.part[e];
    }
    double total = 0;
#pragma unroll
    for (int rank = 0; rank < kRetractCluster; ++rank) {
      if (rank < at.cluster) total += part[rank];
    }
    at.S[e] = total;
  }
  cluster_sync(at.cluster);  // nobody overwrites a part that others still read
}

// Whether every entry of S is finite; the same answer in all threads, since all hold the same S.
__device__ __forceinline__ bool all_finite(const Place& at) {
  const int r = at.r;
  double worst = 0;
#pragma unroll 1
  for (int e = threadIdx.x; e < r * r; e += kRetractThreads) worst += at.S[e] - at.S[e];  // 0, or NaN
  return __syncthreads_or(!(worst == 0)) == 0;
}

constexpr int kWarpRows = 16;  // of a matrix that one warp factors

// How a Cholesky factorisation went.
struct Pivots {
  bool full_rank;
  double spread;  // the largest diagonal entry over its pivot
};

// S = L L^T, L in S's lower triangle, by the `threads` first of a CTA, which meet by meet(). Stops at a pivot that is
// not above `least` times its diagonal entry, or times `floor` where that is more.
template <typename F>
__device__ __forceinline__ Pivots factor(const Place& at, double least, double floor, int threads, const F& meet) {
  const int r = at.r;
  double spread = 1;
  const int thread = threadIdx.x;
  double* S = at.S;
#pragma unroll 1
  for (int k = thread; k < r; k += threads) at.part[k] = S[k * r + k];
  meet();
#pragma unroll 1
  for (int k = 0; k < r; ++k) {
    const double pivot = S[k * r + k], diagonal = at.part[k];
    if (!(pivot > least * (diagonal > floor ? diagonal : floor))) return {false, spread};
    spread = diagonal / pivot > spread ? diagonal / pivot : spread;
    const double root = sqrt(pivot);
    meet();
#pragma unroll 1
    for (int i = k + thread; i < r; i += threads) S[i * r + k] = i == k ? root : S[i * r + k] / root;
    meet();
    const int rest = r - k - 1;
#pragma unroll 1
    for (int e = thread; e < rest * rest; e += threads) {
      const int i = k + 1 + e / rest, j = k + 1 + e % rest;
      if (j <= i) S[i * r + j] -= S[i * r + k] * S[j * r + k];
    }
    meet();
  }
  return {true, spread};
}

// The same for the whole CTA: a small S by one warp, whose barriers are cheap.
__device__ __forceinline__ Pivots cholesky(const Place& at, double least, double floor) {
  if (at.r > kWarpRows) return factor(at, least, floor, kRetractThreads, [] { __syncthreads(); });
  double* const told = warp_sums();
  if (threadIdx.x < 32) {
    const Pivots found = factor(at, least, floor, 32, [] { __syncwarp(); });
    if (threadIdx.x == 0) {
      told[0] = !found.full_rank;
      told[1] = found.spread;
    }
  }
  __syncthreads();
  return {told[0] == 0, told[1]};
}

// part <- L^-1 as C, zeros above the diagonal. A thread a column; the sums run in fp64 over the columns done so far,
// which are kept in S's unused upper triangle: entry (i, j), i > j, of the inverse lies at S[j][i].
template <typename C>
__device__ __forceinline__ void invert(const Place& at) {
  const int r = at.r;
  double* S = at.S;
  C* T = reinterpret_cast<C*>(at.part);
#pragma unroll 1
  for (int j = threadIdx.x; j < r; j += kRetractThreads) {
    const double head = 1 / S[j * r + j];
#pragma unroll 1
    for (int i = j + 1; i < r; ++i) {
      double sum = S[i * r + j] * head;
#pragma unroll 1
      for (int k = j + 1; k < i; ++k) sum += S[i * r + k] * S[j * r + k];
      S[j * r + i] = -sum / S[i * r + i];
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int e = threadIdx.x; e < r * r; e += kRetractThreads) {
    const int i = e / r, j = e % r;
    T[e] = static_cast<C>(i > j ? S[j * r + i] : (i == j ? 1 / S[i * r + i] : 0.0));
  }
}

// part <- 3/2 I - 1/2 S as C: one Newton-Schulz step towards the nearest orthonormal matrix.
template <typename C>
__device__ __forceinline__ void polish(const Place& at) {
  const int r = at.r;
  C* T = reinterpret_cast<C*>(at.part);
#pragma unroll 1
  for (int e = threadIdx.x; e < r * r; e += kRetractThreads)
    T[e] = static_cast<C>((e / r == e % r ? 1.5 : 0.0) - 0.5 * at.S[e]);
}

// part <- 1/2 (S + S^T) as C: what the tangent space takes from a gradient.
template <typename C>
__device__ __forceinline__ void symmetric(const Place& at) {
  const int r = at.r;
  C* T = reinterpret_cast<C*>(at.part);
#pragma unroll 1
  for (int e = threadIdx.x; e < r * r; e += kRetractThreads)
    T[e] = static_cast<C>(0.5 * (at.S[e] + at.S[e % r * r + e / r]));
}

// The sum of x over the CTA, in every thread, in fp64 and in a fixed order. By shared memory alone: shuffles, which
// come with much code where threads may have parted, are for what is not rare.
__device__ __forceinline__ double block_sum(double x) {
  double* const group = warp_sums();
  constexpr int Some = 16;
  const int thread = threadIdx.x;
  __syncthreads();
  group[thread] = x;
  __syncthreads();
  double total = 0;
#pragma unroll 1
  for (int i = 0; i < kRetractThreads / Some; ++i) total += group[thread % Some + i * Some];
  __syncthreads();
  if (thread < Some) group[thread] = total;
  __syncthreads();
  total = 0;
#pragma unroll 1
  for (int i = 0; i < Some; ++i) total += group[i];
  return total;
}

// Gram-Schmidt, twice over, on all of Y (r, d) by one CTA: for matrices whose rows are dependent to working
// precision. A row that vanishes becomes the coordinate direction that the rows before it leave most room for. Rare.
template <typename C>
__device__ __forceinline__ void gram_schmidt(int r, int64_t d, C* Y, double least) {
  const int thread = threadIdx.x;
  double* const group = warp_sums();
#pragma unroll 1
  for (int k = 0; k < r; ++k) {
    C* y = Y + k * d;
    bool replaced = false;
    double before = 0;
#pragma unroll 1
    for (int64_t j = thread; j < d; j += kRetractThreads) before += static_cast<double>(y[j]) * y[j];
    before = sqrt(block_sum(before));
    while (true) {
#pragma unroll 1
      for (int pass = 0; pass < 2; ++pass) {
#pragma unroll 1
        for (int i = 0; i < k; ++i) {
          const C* q = Y + i * d;
          double dot = 0;
#pragma unroll 1
          for (int64_t j = thread; j < d; j += kRetractThreads) dot += static_cast<double>(q[j]) * y[j];
          dot = block_sum(dot);
#pragma unroll 1
          for (int64_t j = thread; j < d; j += kRetractThreads) y[j] = static_cast<C>(y[j] - dot * q[j]);
        }
      }
      double norm = 0;
#pragma unroll 1
      for (int64_t j = thread; j < d; j += kRetractThreads) norm += static_cast<double>(y[j]) * y[j];
      norm = sqrt(block_sum(norm));
      if (replaced || norm > least * before) {
#pragma unroll 1
        for (int64_t j = thread; j < d; j += kRetractThreads) y[j] = static_cast<C>(y[j] / norm);
        break;
      }
      // The thread's best column, then the CTA's: the smallest sum of squares above, the first column among equals.
      double best = 2;
      int64_t column = d;
#pragma unroll 1
      for (int64_t j = thread; j < d; j += kRetractThreads) {
        double used = 0;
#pragma unroll 1
        for (int i = 0; i < k; ++i) used += static_cast<double>(Y[i * d + j]) * Y[i * d + j];
        if (used < best) {
          best = used;
          column = j;
        }
      }
      __syncthreads();
      group[thread] = best;
      __syncthreads();
#pragma unroll 1
      for (int other = 0; other < kRetractThreads; ++other) best = group[other] < best ? group[other] : best;
      int winner = 0;
      while (group[winner] > best) ++winner;
#pragma unroll 1
      for (int64_t j = thread; j < d; j += kRetractThreads) y[j] = C(0);
      if (thread == winner) y[column] = C(1);
      replaced = true;
    }
  }
  __syncthreads();
}

}  // namespace fastreft
