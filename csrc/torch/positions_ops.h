// What finds the rows of a batch of prompts, as a function of tensors; on a CPU alone, elsewhere fastreft/positions.py
// does it in torch. Compiled twice, as edit_ops.h is.
#pragma once
#include "../positions.h"
#include "tensors.h"

namespace fastreft {

inline Entries entries(const MaybeTensor& t, int64_t batch, int64_t length, const char* name) {
  if (!t) return {};
  STD_TORCH_CHECK(t->is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == batch && t->size(1) == length, name, " must be (", batch, ", ", length,
                  ")");
  switch (t->scalar_type()) {
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char:
    case ScalarType::Short:
    case ScalarType::Int:
    case ScalarType::Long: break;
    default: STD_TORCH_CHECK(false, name, " must hold integers or bools");
  }
  return {t->data_ptr(), static_cast<int64_t>(t->element_size()), t->stride(0), t->stride(1)};
}

inline Tensor prompt_rows(MaybeTensor mask, MaybeTensor labels, int64_t batch, int64_t length, int64_t first,
                          int64_t last, bool pyreft_compat) {
  STD_TORCH_CHECK(batch >= 0 && length >= 0 && first >= 0 && last >= 0,
                  "batch, length, first and last must not be < 0");
  PromptArgs args;
  args.mask = entries(mask, batch, length, "mask");
  args.labels = entries(labels, batch, length, "labels");
  args.batch = batch;
  args.length = length;
  args.first = first;
  args.last = last;
  args.pyreft_compat = pyreft_compat;
  const Tensor rows = empty_rows(batch, first + last);
  args.rows = static_cast<int64_t*>(rows.data_ptr());
  prompt_rows_cpu(args);
  return rows;
}

}  // namespace fastreft
