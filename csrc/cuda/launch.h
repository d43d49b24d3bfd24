// The one way a kernel is started: launch<kernel>(grid, stream, arguments...). No <<<>>> anywhere, so that the host
// simulation (tests/cuda/simt) can run the very same sources, and cluster launches take the same road as plain ones.
#pragma once
#include <atomic>
#include <type_traits>

#include "device.cuh"
#include "grid.h"

namespace fastreft {

#ifdef FASTREFT_SIMT

template <auto Kernel, typename... Args>
int launch(const Grid& grid, void*, const Args&... args) {
  simt::run({grid.x, grid.y, grid.z}, grid.threads, grid.cluster, grid.shared, [&] { Kernel(args...); });
  return 0;
}

#else

constexpr int kDevices = 64;

// An error that is returned is not left for whoever asks the runtime next, who would take it for its own.
inline int returned(cudaError_t error) {
  if (error != cudaSuccess) static_cast<void>(cudaGetLastError());
  return static_cast<int>(error);
}

// Bytes of shared memory that a kernel may ask for so far, on each device.
using Allowed = std::atomic<int64_t>[kDevices];
// Has a kernel's CTAs allowed that many on the current device.
int allow_shared(const void* kernel, Allowed& allowed, int64_t bytes);

// A launch's shape as CUDA takes it; points to itself.
struct Config {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2] = {};

  explicit Config(const Grid& grid) {
    config.gridDim = dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z));
    config.blockDim = dim3(static_cast<unsigned>(grid.threads));
    config.dynamicSmemBytes = static_cast<size_t>(grid.shared);
    config.attrs = attributes;
    if (grid.cluster > 1) {
      cudaLaunchAttribute& cluster = attributes[config.numAttrs++];
      cluster.id = cudaLaunchAttributeClusterDimension;
      cluster.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
      cluster.val.clusterDim.y = 1;
      cluster.val.clusterDim.z = 1;
    }
    if (grid.early) {
      cudaLaunchAttribute& early = attributes[config.numAttrs++];
      early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      early.val.programmaticStreamSerializationAllowed = 1;
    }
  }
  Config(const Config&) = delete;
  Config& operator=(const Config&) = delete;
};

template <auto Kernel, typename... Args>
int launch(const Grid& grid, void* stream, const Args&... args) {
  static Allowed allowed;
  if (grid.shared > 48 * 1024) {  // more than that has to be asked for, once a kernel and device
    if (int error = allow_shared(reinterpret_cast<const void*>(Kernel), allowed, grid.shared)) return error;
  }
  if (grid.cluster > 8) {
    if (int error = returned(cudaFuncSetAttribute(Kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)))
      return error;
  }
  Config as(grid);
  as.config.stream = static_cast<cudaStream_t>(stream);
  return returned(cudaLaunchKernelEx(&as.config, Kernel, args...));
}

#endif

// f(T{}, integral_constant<int, Rank>{}) of the 16-bit type and of the rank among `Ranks` that are meant. The two
// types' kernels differ in their conversions alone: FASTREFT_BF16_ALONE leaves the other's out, for who only looks at
// code.
template <int... Ranks, typename F>
int by_type_and_rank(DType type, int rank, const F& f) {
  int error = kInvalidValue;
  const auto of = [&](auto chosen) {
    if (chosen.value != rank) return;
    if (type == DType::bf16) error = f(bf16{}, chosen);
#ifndef FASTREFT_BF16_ALONE
    if (type == DType::f16) error = f(f16{}, chosen);
#endif
  };
  (of(std::integral_constant<int, Ranks>{}), ...);
  return error;
}

// f(T{}) of the type that is meant.
template <typename F>
int by_type(DType type, const F& f) {
  switch (type) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::bf16: return f(bf16{});
    case DType::f16: return f(f16{});
  }
  return kInvalidValue;
}

}  // namespace fastreft
