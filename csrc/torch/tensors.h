// What torch gives, as edit.h wants it: dtypes, row addresses, contiguous weights, allocation. Seen by the ops alone.
#pragma once
#ifndef FASTREFT_TENSOR  // csrc/quick/ is of one torch and brings that one's
#include "stable_tensor.h"
#endif

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>

#include "../edit.h"

namespace fastreft {

inline DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

// The tensor itself where it is contiguous, as weights nearly always are.
inline void make_contiguous(MaybeTensor& t) {
  if (t && !t->is_contiguous()) t = as_contiguous(*t);
}

inline Weight weight(const MaybeTensor& t, const char* name) {
  return t ? Weight{t->data_ptr(), dtype_of(*t, name)} : Weight{};
}

// The rows of t (..., d), if unit stride inside a row and two strides between rows can address them.
inline std::optional<Rows> addressable(const Tensor& t) {
  const int64_t leading = t.dim() - 1;
  if (t.size(leading) > 1 && t.stride(leading) != 1) return std::nullopt;
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0}, used = 0;  // innermost first, neighbours merged
  for (int64_t i = leading - 1; i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (used && t.stride(i) == strides[used - 1] * sizes[used - 1]) {
      sizes[used - 1] *= t.size(i);
      continue;
    }
    if (used == 2) return std::nullopt;
    sizes[used] = t.size(i);
    strides[used++] = t.stride(i);
  }
  Rows rows;
  rows.p = t.data_ptr();
  if (used < 2) {
    rows.outer_stride = strides[0];
  } else {
    rows.inner = sizes[0];
    rows.inner_stride = strides[0];
    rows.outer_stride = strides[1];
  }
  return rows;
}

inline int64_t rows_in(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

// t, or a copy of it whose rows can be addressed.
inline Tensor readable(const Tensor& t) { return addressable(t) ? t : as_contiguous(t); }

// From about this size on a result is often fresh memory: mapped anew, or on a heap that shrank when the last one was
// freed. In huge pages its first touch costs a fraction.
constexpr uintptr_t kFreshMemory = uintptr_t{8} << 20;

inline Tensor result_like(const Tensor& t) {
  const auto sizes = t.sizes();
  Tensor out = empty_as(t, {sizes.begin(), sizes.end()}, raw_dtype(t));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out.data_ptr()), end = begin + out.numel() * out.element_size();
  const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  if (t.is_cpu() && end - begin >= kFreshMemory) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return out;
}

}  // namespace fastreft
