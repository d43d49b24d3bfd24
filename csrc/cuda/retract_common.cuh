// The r x r part of a retraction: Gram matrices summed over the cluster, Cholesky, the inverse factor; and Gram-Schmidt
// for rows that are dependent. Sums over columns are added up in the order of the ranks, by one of the cluster's CTAs
// each, so every CTA holds the same bits and factors them redundantly, in fp64. Right for every r: the r x r
// matrices lie in shared memory while they fit and in scratch beyond, where a cluster is one CTA.
#pragma once
#include "retract_chunk.cuh"

namespace fastreft {

// S = the sum of the parts of all CTAs of the cluster, the `round`-th. Each rank adds up its share of the entries, in
// the order of the ranks, and sends the sums to all: two ways through the cluster, and no barrier of it, which would
// wait for the threads that do not retract, too. Nobody sends what another still reads: a part comes from a rank that
// has all sums of the round before, and a sum from one that has all parts of this one.
__device__ __forceinline__ void sum_over_cluster(Place& at, int round) {
  const int r = at.r, pairs = static_cast<int>(retract_pairs(r)), cluster = at.cluster;
  if (at.begin == at.end) {  // without columns, and so without a chunk
    meet();                  // what was multiplied with last lies in the same memory
#pragma unroll 1
    for (int e = threadIdx.x; e < r * r; e += kRetractThreads) at.part[e] = 0;
  }
  meet();
  if (cluster == 1) {
#pragma unroll 1
    for (int e = threadIdx.x; e < r * r; e += kRetractThreads) at.S[e] = at.part[e];
    meet();
    return;
  }
  struct alignas(16) Pair {
    double x[2];
  };
  const int share = (pairs + cluster - 1) / cluster, first = share * at.rank;
  const int own = pairs - first < share ? (pairs > first ? pairs - first : 0) : share;
  if (threadIdx.x == 0) {
    arrivals_expect(&at.parts, own * cluster * static_cast<int>(sizeof(Pair)));
    arrivals_expect(&at.sums, pairs * static_cast<int>(sizeof(Pair)));
  }
  Pair* const received = reinterpret_cast<Pair*>(at.received);
#pragma unroll 1
  for (int q = threadIdx.x; q < pairs; q += kRetractThreads) {
    const int owner = q / share;
    const uint4 part = reinterpret_cast<const uint4*>(at.part)[q];
    send(received + at.rank * share + q - owner * share, part, &at.parts, owner);
  }
  if (static_cast<int>(threadIdx.x) / 32 * 32 < own) arrivals_wait(&at.parts, round & 1);
#pragma unroll 1
  for (int q = threadIdx.x; q < own; q += kRetractThreads) {
    Pair total = received[q];
#pragma unroll 1
    for (int rank = 1; rank < cluster; ++rank) {
      total.x[0] += received[rank * share + q].x[0];
      total.x[1] += received[rank * share + q].x[1];
    }
#pragma unroll 1
    for (int rank = 0; rank < cluster; ++rank)
      send(reinterpret_cast<Pair*>(at.S) + first + q, *reinterpret_cast<const uint4*>(&total), &at.sums, rank);
  }
  arrivals_wait(&at.sums, round & 1);
}

// Whether every entry of S is finite; the same answer in all threads, since all hold the same S.
__device__ __forceinline__ bool all_finite(const Place& at) {
  const int r = at.r;
  double worst = 0;
#pragma unroll 1
  for (int e = threadIdx.x; e < r * r; e += kRetractThreads) worst += at.S[e] - at.S[e];  // 0, or NaN
  return !any_of<kRetractThreads>(!(worst == 0));
}

constexpr int kWarpRows = 16;  // of a matrix that one warp inverts
constexpr int kFactors = 8;    // of its elimination that are on their way together

// How a factorisation went.
struct Pivots {
  bool full_rank;
  double spread;  // the largest diagonal entry over its pivot
};

// A pivot has to be above `least` times its diagonal entry, or times `floor` where that is more.
__device__ __forceinline__ bool is_pivot(double pivot, double diagonal, double least, double floor) {
  return pivot > least * (diagonal > floor ? diagonal : floor);
}

// S = L L^T, L in S's lower triangle but for its diagonal, whose place has 1 / L; by all threads. Stops where there is
// no pivot.
__device__ __forceinline__ Pivots factor(const Place& at, double least, double floor) {
  const int r = at.r;
  double spread = 1;
  const int thread = threadIdx.x;
  double* S = at.S;
#pragma unroll 1
  for (int k = thread; k < r; k += kRetractThreads) at.part[k] = S[k * r + k];
  meet();
#pragma unroll 1
  for (int k = 0; k < r; ++k) {
    const double pivot = S[k * r + k], diagonal = at.part[k];
    if (!is_pivot(pivot, diagonal, least, floor)) return {false, spread};
    spread = diagonal / pivot > spread ? diagonal / pivot : spread;
    const double inverse = rsqrt(pivot);
    meet();
#pragma unroll 1
    for (int i = k + thread; i < r; i += kRetractThreads) S[i * r + k] = i == k ? inverse : S[i * r + k] * inverse;
    meet();
    const int rest = r - k - 1;
#pragma unroll 1
    for (int e = thread; e < rest * rest; e += kRetractThreads) {
      const int i = k + 1 + e / rest, j = k + 1 + e % rest;
      if (j <= i) S[i * r + j] -= S[i * r + k] * S[j * r + k];
    }
    meet();
  }
  return {true, spread};
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
    const double head = S[j * r + j];
#pragma unroll 1
    for (int i = j + 1; i < r; ++i) {
      double sum = S[i * r + j] * head;
#pragma unroll 1
      for (int k = j + 1; k < i; ++k) sum += S[i * r + k] * S[j * r + k];
      S[j * r + i] = -sum * S[i * r + i];
    }
  }
  meet();
#pragma unroll 1
  for (int e = threadIdx.x; e < r * r; e += kRetractThreads) {
    const int i = e / r, j = e % r;
    T[e] = static_cast<C>(i > j ? S[j * r + i] : (i == j ? S[i * r + i] : 0.0));
  }
}

