// Rows of many adapters, on CUDA cores: inference, of a prompt's few rows and of decode steps that edit.
//
// pooled_kernel: a CTA of 256 threads owns one row, so that a row's bits know nothing of its neighbours. It reads its
// adapter's line of the table, shrinks (the threads split the columns, four vectors at a time; partial sums meet by
// warp_sum, then warp by warp in order) and expands (a thread a column group). The row itself is read twice, the second
// time from L1 or L2; an adapter's vectors come from L2 for every row but the first that has it.
#include "../kernels.h"
#include "edit_common.cuh"
#include "edit_host.h"
#include "launch.h"

namespace fastreft {

constexpr int kPooledThreads = 256, kPooledChunk = 4;

inline int64_t pooled_shared(int64_t most_r, int64_t size) {
  return (3 * most_r + kPooledThreads / 32 * kPooledChunk) * size;
}

template <typename T, int V>
__global__ void __launch_bounds__(kPooledThreads, 2) pooled_kernel(const PooledArgs p) {
  using C = accum_t<T>;
  constexpr int K = kPooledChunk;
  const int64_t i = blockIdx.x, row = listed_row(p.index, i, p.n, p.total), adapter = p.adapter[i];
  if (row < 0 || adapter < 0 || adapter >= p.pool.adapters) return;
  const int32_t* entry = p.pool.table + 4 * adapter;
  const int64_t first = entry[0];
  const int r = entry[1], d = static_cast<int>(p.d), thread = threadIdx.x, warp = thread / 32;
  const Form form = static_cast<Form>(entry[3]);
  const int projections = form == Form::constant ? 0 : form == Form::apart ? 2 * r : r;
  const int vectors = projections > r ? projections : r;
  if (r <= 0 || r > p.most_r || first < 0 || first + vectors > p.pool.vectors) return;
  C* s = reinterpret_cast<C*>(shared_memory());  // [2 r] products
  C* z = s + 2 * p.most_r;                       // [r]
  C* sums = z + p.most_r;                        // [8 warps, K]
  T* state = static_cast<T*>(p.h.p) + row_offset(p.h, row);

  for (int k0 = 0; k0 < projections; k0 += K) {
    C sum[K] = {};
    for (int j = thread * V; j < d; j += kPooledThreads * V) {
      // All that a turn reads is on its way before any of it is looked at.
      const Pack<T, V> x = *reinterpret_cast<const Pack<T, V>*>(state + j);
      C w[K][V] = {};
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (k0 + k < projections) load_weight<V>(p.pool.A, (first + k0 + k) * p.d + j, w[k]);
#pragma unroll
      for (int k = 0; k < K; ++k)
#pragma unroll
        for (int v = 0; v < V; ++v) sum[k] += static_cast<C>(to_float(x.x[v])) * w[k][v];
    }
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const C total = warp_sum(sum[k]);
      if (thread % 32 == 0) sums[warp * K + k] = total;
    }
    __syncthreads();
    if (thread < K && k0 + thread < projections) {
      C total = 0;
      for (int w = 0; w < kPooledThreads / 32; ++w) total += sums[w * K + thread];
      s[k0 + thread] = total;
    }
    __syncthreads();
  }

  for (int k = thread; k < r; k += kPooledThreads) {
    C a = projections > 0 ? s[k] : C(0);
    if (p.pool.b.p != nullptr) a += load_weight<C>(p.pool.b, first + k);
    C value = act_value(static_cast<Act>(entry[2]), a);
    if (form == Form::apart) value -= s[r + k];
    if (p.pool.c.p != nullptr) value -= load_weight<C>(p.pool.c, first + k);
    z[k] = value;
  }
  __syncthreads();

  for (int j = thread * V; j < d; j += kPooledThreads * V) {
    const Pack<T, V> x = *reinterpret_cast<const Pack<T, V>*>(state + j);
    C sum[V] = {};
    for (int k0 = 0; k0 < r; k0 += K) {
      C w[K][V] = {};
#pragma unroll
      for (int k = 0; k < K; ++k)
        if (k0 + k < r) load_weight<V>(p.pool.U, (first + k0 + k) * p.d + j, w[k]);
#pragma unroll
      for (int k = 0; k < K; ++k) {
        if (k0 + k >= r) continue;
#pragma unroll
        for (int v = 0; v < V; ++v) sum[v] += z[k0 + k] * w[k][v];
      }
    }
    Pack<T, V> y;
#pragma unroll
    for (int v = 0; v < V; ++v) y.x[v] = rounded<T>(static_cast<C>(to_float(x.x[v])) + sum[v]);
    *reinterpret_cast<Pack<T, V>*>(state + j) = y;
  }
}

int edit_pooled_cuda(const PooledArgs& args) {
  if (args.d <= 0 || args.n <= 0 || args.most_r <= 0) return 0;
  Device device;
  if (int error = current_device(device)) return error;
  Grid grid;
  grid.x = args.n;
  grid.threads = kPooledThreads;
  grid.shared = pooled_shared(args.most_r, sum_size(args.type));
  if (grid.shared > device.shared || grid.x >= (int64_t{1} << 31)) return kInvalidValue;
  const bool vector = args.d % (16 / element_size(args.type)) == 0 && vector_rows(args.h, args.type) &&
                      aligned16(args.pool.A.p) && aligned16(args.pool.U.p) && args.d % 8 == 0;
  return by_type(args.type, [&](auto t) {
    using T = decltype(t);
    return vector ? launch<pooled_kernel<T, kVector<T>>>(grid, args.stream, args)
                  : launch<pooled_kernel<T, 1>>(grid, args.stream, args);
  });
}

}  // namespace fastreft
