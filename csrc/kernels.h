// Host entry points of the CUDA kernels. Torch-free; every function queues its work on the given stream of the current
// device and returns a cudaError_t (0 = success). None allocates, synchronises or uses atomics, all can be captured
// in a CUDA graph, and the same arguments on the same device give the same bits.
#pragma once
#include "edit.h"

namespace fastreft {

// The forward. One launch, no scratch. The caller has removed duplicates from `index`; -1 and rows past the end are
// skipped (their `z` is zero, their `saved` row is left alone).
int edit_forward_cuda(const EditArgs& args);

// The backward. `scratch` holds edit_backward_scratch_bytes(args) bytes, aligned to 256; that number depends on the
// shapes, on which gradients are wanted, on alignment and on the current device: ask with the very arguments of the
// call. Returns -1 where the device cannot be asked.
int64_t edit_backward_scratch_bytes(const EditGradArgs& args);
int edit_backward_cuda(const EditGradArgs& args);

// What the retraction found in a matrix, in `status` below.
enum class Found : int {
  fine = 0,
  deficient = 1,   // retraction: rows zero or dependent, completed by Gram-Schmidt; step: taken, but shortened
  not_finite = 2,  // left as it was
};

// R <- L^-1 R with R R^T = L L^T, for `count` matrices, in one launch for every 128 of them.
// `scratch`: retract_scratch_bytes(...) bytes aligned to 256; it begins with int status[count] (a Found each), valid
// once the stream has come there.
int64_t retract_scratch_bytes(const Matrix* matrices, int count);
int retract_cuda(const Matrix* matrices, int count, void* scratch, void* stream);

// AdamW over all items, retraction of the orthonormal ones included; status as above (`not_finite`: the item's gradient
// or parameter is not finite and nothing of that item was changed; only orthonormal items are looked at).
int64_t adamw_step_scratch_bytes(const StepItem* items, int count);
int adamw_step_cuda(const StepItem* items, int count, const StepArgs& args, void* scratch, void* stream);

}  // namespace fastreft