// Both for an S of `Rows` rows at most, by one warp: Gauss's elimination of [S | I] leaves [L^T | L^-1]. A lane has a
// column of either half. With each row that is done those below it move up a place, so that the one in hand is always
// the first: which registers are meant has to be known when this is compiled.
template <typename C, int Rows>
__device__ __forceinline__ Pivots eliminate(const Place& at, double least, double floor) {
  const int r = at.r, lane = threadIdx.x, column = lane % Rows;
  const bool left = lane < Rows, right = lane / Rows == 1 && column < r;
  C* T = reinterpret_cast<C*>(at.part);
  double a[Rows], spread = 1;
#pragma unroll
  for (int i = 0; i < Rows; ++i)
    a[i] = left ? (i < r && column < r ? at.S[i * r + column] : 0.0) : (i == column ? 1.0 : 0.0);
  const double own = left && column < r ? at.S[column * r + column] : 0.0;
#pragma unroll 1
  for (int k = 0; k < r; ++k) {
    const double pivot = __shfl_sync(0xffffffffu, a[0], k), diagonal = __shfl_sync(0xffffffffu, own, k);
    if (!is_pivot(pivot, diagonal, least, floor)) return {false, spread};
    const double inverse = rsqrt(pivot), over = diagonal * inverse * inverse;
    spread = over > spread ? over : spread;
    const double row = a[0] * inverse;
    if (right) T[k * r + column] = static_cast<C>(row);
#pragma unroll
    for (int i = 1; i < Rows; i += kFactors) {
      double factor[kFactors];
#pragma unroll
      for (int q = 0; q < kFactors && i + q < Rows; ++q) factor[q] = __shfl_sync(0xffffffffu, a[i + q], k);
#pragma unroll
      for (int q = 0; q < kFactors && i + q < Rows; ++q) a[i + q - 1] = a[i + q] - factor[q] * inverse * row;
    }
  }
  return {true, spread};
}

// part <- L^-1 as C, where S = L L^T.
template <typename C>
__device__ __forceinline__ Pivots inverse_factor(const Place& at, double least, double floor) {
  if (at.r > kWarpRows) {
    const Pivots found = factor(at, least, floor);
    if (found.full_rank) invert<C>(at);
    return found;
  }
  double* const told = warp_sums();
  if (threadIdx.x < 32) {
    const Pivots found = at.r <= kWarpRows / 2 ? eliminate<C, kWarpRows / 2>(at, least, floor)
                                               : eliminate<C, kWarpRows>(at, least, floor);
    if (threadIdx.x == 0) {
      told[0] = found.full_rank;
      told[1] = found.spread;
    }
  }
  meet();
  return {told[0] == 1, told[1]};
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
  meet();
  group[thread] = x;
  meet();
  double total = 0;
#pragma unroll 1
  for (int i = 0; i < kRetractThreads / Some; ++i) total += group[thread % Some + i * Some];
  meet();
  if (thread < Some) group[thread] = total;
  meet();
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
      meet();
      group[thread] = best;
      meet();
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
  meet();
}

}  // namespace fastreft
