// What a launch asks of the current device: its numbers, and more shared memory than every kernel has.
#include "launch.h"

#ifdef FASTREFT_SIMT

namespace fastreft {

int current_device(Device& device) {
  device.major = simt::device.major;
  device.minor = simt::device.minor;
  device.multiprocessors = simt::device.multiprocessors;
  device.shared = simt::device.shared;
  device.largest_cluster = simt::device.largest_cluster;
  return 0;
}

}  // namespace fastreft

#else

#include <mutex>

namespace fastreft {
namespace {

int current_device_index(int& index) {
  if (const cudaError_t error = cudaGetDevice(&index)) return static_cast<int>(error);
  return index < kDevices ? 0 : kInvalidValue;
}

__global__ void probe_kernel() {}

// How many clusters of `cluster` CTAs, each with `shared` bytes, the current device runs at once: 0 where it runs none.
// More than 8 CTAs are not promised for every device of an architecture, nor for a part of one.
int resident(int cluster, int64_t shared) {
  Grid grid;
  grid.x = grid.cluster = cluster;
  grid.shared = shared;
  const Config as(grid);
  int clusters = 0;
  if (cudaOccupancyMaxActiveClusters(&clusters, probe_kernel, &as.config) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());  // a question without an answer is no error of the caller's
    return 0;
  }
  return clusters;
}

int ask_device(int index, Device& device) {
  int shared = 0;
  cudaError_t error = cudaDeviceGetAttribute(&device.major, cudaDevAttrComputeCapabilityMajor, index);
  if (!error) error = cudaDeviceGetAttribute(&device.minor, cudaDevAttrComputeCapabilityMinor, index);
  if (!error) error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (!error) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (error) return static_cast<int>(error);
  device.shared = shared;
  if (device.major < 9) return 0;
  error = cudaFuncSetAttribute(probe_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error) return static_cast<int>(error);
  device.largest_cluster = 8;
  if (cudaFuncSetAttribute(probe_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess)
    static_cast<void>(cudaGetLastError());
  for (int cluster = 2; cluster <= 16; ++cluster) {
    device.resident[0][cluster] = resident(cluster, shared);
    device.resident[1][cluster] = resident(cluster, half_of_shared(shared));
    if (cluster > 8 && device.resident[0][cluster] > 0) device.largest_cluster = 16;
  }
  device.asked = true;
  return 0;
}

}  // namespace

int current_device(Device& device) {
  static Device known[kDevices];
  static std::once_flag asked[kDevices];
  static int errors[kDevices];
  int index = 0;
  if (int error = current_device_index(index)) return error;
  std::call_once(asked[index], [&] { errors[index] = ask_device(index, known[index]); });
  device = known[index];
  return errors[index];
}

int allow_shared(const void* kernel, Allowed& allowed, int64_t bytes) {
  // Under a lock: of two threads that ask at once, the one with less must not come last.
  static std::mutex asking;
  int index = 0;
  if (int error = current_device_index(index)) return error;
  std::atomic<int64_t>& seen = allowed[index];
  if (seen.load(std::memory_order_acquire) >= bytes) return 0;
  const std::lock_guard<std::mutex> lock(asking);
  if (seen.load(std::memory_order_relaxed) >= bytes) return 0;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
  if (error == cudaSuccess) seen.store(bytes, std::memory_order_release);
  return static_cast<int>(error);
}

}  // namespace fastreft

#endif
