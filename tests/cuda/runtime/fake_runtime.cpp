// A CUDA runtime that answers as it is told, linked in the real one's place by test_launch.py. Without a GPU it shows
// what launch.cu makes of a device, of the architecture its kernels were compiled for, and of failures.
#include "fake_runtime.h"

#include <cuda_runtime_api.h>

Fake fake;

namespace {

cudaError_t answer(int error = 0) {
  if (fake.failure != 0) error = fake.failure;
  fake.failure = 0;
  if (error != 0) fake.left_behind = error;
  return static_cast<cudaError_t>(error);
}

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const int error = fake.left_behind;
  fake.left_behind = 0;
  return static_cast<cudaError_t>(error);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  *value = which == cudaDevAttrComputeCapabilityMajor         ? fake.major
           : which == cudaDevAttrMultiProcessorCount          ? 132
           : which == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 232448
                                                              : 0;
  return answer();
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* code, const void*) {
  *code = {};
  code->ptxVersion = fake.ptx;
  code->binaryVersion = 10 * fake.major;  // a driver has compiled it for its device
  return answer();
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return answer(); }
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*, const cudaLaunchConfig_t* config) {
  const unsigned size = config->attrs[0].val.clusterDim.x;
  *clusters = size > 8 ? -1 : static_cast<int>(132 / size);
  return answer(size > 8 ? cudaErrorInvalidClusterSize : 0);  // as a device without clusters of 16 does
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t*, const void*, void**) {
  return answer(cudaErrorLaunchOutOfResources);
}

// What nvcc's own code around kernels asks for, of one version or another: to be there, and no more.
void** __cudaRegisterFatBinary(void*) { return nullptr; }
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction() {}
char __cudaInitModule() { return 0; }
int __cudaGetKernel() { return 0; }
int __cudaLaunchKernel() { return 0; }
unsigned __cudaPushCallConfiguration() { return 0; }
int __cudaPopCallConfiguration() { return 0; }
cudaError_t cudaLaunchKernel(const void*, dim3, dim3, void**, size_t, cudaStream_t) { return cudaSuccess; }

}  // extern "C"
