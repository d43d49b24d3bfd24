// torch's tensors as its own C++ has them: stable_tensor.h's words again, for the code of one torch.
#pragma once
#define FASTREFT_TENSOR
#include <ATen/EmptyTensor.h>
#include <ATen/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

namespace fastreft {

using at::ScalarType;
using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline int32_t device_index(const Tensor& t) { return t.get_device(); }
inline Tensor as_contiguous(const Tensor& t) { return t.contiguous(); }
inline void copy_into(const Tensor& to, const Tensor& from) { to.copy_(from); }

using RawDtype = ScalarType;

inline RawDtype raw_dtype(const Tensor& t) { return t.scalar_type(); }

// fp64 keeps fp64, everything else fp32.
inline RawDtype kept_type(const Tensor& h) { return h.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

inline Tensor empty_as(const Tensor& like, const std::vector<int64_t>& sizes, RawDtype dtype) {
  return like.is_cpu() ? Tensor(at::detail::empty_cpu(sizes, dtype))
                       : at::empty(sizes, at::TensorOptions(like.device()).dtype(dtype));
}

// int64 (batch, n) on the CPU.
inline Tensor empty_rows(int64_t batch, int64_t n) { return at::detail::empty_cpu({batch, n}, at::kLong); }

}  // namespace fastreft
