// What the kernels' design takes for granted and no manual says, measured alone, in a second, before anything else:
//
//   barrier   the time of a tile whose memory comes by cp.async while the tile before is worked on, without a barrier,
//             with a CTA's and with a cluster's. barrier.cluster compiles to a fence over the GPU: if that waits for
//             copies in flight, what was fetched ahead is lost, and a tile costs a latency more.
//   exchange  the time of a round trip between the CTAs of a cluster: two cluster barriers, against st.async into the
//             others' shared memory with an mbarrier that counts the bytes.
//
//     nvcc -std=c++17 -O3 -arch=sm_90 -o gpu_micro benchmarks/gpu_micro.cu && ./gpu_micro
//
// Stands alone: what is tried here is not in the kernels, or not yet. Needs clusters (compute capability 9.0 or more).
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int kThreads = 256, kCluster = 8, kStages = 2;
constexpr int kTile = 32 * 1024;  // bytes a CTA's tile: 8 copies of 16 bytes a thread
constexpr int kShared = kStages * kTile;

#define CHECK(call)                                                        \
  do {                                                                     \
    const cudaError_t error_ = (call);                                     \
    if (error_ != cudaSuccess) {                                           \
      std::fprintf(stderr, "%s: %s\n", #call, cudaGetErrorString(error_)); \
      std::exit(1);                                                        \
    }                                                                      \
  } while (0)

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ uint32_t of_rank(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

enum Barrier { none, cta, cluster };

// Tiles of one CTA after the other's; each is read from shared memory, changed and stored, as an edit does it.
template <Barrier Kind>
__global__ void __launch_bounds__(kThreads, 2) tiles(const uint4* from, uint4* to, int64_t count) {
  extern __shared__ __align__(128) char shared[];
  constexpr int Packs = kTile / 16;
  const auto fetch = [&](int64_t tile, int stage) {
    if (tile < count) {
      for (int e = threadIdx.x; e < Packs; e += kThreads) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared + stage * kTile + e * 16)),
                     "l"(from + tile * Packs + e)
                     : "memory");
      }
    }
    asm volatile("cp.async.commit_group;" ::: "memory");
  };
  for (int stage = 0; stage < kStages; ++stage) fetch(blockIdx.x + static_cast<int64_t>(stage) * gridDim.x, stage);
  // Every CTA takes as many turns, so that all of a cluster meet as often.
  const int64_t turns = (count + gridDim.x - 1) / gridDim.x;
  for (int64_t turn = 0; turn < turns; ++turn) {
    const int64_t tile = blockIdx.x + turn * gridDim.x;
    const int stage = static_cast<int>(turn % kStages);
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 1) : "memory");
    for (int twice = 0; twice < 2; ++twice) {  // an edit has two a tile
      if (Kind == cta) __syncthreads();
      if (Kind == cluster) cluster_barrier();
    }
    for (int e = threadIdx.x; tile < count && e < Packs; e += kThreads) {  // what this thread has fetched itself
      uint4 x = *reinterpret_cast<const uint4*>(shared + stage * kTile + e * 16);
      x.x ^= 1;
      __stcs(to + tile * Packs + e, x);
    }
    fetch(tile + static_cast<int64_t>(kStages) * gridDim.x, stage);
  }
  asm volatile("cp.async.wait_group 0;" ::: "memory");
}

// Round trips of 64 bytes from every CTA of a cluster to every other. A thread a rank sends; `cycles` is of one CTA.
template <bool Async>
__global__ void __launch_bounds__(kThreads) round_trips(int trips, int64_t* cycles, int* wrong) {
  __shared__ alignas(16) int inbox[2][kCluster][16];
  __shared__ alignas(8) uint64_t full[2];
  const uint32_t rank = cluster_rank();
  const int thread = static_cast<int>(threadIdx.x);
  if (thread == 0) {
    for (auto& barrier : full)
      asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(&barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  cluster_barrier();
  int errors = 0;
  const int64_t start = clock64();
  for (int trip = 0; trip < trips; ++trip) {
    const int which = trip % 2;
    if constexpr (Async) {
      // The bytes of all ranks arrive at this CTA's barrier, whose phase ends with the last of them.
      if (thread == 0)
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(&full[which])),
                     "r"(kCluster * 64)
                     : "memory");
      if (thread < kCluster * 16) {
        const uint32_t there = thread / 16;
        const uint32_t place = of_rank(shared_address(&inbox[which][rank][thread % 16]), there);
        const uint32_t barrier = of_rank(shared_address(&full[which]), there);
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(place),
                     "r"(trip + static_cast<int>(rank)), "r"(barrier)
                     : "memory");
      }
      uint32_t done = 0;
      while (!done) {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
            "selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(shared_address(&full[which])), "r"(static_cast<uint32_t>(trip / 2 % 2))
            : "memory");
      }
    } else {
      if (thread < kCluster * 16) {
        const uint32_t place = of_rank(shared_address(&inbox[which][rank][thread % 16]), thread / 16);
        asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(place), "r"(trip + static_cast<int>(rank)) : "memory");
      }
      cluster_barrier();
    }
    if (thread < kCluster * 16) errors += inbox[which][thread / 16][thread % 16] != trip + thread / 16;
    __syncthreads();  // read before anybody here sends what lets the others overwrite it
  }
  const int64_t end = clock64();
  if (thread == 0 && rank == 0) cycles[blockIdx.x / kCluster] = end - start;
  if (errors) atomicAdd(wrong, errors);
  cluster_barrier();  // nobody ends while others may still send to it
}

