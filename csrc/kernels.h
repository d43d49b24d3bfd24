// The kernels' entry points, on a CPU and on a GPU. Torch-free: the caller brings the thread pool, or the stream.
#pragma once
#include "edit.h"

namespace fastreft {

// ---- CPU: csrc/cpu/ -------------------------------------------------------------------------------------------------

// Runs f(begin, end, context) over [begin, end) in pieces of at least `grain`; torch's at::parallel_for.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, void (*f)(int64_t, int64_t, void*),
                             void* context);

// Throws std::out_of_range for an index past the last row. Negative indices are skipped, repeated ones applied once.
void edit_forward_cpu(const EditArgs& args, ParallelFor parallel_for);
void edit_backward_cpu(const EditGradArgs& args, ParallelFor parallel_for);
// Rows of many adapters. The same bits for a row as edit_forward_cpu gives with its adapter alone. Throws
// std::out_of_range, too, for an adapter that the pool does not have or whose vectors lie outside of it.
void edit_pooled_cpu(const PooledArgs& args, ParallelFor parallel_for);

// Index of the first matrix with a value that is not finite, with nothing changed; -1 if all went well.
int64_t retract_cpu(const Matrix* matrices, int64_t count, ParallelFor parallel_for);
// The same for an optimizer step: an item whose result would not be finite keeps its parameter and is reported.
int64_t step_cpu(const StepItem* items, int64_t count, const StepArgs& step, ParallelFor parallel_for);

const char* cpu_isa();  // the instruction set in use

// ---- CUDA: csrc/cuda/ -----------------------------------------------------------------------------------------------
//
// Every function queues its work on the given stream of the current device and returns a cudaError_t (0 = success).
// None allocates, synchronises or uses atomics, all can be captured in a CUDA graph, and the same arguments on the same
// device give the same bits.

// The forward. One launch, no scratch. The caller has removed duplicates from `index`; -1 and rows past the end are
// skipped (their `z` is zero, their `saved` row is left alone).
int edit_forward_cuda(const EditArgs& args);

// Rows of many adapters, in one launch: a row whose adapter the pool does not have is skipped. The table and the
// vectors are read when the launch runs: both may change between the replays of a graph.
int edit_pooled_cuda(const PooledArgs& args);

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
