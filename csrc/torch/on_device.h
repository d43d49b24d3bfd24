// From an op to the kernels of its tensors' device: torch's thread pool on a CPU; guard, stream, errors and scratch on
// a GPU.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include "../kernels.h"
#include "tensors.h"

namespace fastreft {

inline void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*f)(int64_t, int64_t, void*), void* context) {
  if (begin < end)
    torch::stable::parallel_for(begin, end, grain, [=](int64_t from, int64_t to) { f(from, to, context); });
}

#ifdef FASTREFT_WITH_CUDA
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;

  int32_t index;

  explicit OnDevice(int32_t index) : guard(index), index(index) {
    STABLE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  }
  static void check(int error) { STD_TORCH_CHECK(error == 0, "a CUDA kernel failed with cudaError ", error); }
  Tensor scratch(int64_t bytes) const {
    STD_TORCH_CHECK(bytes >= 0, "the CUDA device cannot be asked for its properties");
    const int64_t size = std::max<int64_t>(bytes, 16), stride = 1;
    AtenTensorHandle made = nullptr;
    STABLE_CHECK(aoti_torch_empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(), aoti_torch_device_type_cuda(),
                                          index, &made));
    return Tensor(made);
  }
};
#endif

}  // namespace fastreft
