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
  constexpr int Batch = 8;  // loads a thread has on their way
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

  const int packs = p.d / V, all = count * packs;
  for (int e0 = thread; e0 < all; e0 += Batch * Threads) {
    Pack<T, V> x[Batch];
#pragma unroll
    for (int q = 0; q < Batch; ++q) {
      const int e = e0 + q * Threads, m = e / packs;
      if (e < all && !listed[m])
        x[q] = *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(p.in.p) + row_offset(p.in, begin + m) +
                                                    e % packs * V);
    }
#pragma unroll
    for (int q = 0; q < Batch; ++q) {
      const int e = e0 + q * Threads, m = e / packs;
      if (e < all && !listed[m])
        store_streaming(static_cast<T*>(p.out.p) + row_offset(p.out, begin + m) + e % packs * V, x[q]);
    }
  }
}

}  // namespace fastreft
