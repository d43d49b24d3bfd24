// The op that finds the rows of a batch of prompts; on a CPU alone, elsewhere fastreft/positions.py does it in torch.
#include <torch/csrc/stable/library.h>

#include "positions.h"
#include "tensors.h"

namespace fastreft {
namespace {

Entries entries(const MaybeTensor& t, int64_t batch, int64_t length, const char* name) {
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

Tensor prompt_rows(MaybeTensor mask, MaybeTensor labels, int64_t batch, int64_t length, int64_t first, int64_t last,
                   bool pyreft_compat) {
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
  const int64_t sizes[] = {batch, first + last}, strides[] = {std::max<int64_t>(first + last, 1), 1};
  AtenTensorHandle made = nullptr;
  STABLE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_int64(), aoti_torch_device_type_cpu(), 0, &made));
  const Tensor rows(made);
  args.rows = static_cast<int64_t*>(rows.data_ptr());
  prompt_rows_cpu(args);
  return rows;
}

}  // namespace
}  // namespace fastreft

STABLE_TORCH_LIBRARY_FRAGMENT(fastreft, m) {
  m.def(
      "prompt_rows(Tensor? mask, Tensor? labels, int batch, int length, int first, int last, bool pyreft_compat) -> "
      "Tensor");
}

// With neither mask nor labels there is no tensor to choose a device by.
STABLE_TORCH_LIBRARY_IMPL(fastreft, CompositeExplicitAutograd, m) {
  m.impl("prompt_rows", TORCH_BOX(&fastreft::prompt_rows));
}
