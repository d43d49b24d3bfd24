// The edit on CUDA cores: any dtype, any d, any r, no alignment asked. It is the road of fp32 and fp64 activations and
// of whatever the tensor-core kernels (edit_fused.cuh) do not take.
//
// pass_kernel: a CTA of 256 threads owns kRows rows. Shrink: the threads split the columns, four of the r coordinates
// at a time; partial sums meet by warp_sum and then warp by warp in order. Expand: again a thread a column group.
// gradient_kernel: a thread owns a column and eight coordinates, a CTA 128 columns and one range of rows; each range
// leaves one partial sum. finish_kernel adds the partial sums in order and rounds to the weight's dtype.
#pragma once
#include "edit_copy.cuh"

namespace fastreft {

template <typename T, int V, bool Backward>
__global__ void __launch_bounds__(kSimpleThreads, 2) pass_kernel(const Pass p, const bool shrinks) {
  using C = accum_t<T>;
  constexpr int R = kSimpleRows, K = kSimpleChunk;
  const int d = p.d, r = p.r, thread = threadIdx.x, warp = thread / 32;
  const int64_t editors = (p.n + R - 1) / R;  // CTAs; those behind them copy
  if (blockIdx.x >= editors) return copy_unlisted<T, V, kSimpleThreads>(p, blockIdx.x - editors);
  C* u0 = reinterpret_cast<C*>(shared_memory());  // [R, r] s0, then the first expand's coordinates
  C* u1 = u0 + R * r;                             // [R, r] s1, then the second expand's
  C* sums = u1 + R * r;                           // [8 warps, 2, K, R]

  const int64_t first = static_cast<int64_t>(blockIdx.x) * R;
  const T* in[R];
  int64_t row[R];
#pragma unroll
  for (int m = 0; m < R; ++m) {
    row[m] = listed_row(p.index, first + m, p.n, p.total);
    in[m] = static_cast<const T*>(p.in.p) + (row[m] >= 0 ? row_offset(p.in, row[m]) : 0);
  }

  const bool two[2] = {p.shrink[0].w.p != nullptr, p.shrink[1].w.p != nullptr};
  for (int k0 = 0; shrinks && k0 < r; k0 += K) {
    C sum[2][K][R] = {};
    for (int j = thread * V; j < d; j += kSimpleThreads * V) {
      C x[R][V] = {};
#pragma unroll
      for (int m = 0; m < R; ++m) {
        if (row[m] >= 0) load_pack<T, V>(in[m], j, x[m]);
      }
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        if (!two[s]) continue;
#pragma unroll
        for (int k = 0; k < K; ++k) {
          if (k0 + k >= r) continue;
          C w[V];
          load_matrix<V>(p.shrink[s], static_cast<int64_t>(k0 + k) * d + j, w);
#pragma unroll
          for (int m = 0; m < R; ++m) {
#pragma unroll
            for (int v = 0; v < V; ++v) sum[s][k][m] += x[m][v] * w[v];
          }
        }
      }
    }
#pragma unroll
    for (int s = 0; s < 2; ++s) {
#pragma unroll
      for (int k = 0; k < K; ++k) {
#pragma unroll
        for (int m = 0; m < R; ++m) {
          const C total = warp_sum(sum[s][k][m]);
          if (thread % 32 == 0) sums[((warp * 2 + s) * K + k) * R + m] = total;
        }
      }
    }
    __syncthreads();
    if (thread < 2 * K * R) {
      C total = 0;
      for (int w = 0; w < kSimpleThreads / 32; ++w) total += sums[w * 2 * K * R + thread];
      const int s = thread / (K * R), k = k0 + thread / R % K, m = thread % R;
      if (k < r) (s == 0 ? u0 : u1)[m * r + k] = total;
    }
    __syncthreads();
  }

