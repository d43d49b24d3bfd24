// The one way a kernel is started: launch<kernel>(shape, stream, arguments...). No <<<>>> anywhere, so that the
// host simulation (tests/cuda/simt) can run the very same sources, and cluster launches take the same road as plain ones.
#pragma once
#include <atomic>
#include <mutex>

#include "device.cuh"
#include "policy.h"

namespace fastreft {

constexpr int kInvalidValue = 1;  // cudaErrorInvalidValue

struct Grid {
  int64_t x = 1;  // CTAs, a multiple of `cluster`
  int y = 1, z = 1;
  int threads = 256;
  int cluster = 1;  // CTAs in a cluster, along x
  int64_t shared = 0;
};

#ifdef FASTREFT_SIMT

template <auto Kernel, typename... Args>
int launch(const Grid& grid, void*, const Args&... args) {
  simt::run({grid.x, grid.y, grid.z}, grid.threads, grid.cluster, grid.shared, [&] { Kernel(args...); });
  return 0;
}
inline int current_device(Device& device) {
  device.major = simt::device.major;
  device.minor = simt::device.minor;
  device.multiprocessors = simt::device.multiprocessors;
  device.shared = simt::device.shared;
  device.largest_cluster = simt::device.largest_cluster;
  return 0;
}

#else

constexpr int kDevices = 64;

inline int current_device_index(int& index) { return static_cast<int>(cudaGetDevice(&index)); }

template <auto Kernel, typename... Args>
int launch(const Grid& grid, void* stream, const Args&... args) {
  // More than 48 KB of shared memory has to be asked for, once a kernel and device. Under a lock: of two threads that
  // ask at once, the one with less must not come last.
  static std::atomic<int64_t> allowed[kDevices];  // bytes allowed so far
  static std::mutex asking;
  if (grid.shared > 48 * 1024) {
    int index = 0;
    if (int error = current_device_index(index)) return error;
    if (index >= kDevices) return kInvalidValue;
    std::atomic<int64_t>& seen = allowed[index];
    if (seen.load(std::memory_order_acquire) < grid.shared) {
      const std::lock_guard<std::mutex> lock(asking);
      if (seen.load(std::memory_order_relaxed) < grid.shared) {
        const cudaError_t error =
            cudaFuncSetAttribute(Kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(grid.shared));
        if (error != cudaSuccess) return static_cast<int>(error);
        seen.store(grid.shared, std::memory_order_release);
      }
    }
  }
  if (grid.cluster > 8) {
    const cudaError_t error = cudaFuncSetAttribute(Kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return static_cast<int>(error);
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  if (grid.cluster > 1) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
  return static_cast<int>(cudaLaunchKernelEx(&config, Kernel, args...));
}

template <int>
__global__ void probe_kernel() {}

// How many clusters of `cluster` CTAs, each with `shared` bytes, the current device runs at once: 0 where it runs none.
// More than 8 CTAs are not promised for every device of an architecture, nor for a part of one.
inline int resident(int cluster, int64_t shared) {
  const auto kernel = probe_kernel<0>;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(cluster));
  config.blockDim = dim3(256);
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // a question without an answer is no error of the caller's
    return 0;
  }
  return clusters;
}

inline int ask_device(int index, Device& device) {
  int shared = 0;
  cudaError_t error = cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index);
  if (!error) error = cudaDeviceGetAttribute(&device.minor, cudaDevAttrComputeCapabilityMinor, index);
  if (!error) error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (!error) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (error) return static_cast<int>(error);
  device.shared = shared;
  if (device.major < 9) return 0;
  error = cudaFuncSetAttribute(probe_kernel<0>, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error) return static_cast<int>(error);
  device.largest_cluster = 8;
  if (cudaFuncSetAttribute(probe_kernel<0>, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess)
    static_cast<void>(cudaGetLastError());
  for (int cluster = 2; cluster <= 16; ++cluster) {
    device.resident[0][cluster] = resident(cluster, shared);
    device.resident[1][cluster] = resident(cluster, half_of_shared(shared));
    if (cluster > 8 && device.resident[0][cluster] > 0) device.largest_cluster = 16;
  }
  device.asked = true;
  return 0;
}

// What the policy needs to know of the current device, asked once.
inline int current_device(Device& device) {
  static Device known[kDevices];
  static std::once_flag asked[kDevices];
  static int errors[kDevices];
  int index = 0;
  if (int error = current_device_index(index)) return error;
  if (index >= kDevices) return kInvalidValue;
  std::call_once(asked[index], [&] { errors[index] = ask_device(index, known[index]); });
  device = known[index];
  return errors[index];
}

#endif

}  // namespace fastreft
