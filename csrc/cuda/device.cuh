// What every kernel here stands on: storage types, 16-byte loads and stores, asynchronous copies, tensor-core
// products, and reductions over a warp, a CTA and a cluster. All inline PTX of the project is in this file.
//
// With FASTREFT_SIMT the same names come from tests/cuda/simt/cuda_host.h, which runs the kernels on the host.
#pragma once
#include <cstdint>

#include "../edit.h"

#ifdef FASTREFT_SIMT
#include "cuda_host.h"
#else
#include <cuda_runtime.h>
#endif

namespace fastreft {

// 16-bit storage. Arithmetic is in fp32: nothing here adds or multiplies in 16 bits outside the tensor cores.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type sums run in: fp64 for fp64, else fp32.
template <typename T>
struct Accum {
  using type = float;
};
template <>
struct Accum<double> {
  using type = double;
};
template <typename T>
using accum_t = typename Accum<T>::type;

#ifndef FASTREFT_SIMT
__device__ __forceinline__ float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
// As cuda_fp16.h and cuda_bf16.h convert, without the second of every unit's compilation that those headers take.
__device__ __forceinline__ float to_float(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
__device__ __forceinline__ void store_as(float x, bf16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
__device__ __forceinline__ void store_as(float x, f16& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
#else
__device__ __forceinline__ float to_float(bf16 x) { return simt::from_bf16(x.bits); }
__device__ __forceinline__ float to_float(f16 x) { return simt::from_f16(x.bits); }
__device__ __forceinline__ void store_as(float x, bf16& y) { y.bits = simt::to_bf16(x); }
__device__ __forceinline__ void store_as(float x, f16& y) { y.bits = simt::to_f16(x); }
#endif
#ifndef FASTREFT_SIMT
__device__ __forceinline__ uint32_t as_bits(float x) { return __float_as_uint(x); }
#else
inline uint32_t as_bits(float x) { return simt::as_bits(x); }
#endif
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ double to_float(double x) { return x; }
__device__ __forceinline__ void store_as(float x, float& y) { y = x; }
__device__ __forceinline__ void store_as(double x, double& y) { y = x; }
__device__ __forceinline__ void store_as(double x, float& y) { y = static_cast<float>(x); }

template <typename T>
__device__ __forceinline__ T rounded(accum_t<T> x) {
  T y;
  store_as(x, y);
  return y;
}

// Two neighbours of a 16-bit row in one register, as the tensor cores take them. Rounded together: two conversions and
// what joins them are one instruction on cc 9.0 either way, but on cc 10.0 they stay four.
#ifndef FASTREFT_SIMT
__device__ __forceinline__ uint32_t pack_as(float low, float high, bf16) {
  uint32_t two;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}
__device__ __forceinline__ uint32_t pack_as(float low, float high, f16) {
  uint32_t two;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(two) : "f"(high), "f"(low));
  return two;
}
#else
template <typename T>
__device__ __forceinline__ uint32_t pack_as(float low, float high, T) {
  return static_cast<uint32_t>(rounded<T>(low).bits) | static_cast<uint32_t>(rounded<T>(high).bits) << 16;
}
#endif
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  return pack_as(low, high, T{});
}
template <typename T>
__device__ __forceinline__ float2 unpack(uint32_t two) {
  return make_float2(to_float(T{static_cast<uint16_t>(two & 0xffffu)}), to_float(T{static_cast<uint16_t>(two >> 16)}));
}

// V neighbouring elements, moved as one access where V * sizeof(T) is 16 bytes.
template <typename T, int V>
struct alignas(V * sizeof(T)) Pack {
  T x[V];
};
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Dynamic shared memory, the only kind used.
__device__ __forceinline__ char* shared_memory() {
#ifdef FASTREFT_SIMT
  return simt::shared_memory();
#else
  extern __shared__ __align__(128) char fastreft_shared[];
  return fastreft_shared;
#endif
}

#ifndef FASTREFT_SIMT

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// 16 bytes from global to shared memory without passing registers; zeros where `valid` is false.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `Pending` of this thread's newest groups are still on their way.
template <int Pending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// c (16 x 8, fp32) += a (16 x 16) b (16 x 8). Not volatile: the loads of the next product may come before this one.
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bf16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, f16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 16 x 16 elements in fragments of load_matrices' layout, back to shared memory.
template <typename T>
__device__ __forceinline__ void store_block(T* block, int64_t pitch, const uint32_t (&r)[4]) {
  const int lane = threadIdx.x % 32;
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                   shared_address(block + lane % 16 * pitch + lane / 16 * 8)),
               "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
               : "memory");
#else
#pragma unroll
  for (int q = 0; q < 4; ++q)
    *reinterpret_cast<uint32_t*>(block + (lane / 4 + q % 2 * 8) * pitch + q / 2 * 8 + lane % 4 * 2) = r[q];
#endif
}

