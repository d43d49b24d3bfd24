// The edit's ops in torch's dispatcher. With optim.cpp and positions.cpp the only files that see torch, through
// the stable ABI of torch 2.10, so that one build serves every later torch.
#include "edit_ops.h"
#include "kernel_entry.h"
#include "on_device.h"

namespace fastreft {
namespace {

void forward(EditArgs& args, bool on_cpu, int32_t device) {
  if (on_cpu) return edit_forward_cpu(args, &parallel_for);
#ifdef FASTREFT_WITH_CUDA
  const OnDevice here(device);
  args.stream = here.stream;
  OnDevice::check(edit_forward_cuda(args));
#endif
}

void backward(EditGradArgs& args, bool on_cpu, int32_t device) {
  if (on_cpu) return edit_backward_cpu(args, &parallel_for);
#ifdef FASTREFT_WITH_CUDA
  const OnDevice here(device);
  args.stream = here.stream;
  const Tensor scratch = here.scratch(edit_backward_scratch_bytes(args));
  args.scratch = scratch.data_ptr();
  OnDevice::check(edit_backward_cuda(args));
#endif
}

}  // namespace

void run(EditArgs& args, const Tensor& on) { forward(args, on.is_cpu(), device_index(on)); }
void run(EditGradArgs& args, const Tensor& on) { backward(args, on.is_cpu(), device_index(on)); }

const KernelEntry kernel_entry{&forward, &backward, [](const StepItem* items, int64_t count, const StepArgs& step) {
                                 return step_cpu(items, count, step, &parallel_for);
                               }};

}  // namespace fastreft

#define FASTREFT_WEIGHTS "Tensor U, Tensor? V, Tensor? P, Tensor? b, Tensor? c, int act, bool tied"

STABLE_TORCH_LIBRARY(fastreft, m) {
  m.def("edit(Tensor h, " FASTREFT_WEIGHTS ", bool save) -> (Tensor, Tensor)");
  m.def("edit_rows_(Tensor(a!) h, Tensor rows, " FASTREFT_WEIGHTS ", bool save) -> (Tensor, Tensor)");
  // The same without a guard against gradients, for the autograd functions that have just seen to them.
  m.def("unguarded_edit_rows_(Tensor(a!) h, Tensor rows, " FASTREFT_WEIGHTS ", bool save) -> (Tensor, Tensor)");
  m.def("unguarded_edit_rows_backward_(Tensor(a!) g, Tensor rows, Tensor saved, Tensor z, " FASTREFT_WEIGHTS
        ", bool need_dh) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("edit_rows(Tensor h, Tensor rows, " FASTREFT_WEIGHTS ", bool save) -> (Tensor, Tensor, Tensor)");
  m.def("edit_backward(Tensor g, Tensor h, Tensor z, " FASTREFT_WEIGHTS
        ", bool need_dh) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("edit_rows_backward_(Tensor(a!) g, Tensor rows, Tensor saved, Tensor z, " FASTREFT_WEIGHTS
        ", bool need_dh) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("edit_rows_backward(Tensor g, Tensor rows, Tensor saved, Tensor z, " FASTREFT_WEIGHTS
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

// One set of functions for every device: what differs is behind run().
static void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("edit", TORCH_BOX(&fastreft::edit));
  m.impl("edit_rows_", TORCH_BOX(&fastreft::edit_rows_));
  m.impl("unguarded_edit_rows_", TORCH_BOX(&fastreft::edit_rows_));
  m.impl("unguarded_edit_rows_backward_", TORCH_BOX(&fastreft::edit_rows_backward_));
  m.impl("edit_rows", TORCH_BOX(&fastreft::edit_rows));
  m.impl("edit_backward", TORCH_BOX(&fastreft::edit_backward));
  m.impl("edit_rows_backward_", TORCH_BOX(&fastreft::edit_rows_backward_));
  m.impl("edit_rows_backward", TORCH_BOX(&fastreft::edit_rows_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fastreft, CPU, m) { implement(m); }
#ifdef FASTREFT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastreft, CUDA, m) { implement(m); }
#endif
