// The ops of the optimizer: retraction, and AdamW with retraction, of lists of parameters.
#include "on_device.h"
#include "step_ops.h"

namespace fastreft {
namespace {

// For a list of matrices, the kernels' scratch is returned: on a GPU it begins with an int32 a matrix that says what
// became of it (Found in kernels.h), which cannot be told here without a sync. A CPU's is empty, and a failure is
// raised.
Tensor no_status(const Tensor& on) { return empty_as(on, {0}, aoti_torch_dtype_uint8()); }

Tensor run(const std::vector<Matrix>& all, const Tensor& on) {
  if (on.is_cpu()) {
    const int64_t bad = retract_cpu(all.data(), all.size(), &parallel_for);
    STD_TORCH_CHECK(bad < 0, "matrices[", bad, "] holds a value that is not finite");
    return no_status(on);
  }
#ifdef FASTREFT_WITH_CUDA
  const OnDevice device(on.get_device_index());
  Tensor scratch = device.scratch(retract_scratch_bytes(all.data(), all.size()));
  OnDevice::check(retract_cuda(all.data(), all.size(), scratch.data_ptr(), device.stream));
  return scratch;
#else
  return no_status(on);
#endif
}

// Each matrix gets orthonormal rows. On a CPU it fails, with nothing changed, on a value that is not finite; on a GPU
// such a matrix is left alone.
Tensor retract_(std::vector<Tensor> matrices) {
  STD_TORCH_CHECK(!matrices.empty(), "matrices must not be empty");
  check_one_device(matrices, matrices[0], "matrices");
  std::vector<Matrix> all;
  for (const Tensor& t : matrices) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) <= t.size(1), "matrices must be (r, d) with r <= d");
    all.push_back(matrix(t, "matrices"));
  }
  return run(all, matrices[0]);
}

}  // namespace

Tensor run(const std::vector<StepItem>& items, const StepArgs& step, const Tensor& on) {
  if (on.is_cpu()) {
    check_step(step_cpu(items.data(), items.size(), step, &parallel_for));
    return no_status(on);
  }
#ifdef FASTREFT_WITH_CUDA
  const OnDevice device(on.get_device_index());
  Tensor scratch = device.scratch(adamw_step_scratch_bytes(items.data(), items.size()));
  OnDevice::check(adamw_step_cuda(items.data(), items.size(), step, scratch.data_ptr(), device.stream));
  return scratch;
#else
  return no_status(on);
#endif
}

}  // namespace fastreft

STABLE_TORCH_LIBRARY_FRAGMENT(fastreft, m) {
  m.def("retract_(Tensor(a!)[] matrices) -> Tensor");
  m.def(
      "step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] m, Tensor(c!)[] v, Tensor[] ages, Tensor? live_lr, "
      "int rotations, float lr, float beta1, float beta2, float eps, float weight_decay, float r_lr_scale, int age) -> "
      "Tensor");
}

static void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("retract_", TORCH_BOX(&fastreft::retract_));
  m.impl("step_", TORCH_BOX(&fastreft::step_));
}

STABLE_TORCH_LIBRARY_IMPL(fastreft, CPU, m) { implement(m); }
#ifdef FASTREFT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastreft, CUDA, m) { implement(m); }
#endif
