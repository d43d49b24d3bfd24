// A host meaning for CUDA's words, so that the project's .cu files compile with g++ and run, thread by thread, on
// any machine: every CUDA thread is a fiber, all the fibers of a cluster live at once, and they are resumed in a
// shuffled order between two meetings (barrier, shuffle, matrix instruction, cluster barrier).
//
// What it is made to catch:
// * a missing barrier: shared memory starts poisoned (NaN), and the order of threads changes with the seed; half of the
//   time the lanes of a warp do not go on together either. Shuffles and matrix instructions make them meet;
// * a missing wait: an asynchronous copy poisons its target when issued and fills it only at the wait that covers it,
// or
//   at any time before the arrival it was told to count; a send to another CTA and a bulk copy poison their targets,
//   too, and arrive at any time from then on, in any order; what is stored in bulk is read at once or at the wait;
// * a send in a launch without clusters, which is an illegal instruction;
// * an index out of place: shared memory is a heap block of exactly the asked size under AddressSanitizer, and so are
//   the caller's tensors; misaligned vector accesses are UBSan's;
// * divergence: a barrier that some threads miss is a deadlock, lanes that meet in different instructions an error;
// * reading the shared memory of a CTA that has ended: it is poisoned for AddressSanitizer then.
#pragma once
#include <math.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct float2 {
  float x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace simt {

struct Device {
  int major = 9, minor = 0, multiprocessors = 4;
  int64_t shared = 232448;
  int largest_cluster = 8;
};
extern Device device;

// Faults on purpose, to see that they are noticed: the n-th barrier or wait of every thread of some warps, the first
// and the last, is left out (-1: none), in the launch of that number (-1: in all).
struct Plant {
  int block_barrier = -1, cluster_barrier = -1, copy_wait = -1, arrival_wait = -1, warp_barrier = -1, launch = -1;
  int warps[2] = {0, 31};
};
extern Plant plant;

struct Shape {
  int64_t x;
  int y, z;
};

// Runs one launch to its end. `shared` bytes a CTA, `cluster` CTAs a cluster along x.
void run(const Shape& grid, int threads, int cluster, int64_t shared, const std::function<void()>& kernel);
void seed(uint64_t value);

const dim3& thread_index();
const dim3& block_index();
const dim3& block_size();
const dim3& grid_size();
char* shared_memory();
void block_barrier();
void start_barrier(int threads, bool waits);
void cluster_arrive();
void cluster_wait();
void warp_barrier();
int cluster_rank();
int64_t shared_of_own(const void* p);
char* shared_of_rank(const void* p, int rank);
void barrier_of(int barrier, int threads, int from);
bool any_of(int threads, bool mine);
void arrivals_init(const void* a, int threads);
void arrive(const void* a);
void arrive_when_copied(const void* a);
void arrivals_wait(const void* a, int parity);
// From cc 9.0 on; device.cuh says what comes before that.
void arrivals_expect(const void* a, int bytes);
void send(void* to, const void* bytes, const void* a, int rank);
void bulk_load(void* to, const void* from, int bytes, const void* a);
void bulk_store(void* to, const void* from, int bytes);
void bulk_wait();
void copy_async(void* to, const void* from, bool valid);
void copy_commit();
void copy_wait(int pending);

constexpr int kDeposit = 64;
// Leaves `bytes` of this lane where its warp can see them, meets the other 31 lanes, and returns what all lanes left:
// lane i's bytes start at i * kDeposit. `what` names the instruction; all lanes must meet in the same one.
const char* meet(const char* what, const void* mine, int bytes);

template <typename T>
T of_lane(const char* deposits, int lane) {
  T value;
  memcpy(&value, deposits + lane * kDeposit, sizeof(T));
  return value;
}
inline int lane() { return static_cast<int>(thread_index().x % 32); }

inline uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
uint16_t to_bf16(float x);
float from_bf16(uint16_t x);
uint16_t to_f16(float x);
float from_f16(uint16_t x);

struct Fragments {
  uint32_t a[4], b[2];
};
void multiply(float (&c)[4], const Fragments& mine, float (*value)(uint16_t));
void load_matrices(uint32_t (&r)[4], const void* row, bool transposed);
void store_matrices(void* row, const uint32_t (&r)[4]);

}  // namespace simt

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block_index())
#define blockDim (simt::block_size())
#define gridDim (simt::grid_size())

