// torch's tensors through its stable ABI: the words that tensors.h and edit_ops.h are written in.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace fastreft {

inline void shim_check(AOTITorchError error, const char* call) {
  STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, call, " failed");
}
#define STABLE_CHECK(call) shim_check(call, #call)

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline int32_t device_index(const Tensor& t) { return t.get_device_index(); }
inline Tensor as_contiguous(const Tensor& t) { return torch::stable::contiguous(t); }
inline void copy_into(Tensor& to, const Tensor& from) { torch::stable::copy_(to, from); }

using RawDtype = int32_t;

inline RawDtype raw_dtype(const Tensor& t) {
  int32_t dtype = 0;
  STABLE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  return dtype;
}

// fp64 keeps fp64, everything else fp32.
inline RawDtype kept_type(const Tensor& h) {
  return h.scalar_type() == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
}

// Straight through torch's C shim: the dispatcher's way by name costs more than the edit of a few rows.
inline Tensor empty_as(const Tensor& like, const std::vector<int64_t>& sizes, RawDtype dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(sizes[i], 1);
  int32_t device = 0;
  STABLE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  AtenTensorHandle made = nullptr;
  STABLE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype, device,
                                        like.get_device_index(), &made));
  return Tensor(made);
}

// int64 (batch, n) on the CPU.
inline Tensor empty_rows(int64_t batch, int64_t n) {
  const int64_t sizes[] = {batch, n}, strides[] = {std::max<int64_t>(n, 1), 1};
  AtenTensorHandle made = nullptr;
  STABLE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_int64(), aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

}  // namespace fastreft