// Arrivals (an mbarrier): a phase is over when as many threads have arrived as arrivals_init says and as many bytes as
// they said to expect, whichever comes first.
using Arrivals = uint64_t;
// By one thread, before a barrier over the cluster (or, for its own warp alone, a __syncwarp) after which others may
// use them.
__device__ __forceinline__ void arrivals_init(Arrivals* a, int threads) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(a)), "r"(threads) : "memory");
}
__device__ __forceinline__ void arrive(Arrivals* a) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(a)) : "memory");
}
// This thread arrives when all that it has copied asynchronously has.
__device__ __forceinline__ void arrive_when_copied(Arrivals* a) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(a)) : "memory");
}
// Until the phase of this parity is over.
__device__ __forceinline__ void arrivals_wait(Arrivals* a, int parity) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .pred over;\nAGAIN:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 over, [%0], %1;\n@!over bra AGAIN;\n}" ::"r"(shared_address(a)),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{\n.reg .pred over;\nAGAIN:\n"
      "mbarrier.test_wait.parity.shared::cta.b64 over, [%0], %1;\n@!over bra AGAIN;\n}" ::"r"(shared_address(a)),
      "r"(parity)
      : "memory");
#endif
}
// A barrier over `Threads` of the CTA's threads from the `From`-th on: of a kernel always the same. Where it has two
// such groups the second's is the third barrier (the second is start_barrier's).
template <int Threads, int From = 0, int Barrier = 1>
__device__ __forceinline__ void barrier_of() {
  asm volatile("bar.sync %0, %1;" ::"n"(Barrier), "n"(Threads) : "memory");
}
// The same over the first `Threads`, which tells each of them whether any came with true.
template <int Threads>
__device__ __forceinline__ bool any_of(bool mine) {
  uint32_t any;
  asm volatile("{\n.reg .pred p, q;\nsetp.ne.u32 p, %1, 0;\nbar.red.or.pred q, 1, %2, p;\nselp.u32 %0, 1, 0, q;\n}"
               : "=r"(any)
               : "r"(static_cast<uint32_t>(mine)), "n"(Threads)
               : "memory");
  return any != 0;
}
// A barrier that a warp may say it has come to and go on.
template <int Threads>
__device__ __forceinline__ void start_barrier() {
  asm volatile("bar.sync 2, %0;" ::"n"(Threads) : "memory");
}
template <int Threads>
__device__ __forceinline__ void start_barrier_arrive() {
  asm volatile("bar.arrive 2, %0;" ::"n"(Threads) : "memory");
}
// A hint that the 128 bytes there will be read: L2 fetches them.
__device__ __forceinline__ void fetch_to_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Clusters, and what their CTAs send each other. A send is a store of 16 bytes to the same place in the shared memory
// of a rank, whose Arrivals count its bytes; the rank says how many it expects, once a phase, and waits for them. That
// takes no fence: a cluster barrier is one of the whole GPU (MEMBAR.ALL.GPU, and L1 is thrown away).
//
// The wait acquires at the scope of the CTA, as CUTLASS waits for such stores (ClusterTransactionBarrier::wait after
// store_shared_remote): what it orders lies in shared memory, and at the scope of the cluster it would empty L1, too.
//
// Bulk copies move a row's slice by one instruction of one thread: 16 bytes at least, all of it on 16 bytes. What they
// bring is counted by Arrivals, what they take has been read after bulk_wait. They are not ordered with a thread's own
// accesses to shared memory: async_fence orders what it has written before what the copies read or write.
//
// Below cc 9.0 a cluster is one CTA, in which nothing is sent and nothing copied in bulk.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ constexpr bool has_bulk_copies() { return true; }
__device__ __forceinline__ constexpr bool has_clusters() { return true; }
__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}
__device__ __forceinline__ void cluster_arrive() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }
// The same place in the shared memory of another CTA of the cluster, as a generic pointer.
template <typename T>
__device__ __forceinline__ T* of_rank(T* p, int rank) {
  uint64_t there;
  asm volatile("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(reinterpret_cast<uint64_t>(p)), "r"(rank));
  return reinterpret_cast<T*>(there);
}
// After the arrivals_init of a thread, before others and asynchronous copies meet them.
__device__ __forceinline__ void arrivals_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}
// Arrives and expects that many bytes more; what has arrived already counts.
__device__ __forceinline__ void arrivals_expect(Arrivals* a, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(a)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void send(void* to, const uint4& x, Arrivals* a, int rank) {
  asm volatile(
      "{\n.reg .b32 there, counted;\nmapa.shared::cluster.u32 there, %0, %2;\n"
      "mapa.shared::cluster.u32 counted, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [there], {%3,%4,%5,%6}, [counted];\n}" ::"r"(
          shared_address(to)),
      "r"(shared_address(a)), "r"(rank), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
      : "memory");
}
// What a launch may begin with (Grid::early): the next one may be started when all CTAs have said so or ended, and
// waits here until the one before it has ended and all that it wrote can be seen.
__device__ __forceinline__ void wait_for_launch_before() {
  asm volatile("griddepcontrol.launch_dependents;\ngriddepcontrol.wait;" ::: "memory");
}
// One lane of the warp, the same one each time.
__device__ __forceinline__ bool elected() {
  uint32_t is;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(is));
  return is != 0;
}
__device__ __forceinline__ void async_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
__device__ __forceinline__ void bulk_load(void* to, const void* from, int bytes, Arrivals* a) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to)),
               "l"(from), "r"(bytes), "r"(shared_address(a))
               : "memory");
}
__device__ __forceinline__ void bulk_store(void* to, const void* from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from)),
               "r"(bytes)
               : "memory");
}
// Until all that this thread has stored in bulk has been read.
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 0;" ::: "memory");
}
#else
__device__ __forceinline__ constexpr bool has_bulk_copies() { return false; }
__device__ __forceinline__ constexpr bool has_clusters() { return false; }
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_arrive() {}
__device__ __forceinline__ void cluster_wait() {}
template <typename T>
__device__ __forceinline__ T* of_rank(T* p, int) {
  return p;
}
__device__ __forceinline__ void arrivals_init_fence() {}
__device__ __forceinline__ void arrivals_expect(Arrivals*, int) {}
__device__ __forceinline__ void send(void*, const uint4&, Arrivals*, int) {}
__device__ __forceinline__ void wait_for_launch_before() {}
__device__ __forceinline__ bool elected() { return threadIdx.x % 32 == 0; }
__device__ __forceinline__ void async_fence() {}
__device__ __forceinline__ void bulk_load(void*, const void*, int, Arrivals*) {}
__device__ __forceinline__ void bulk_store(void*, const void*, int) {}
__device__ __forceinline__ void bulk_wait() {}
#endif

