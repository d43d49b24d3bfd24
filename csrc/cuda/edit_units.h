// The edit's kernels as the host starts them, each function in the unit named beside it. A kernel takes seconds to
// compile for each arch, and there are dozens: the units are cut so that they compile side by side.
#pragma once
#include "edit_args.h"
#include "grid.h"

namespace fastreft {

// Tensor cores, 16-bit rows.
int fused_forward(const Fused& f, DType type, const Grid& grid, void* stream);      // edit_fused_forward.cu
int fused_backward(const Fused& f, DType type, const Grid& grid, void* stream);     // edit_fused_backward.cu
int held_forward(const Fused& f, DType type, const Grid& grid, void* stream);       // edit_held_forward.cu
int held_backward(const Fused& f, DType type, const Grid& grid, void* stream);      // edit_held_backward.cu
int streamed_forward(const Fused& f, DType type, const Grid& grid, void* stream);   // edit_streamed_forward.cu
int streamed_backward(const Fused& f, DType type, const Grid& grid, void* stream);  // edit_streamed_backward.cu
int both_at_once(const Both& both, DType type, const Grid& grid, void* stream);     // edit_both.cu
int sums_on_tensor_cores(const Gradient& s, int depth, DType type, const Grid& grid, void* stream);  // edit_sums.cu

// CUDA cores, any type: edit_simple.cu. `vector`: 16 bytes at a time.
int simple_forward(const Pass& p, bool vector, DType type, const Grid& grid, void* stream);
int simple_backward(const Pass& p, bool vector, bool shrinks, DType type, const Grid& grid, void* stream);
int sums_on_cuda_cores(const Gradient& s, DType type, const Grid& grid, void* stream);
int finish_sums(const Finish& f, DType type, const Grid& grid, void* stream);

}  // namespace fastreft
