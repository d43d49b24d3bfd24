// The op that finds the rows of a batch of prompts.
#include <torch/csrc/stable/library.h>

#include "positions_ops.h"

STABLE_TORCH_LIBRARY_FRAGMENT(fastreft, m) {
  m.def(
      "prompt_rows(Tensor? mask, Tensor? labels, int batch, int length, int first, int last, bool pyreft_compat) -> "
      "Tensor");
}

// With neither mask nor labels there is no tensor to choose a device by.
STABLE_TORCH_LIBRARY_IMPL(fastreft, CompositeExplicitAutograd, m) {
  m.impl("prompt_rows", TORCH_BOX(&fastreft::prompt_rows));
}