#endif  // FASTREFT_SIMT

// A barrier over the cluster; over the CTA where the cluster is one.
__device__ __forceinline__ void cluster_sync(int cluster) {
  if (cluster > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    __syncthreads();
  }
}
// The same once in a kernel's life, over all of its `Threads` a CTA, of which whole warps may say that they have come
// and go on, and wait when they have to.
template <int Threads>
__device__ __forceinline__ void all_started(int cluster) {
  if (cluster > 1) {
    cluster_arrive();
    cluster_wait();
  } else {
    start_barrier<Threads>();
  }
}
template <int Threads>
__device__ __forceinline__ void say_started(int cluster) {
  if (cluster > 1) {
    cluster_arrive();
  } else {
    start_barrier_arrive<Threads>();
  }
}
// Of a cluster of one CTA, what a warp that has said so still has to wait for is others' affair.
__device__ __forceinline__ void wait_for_started(int cluster) {
  __syncwarp();
  if (cluster > 1) cluster_wait();
}

// A store that the caches need not keep: the edit's output is not read again here.
template <typename T, int V>
__device__ __forceinline__ void store_streaming(T* to, const Pack<T, V>& value) {
  if constexpr (sizeof(value) == 16) {
    __stcs(reinterpret_cast<uint4*>(to), *reinterpret_cast<const uint4*>(&value));
  } else {
    *reinterpret_cast<Pack<T, V>*>(to) = value;
  }
}

// The sum over a warp, in every lane; the tree is fixed, so the bits are too.
template <typename C>
__device__ __forceinline__ C warp_sum(C x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  return x;
}

}  // namespace fastreft