inline void __syncthreads() { simt::block_barrier(); }
inline void __threadfence() {}
inline void __syncwarp() { simt::warp_barrier(); }
inline uint32_t __ballot_sync(uint32_t, bool mine) {
  const char* all = simt::meet("ballot", &mine, sizeof(mine));
  uint32_t ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= static_cast<uint32_t>(simt::of_lane<bool>(all, lane)) << lane;
  return ballot;
}
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }

template <typename T>
T __shfl_xor_sync(uint32_t, T x, int mask) {
  return simt::of_lane<T>(simt::meet("shuffle", &x, sizeof(T)), simt::lane() ^ mask);
}
template <typename T>
T __shfl_sync(uint32_t, T x, int lane) {
  return simt::of_lane<T>(simt::meet("shuffle", &x, sizeof(T)), lane);
}
template <typename T>
void __stcs(T* to, const T& value) {
  *to = value;
}

namespace fastreft {

inline void copy_async(void* to, const void* from, bool valid) { simt::copy_async(to, from, valid); }
inline void copy_commit() { simt::copy_commit(); }
template <int Pending>
void copy_wait() {
  simt::copy_wait(Pending);
}
inline void load_matrices(uint32_t (&r)[4], const void* row) { simt::load_matrices(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { simt::load_matrices(r, row, true); }

struct bf16;
struct f16;
template <typename T>
inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, T) {
  simt::multiply(c, {{a[0], a[1], a[2], a[3]}, {b0, b1}}, std::is_same_v<T, bf16> ? simt::from_bf16 : simt::from_f16);
}

template <typename T>
void store_block(T* block, int64_t pitch, const uint32_t (&r)[4]) {
  simt::store_matrices(block + simt::lane() % 16 * pitch + simt::lane() / 16 * 8, r);
}

using Arrivals = uint64_t;
inline bool has_bulk_copies() { return simt::device.major >= 9; }
inline bool has_clusters() { return simt::device.major >= 9; }
inline void arrivals_init(Arrivals* a, int threads) { simt::arrivals_init(a, threads); }
inline void arrivals_init_fence() {}
inline void arrive(Arrivals* a) { simt::arrive(a); }
inline void arrive_when_copied(Arrivals* a) { simt::arrive_when_copied(a); }
inline void arrivals_expect(Arrivals* a, int bytes) { simt::arrivals_expect(a, bytes); }
inline void arrivals_wait(Arrivals* a, int parity) { simt::arrivals_wait(a, parity); }
template <int Threads, int From = 0, int Barrier = 1>
void barrier_of() {
  simt::barrier_of(Barrier, Threads, From);
}
template <int Threads>
bool any_of(bool mine) {
  return simt::any_of(Threads, mine);
}
inline void fetch_to_l2(const void* p) { static_cast<void>(*static_cast<const volatile char*>(p)); }
inline void send(void* to, const uint4& x, Arrivals* a, int rank) { simt::send(to, &x, a, rank); }
inline void wait_for_launch_before() {}
inline bool elected() { return simt::lane() == 0; }
inline void async_fence() {}
inline void bulk_load(void* to, const void* from, int bytes, Arrivals* a) { simt::bulk_load(to, from, bytes, a); }
inline void bulk_store(void* to, const void* from, int bytes) { simt::bulk_store(to, from, bytes); }
inline void bulk_wait() { simt::bulk_wait(); }

inline int cluster_rank() { return simt::cluster_rank(); }
inline void cluster_arrive() { simt::cluster_arrive(); }
inline void cluster_wait() { simt::cluster_wait(); }
template <int Threads>
void start_barrier() {
  simt::start_barrier(Threads, true);
}
template <int Threads>
void start_barrier_arrive() {
  simt::start_barrier(Threads, false);
}
template <typename T>
T* of_rank(T* p, int rank) {
  return reinterpret_cast<T*>(simt::shared_of_rank(p, rank));
}

}  // namespace fastreft