  for (int e = thread; e < R * r; e += kSimpleThreads) {
    const int m = e / r, k = e % r;
    const int64_t i = first + m;
    if (i >= p.n) continue;
    const bool live = listed_row(p.index, i, p.n, p.total) >= 0;
    if constexpr (Backward) {
      C gz = 0, gp = 0;
      if (shrinks) {
        gz = live ? u0[e] : C(0);
        gp = live ? backward_coordinate(p, i, k, gz) : C(0);
        if (p.gz != nullptr) static_cast<C*>(p.gz)[i * r + k] = gz;
        if (p.gp != nullptr) static_cast<C*>(p.gp)[i * r + k] = gp;
      } else {
        gz = static_cast<const C*>(p.gz)[i * r + k];
        gp = p.gp != nullptr ? static_cast<const C*>(p.gp)[i * r + k] : gz;
      }
      u0[e] = gp;
      u1[e] = -gz;
    } else {
      C a = 0, z = 0;
      if (live) z = forward_coordinate(p, k, two[0] ? u0[e] : C(0), two[1] ? u1[e] : C(0), a);
      keep_coordinate(p, i, k, z, a);
      u0[e] = z;
    }
  }
  if (p.out.p == nullptr) return;
  __syncthreads();

  for (int j = thread * V; j < d; j += kSimpleThreads * V) {
    C sum[R][V] = {};
#pragma unroll
    for (int s = 0; s < 2; ++s) {
      if (p.expand[s].w.p == nullptr) continue;
      const C* u = s == 0 ? u0 : u1;
      for (int k = 0; k < r; ++k) {
        C w[V];
        load_matrix<V>(p.expand[s], static_cast<int64_t>(k) * d + j, w);
#pragma unroll
        for (int m = 0; m < R; ++m) {
          const C coordinate = u[m * r + k];
#pragma unroll
          for (int v = 0; v < V; ++v) sum[m][v] += coordinate * w[v];
        }
      }
    }
#pragma unroll
    for (int m = 0; m < R; ++m) {
      if (row[m] < 0) continue;
      const Pack<T, V> x = *reinterpret_cast<const Pack<T, V>*>(in[m] + j);
      if (p.saved != nullptr) *reinterpret_cast<Pack<T, V>*>(static_cast<T*>(p.saved) + (first + m) * d + j) = x;
      Pack<T, V> y;
#pragma unroll
      for (int v = 0; v < V; ++v) y.x[v] = rounded<T>(static_cast<C>(to_float(x.x[v])) + sum[m][v]);
      store_streaming(static_cast<T*>(p.out.p) + row_offset(p.out, row[m]) + j, y);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kGradThreads) gradient_kernel(const Gradient p) {
  using C = accum_t<T>;
  constexpr int K = kGradChunk, N = kGradRows;
  const int thread = threadIdx.x, j = blockIdx.x * kGradThreads + thread, k0 = blockIdx.z * K, r = p.r;
  C* coordinates = reinterpret_cast<C*>(shared_memory());               // [3, N, K]: z, gp, gz
  int64_t* rows = reinterpret_cast<int64_t*>(coordinates + 3 * N * K);  // [N]
  const int64_t begin = blockIdx.y * p.range, end = begin + p.range < p.n ? begin + p.range : p.n;
  C total[3][K] = {};
  C vector = 0;  // threads 0 .. 2K-1 of the first column block: sum gp, sum gz
  for (int64_t i0 = begin; i0 < end; i0 += N) {
    __syncthreads();
    if (thread < N) rows[thread] = listed_row(p.index, i0 + thread, end, p.total);
    for (int e = thread; e < 3 * N * K; e += kGradThreads) {
      const int s = e / (N * K), m = e / K % N, k = k0 + e % K;
      const int64_t i = i0 + m;
      C x = 0;
      if (k < r && listed_row(p.index, i, end, p.total) >= 0) {
        if (s == 0) {
          x = static_cast<const C*>(p.z)[i * p.kept + k];
        } else {
          x = static_cast<const C*>(s == 1 && p.gp != nullptr ? p.gp : p.gz)[i * r + k];
        }
      }
      coordinates[e] = x;
    }
    __syncthreads();
    if (blockIdx.x == 0 && thread < 2 * K) {
      for (int m = 0; m < N; ++m) vector += coordinates[(1 + thread / K) * N * K + m * K + thread % K];
    }
    if (j < p.d) {
      C sum[3][K] = {};  // added to the total once a chunk: shorter chains round less
      for (int m = 0; m < N; ++m) {
        if (rows[m] < 0) continue;
        C g = 0, h = 0;
        if (p.slot[0] >= 0) g = to_float(static_cast<const T*>(p.g.p)[row_offset(p.g, rows[m]) + j]);
        if (p.slot[1] >= 0 || p.slot[2] >= 0) h = to_float(static_cast<const T*>(p.h.p)[row_offset(p.h, i0 + m) + j]);
#pragma unroll
        for (int k = 0; k < K; ++k) {
          sum[0][k] += coordinates[m * K + k] * g;
          sum[1][k] += coordinates[(N + m) * K + k] * h;
          sum[2][k] += coordinates[(2 * N + m) * K + k] * h;
        }
      }
#pragma unroll
      for (int s = 0; s < 3; ++s) {
#pragma unroll
        for (int k = 0; k < K; ++k) total[s][k] += sum[s][k];
      }
    }
  }
  C* partial = static_cast<C*>(p.partial);
  if (j < p.d) {
#pragma unroll
    for (int s = 0; s < 3; ++s) {
      if (p.slot[s] < 0) continue;
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (k0 + k < r)
          partial[((static_cast<int64_t>(blockIdx.y) * p.slots + p.slot[s]) * r + k0 + k) * p.d + j] = total[s][k];
      }
    }
  }
  if (blockIdx.x == 0 && thread < 2 * K && k0 + thread % K < r)
    static_cast<C*>(p.vectors)[(blockIdx.y * 2 + thread / K) * r + k0 + thread % K] = vector;
}

// sum[i] = from[at[i]] + from[stride + at[i]] + ..., `splits` terms in order; 0 where at[i] < 0. The loads of a few
// terms of all N are on their way together.
template <typename C, int N>
__device__ __forceinline__ void sum_partials(const void* from, int splits, int64_t stride, const int64_t (&at)[N],
                                             C (&sum)[N]) {
  constexpr int Batch = 4;
#pragma unroll
  for (int i = 0; i < N; ++i) sum[i] = 0;
#pragma unroll 1
  for (int s0 = 0; s0 < splits; s0 += Batch) {
    C x[Batch][N];
#pragma unroll
    for (int q = 0; q < Batch; ++q) {
      const C* p =
          static_cast<const C*>(from) + (s0 + q < splits ? s0 + q : s0) * stride;  // past the end one is read again
#pragma unroll
      for (int i = 0; i < N; ++i) x[q][i] = at[i] >= 0 ? p[at[i]] : C(0);
    }
#pragma unroll
    for (int q = 0; q < Batch; ++q) {
      if (s0 + q >= splits) break;
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += x[q][i];
    }
  }
}

// CTAs of the elements first, then those of the vectors, a warp a coordinate: there can be as many partial vectors as
// CTAs left some.
template <typename C>
__global__ void __launch_bounds__(256) finish_kernel(const Finish p) {
  wait_for_launch_before();
  if (blockIdx.x < p.element_blocks) {
    const int64_t e = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    if (e >= p.elements) return;
    const auto place = [&](int slot) { return slot >= 0 ? slot * p.elements + e : -1; };
    // dP and what a tied dU takes are one sum
    const int64_t at[3] = {place(p.dU != nullptr ? p.u : -1), place(p.dV != nullptr ? p.v : -1),
                           place(p.dP != nullptr   ? p.p
                                 : p.dU != nullptr ? p.tied
                                                   : -1)};
    C sum[3];
    sum_partials(p.partial, p.splits, p.slots * p.elements, at, sum);
    if (p.dU != nullptr) store_weight(p.dU, p.U, e, p.tied >= 0 ? sum[0] - sum[2] : sum[0]);
    if (p.dV != nullptr) store_weight(p.dV, p.V, e, sum[1]);
    if (p.dP != nullptr) store_weight(p.dP, p.P, e, -sum[2]);
    return;
  }
  const int lane = threadIdx.x % 32;
  const int64_t k = (blockIdx.x - p.element_blocks) * 8 + threadIdx.x / 32;
  if (k >= p.r || (p.db == nullptr && p.dc == nullptr)) return;
  const C* vectors = static_cast<const C*>(p.vectors) + k;
  C gp = 0, gz = 0;
#pragma unroll 4
  for (int s = lane; s < p.vector_splits; s += 32) {
    gp += vectors[2 * s * p.r];
    gz += vectors[(2 * s + 1) * p.r];
  }
  gp = warp_sum(gp);
  gz = warp_sum(gz);
  if (lane != 0) return;
  if (p.db != nullptr) store_weight(p.db, p.b, k, gp);
  if (p.dc != nullptr) store_weight(p.dc, p.c, k, -gz);
}

}  // namespace fastreft