template <typename... Params, typename... Args>
cudaError_t start(void (*kernel)(Params...), int blocks, int clustered, int shared, Args... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(clustered);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

// Median milliseconds of a launch.
template <typename Launch>
float milliseconds(const Launch& launch) {
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> taken;
  for (int round = 0; round < 12; ++round) {
    CHECK(cudaEventRecord(begin));
    CHECK(launch());
    CHECK(cudaEventRecord(end));
    CHECK(cudaEventSynchronize(end));
    float time = 0;
    CHECK(cudaEventElapsedTime(&time, begin, end));
    if (round >= 2) taken.push_back(time);
  }
  std::sort(taken.begin(), taken.end());
  return taken[taken.size() / 2];
}

}  // namespace

int main() {
  cudaDeviceProp device;
  CHECK(cudaGetDeviceProperties(&device, 0));
  std::printf("%s, compute capability %d.%d\n", device.name, device.major, device.minor);
  if (device.major < 9) {
    std::printf("no clusters here: nothing to measure\n");
    return 0;
  }

  constexpr int64_t Tiles = 8192;  // 256 MiB in, 256 MiB out
  uint4 *from = nullptr, *to = nullptr;
  CHECK(cudaMalloc(&from, Tiles * kTile));
  CHECK(cudaMalloc(&to, Tiles * kTile));
  CHECK(cudaMemset(from, 1, Tiles * kTile));
  int clusters = 0;
  {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(kCluster);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = kShared;
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kCluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
    CHECK(cudaFuncSetAttribute(tiles<cluster>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    CHECK(cudaFuncSetAttribute(tiles<cta>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    CHECK(cudaFuncSetAttribute(tiles<none>, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
    CHECK(cudaOccupancyMaxActiveClusters(&clusters, tiles<cluster>, &config));
  }
  std::printf("clusters of %d with %d KiB each CTA that run at once: %d (of %d multiprocessors)\n", kCluster,
              kShared / 1024, clusters, device.multiProcessorCount);
  const int blocks = clusters * kCluster;
  const auto report = [&](const char* name, float time) {
    const double bytes = 2.0 * Tiles * kTile, turns = static_cast<double>((Tiles + blocks - 1) / blocks);
    std::printf("  %-44s %8.3f ms  %7.1f GB/s  %7.2f us a tile\n", name, time, bytes / time * 1e-6, time * 1e3 / turns);
  };
  std::printf("barrier: tiles of %d KiB, %d ahead, %d CTAs\n", kTile / 1024, kStages - 1, blocks);
  report("no barrier", milliseconds([&] { return start(tiles<none>, blocks, kCluster, kShared, from, to, Tiles); }));
  report("2 CTA barriers a tile",
         milliseconds([&] { return start(tiles<cta>, blocks, kCluster, kShared, from, to, Tiles); }));
  report("2 cluster barriers a tile",
         milliseconds([&] { return start(tiles<cluster>, blocks, kCluster, kShared, from, to, Tiles); }));

  constexpr int Trips = 1000;
  int64_t* cycles = nullptr;
  int* wrong = nullptr;
  CHECK(cudaMallocManaged(&cycles, sizeof(int64_t)));
  CHECK(cudaMallocManaged(&wrong, sizeof(int)));
  *wrong = 0;
  std::printf("exchange: one cluster of %d, 64 bytes from each CTA to each\n", kCluster);
  const auto trips = [&](const char* name, void (*kernel)(int, int64_t*, int*)) {
    for (int round = 0; round < 3; ++round) CHECK(start(kernel, kCluster, kCluster, 0, Trips, cycles, wrong));
    CHECK(cudaDeviceSynchronize());
    std::printf("  %-44s %8.0f cycles%s\n", name, static_cast<double>(*cycles) / Trips, *wrong ? "  WRONG DATA" : "");
  };
  trips("stores and a cluster barrier", round_trips<false>);
  trips("st.async and an mbarrier", round_trips<true>);
  return *wrong != 0;
}
