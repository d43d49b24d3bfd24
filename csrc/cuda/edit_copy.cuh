// An edit of listed rows into other memory than theirs: CTAs behind those that edit copy the rows that are not listed,
// in the same launch, so that the state is read once and nobody waits for a copy.
//
// A copying CTA owns Pass::copy_rows neighbouring rows. It goes through the whole index and marks, a byte a row in
// shared memory, which of its rows the editing CTAs write; two marks of one row are the same byte. No atomics, no
// scratch, nothing built beforehand.
#pragma once
#include "edit_common.cuh"

namespace fastreft {

template <typename T, int V, int Threads>
__device__ __forceinline__ void copy_unlisted(const Pass& p, int64_t block) {
  constexpr int Batch = 8;  // loads a thread has on their way at a time
  const int64_t begin = block * p.copy_rows, left = p.total - begin;
  if (left <= 0) return;
  const int count = static_cast<int>(left < p.copy_rows ? left : p.copy_rows), thread = threadIdx.x;
  unsigned char* listed = reinterpret_cast<unsigned char*>(shared_memory());  // [kCopyRows]
  for (int m = thread; m < count; m += Threads) listed[m] = 0;
  __syncthreads();
  for (int64_t i = thread; i < p.n; i += Threads) {
    const int64_t m = p.index[i] - begin;
    if (m >= 0 && m < count) listed[m] = 1;
  }
  __syncthreads();

  const int lane = thread % 32;
  for (int m = thread / 32; m < count; m += Threads / 32) {  // a warp a row
    if (listed[m]) continue;
    const T* from = static_cast<const T*>(p.in.p) + row_offset(p.in, begin + m);
    T* to = static_cast<T*>(p.out.p) + row_offset(p.out, begin + m);
    for (int j0 = lane * V; j0 < p.d; j0 += Batch * 32 * V) {
      Pack<T, V> x[Batch];
#pragma unroll
      for (int q = 0; q < Batch; ++q) {
        const int j = j0 + q * 32 * V;
        if (j < p.d) x[q] = *reinterpret_cast<const Pack<T, V>*>(from + j);
      }
#pragma unroll
      for (int q = 0; q < Batch; ++q) {
        const int j = j0 + q * 32 * V;
        if (j < p.d) store_streaming(to + j, x[q]);
      }
    }
  }
}

}  // namespace fastreft
