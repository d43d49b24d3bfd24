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
  if (const int error = returned(cudaGetDevice(&index))) return error;
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
  const int error = returned(cudaOccupancyMaxActiveClusters(&clusters, probe_kernel, &as.config));
  return error ? 0 : clusters;  // a question without an answer is no error of the caller's
}

int ask_device(int index, Device& device) {
  int major = 0, shared = 0;
  cudaFuncAttributes code;  // of any kernel: all are compiled for the same architectures
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (!error) error = cudaDeviceGetAttribute(&device.minor, cudaDevAttrComputeCapabilityMinor, index);
  if (!error) error = cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  if (!error) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (!error) error = cudaFuncGetAttributes(&code, probe_kernel);
  if (error) return returned(error);
  device.shared = shared;
  device.major = usable_major(major, code.ptxVersion);
  if (device.major < 9) return 0;
  if (int failed = returned(cudaFuncSetAttribute(probe_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)))
    return failed;
  device.largest_cluster = 8;
  static_cast<void>(returned(cudaFuncSetAttribute(probe_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)));
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
  // A device that failed to answer is asked again: the failure may have been another's, or passing.
  static Device known[kDevices];
  static std::atomic<bool> answered[kDevices];
  static std::mutex asking;
  int index = 0;
  if (int error = current_device_index(index)) return error;
  if (!answered[index].load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> lock(asking);
    if (!answered[index].load(std::memory_order_relaxed)) {
      Device asked;
      if (int error = ask_device(index, asked)) return error;
      known[index] = asked;
      answered[index].store(true, std::memory_order_release);
    }
  }
  device = known[index];
  return 0;
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
  const int error =
      returned(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  if (!error) seen.store(bytes, std::memory_order_release);
  return error;
}

}  // namespace fastreft

#endif
