// The CPU core's entry points. Torch-free: the caller hands in its thread pool.
#pragma once
#include <string>

#include "edit.h"

namespace fastreft {

// Runs f(begin, end, context) over [begin, end) in pieces of at least `grain`; torch's at::parallel_for.
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, void (*f)(int64_t, int64_t, void*),
                             void* context);

// Throws std::out_of_range for an index past the last row. Negative indices are skipped, repeated ones applied once.
void edit_forward_cpu(const EditArgs& args, ParallelFor parallel_for);
void edit_backward_cpu(const EditGradArgs& args, ParallelFor parallel_for);

// Index of the first matrix with a value that is not finite, with nothing changed; -1 if all went well.
int64_t retract_cpu(const Matrix* matrices, int64_t count, ParallelFor parallel_for);
// The same for an optimizer step: an item whose result would not be finite keeps its parameter and is reported.
int64_t step_cpu(const StepItem* items, int64_t count, const StepArgs& step, ParallelFor parallel_for);

const char* cpu_isa();  // the instruction set in use

}  // namespace fastreft
