// The ops of the optimizer: retraction, and AdamW with retraction, of lists of parameters.
#include "on_device.h"

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
  const OnDevice device(on);
  Tensor scratch = OnDevice::scratch(on, retract_scratch_bytes(all.data(), all.size()));
  OnDevice::check(retract_cuda(all.data(), all.size(), scratch.data_ptr(), device.stream));
  return scratch;
#else
  return no_status(on);
#endif
}

Tensor run(const std::vector<StepItem>& items, const StepArgs& step, const Tensor& on) {
  if (on.is_cpu()) {
    const int64_t bad = step_cpu(items.data(), items.size(), step, &parallel_for);
    STD_TORCH_CHECK(bad < 0, "params[", bad, "] has a gradient, or would get a value, that is not finite");
    return no_status(on);
  }
#ifdef FASTREFT_WITH_CUDA
  const OnDevice device(on);
  Tensor scratch = OnDevice::scratch(on, adamw_step_scratch_bytes(items.data(), items.size()));
  OnDevice::check(adamw_step_cuda(items.data(), items.size(), step, scratch.data_ptr(), device.stream));
  return scratch;
#else
  return no_status(on);
#endif
}

Matrix matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  const int64_t rows = t.dim() == 2 ? t.size(0) : 1;
  return {t.data_ptr(), rows, rows ? t.numel() / rows : 0, dtype_of(t, name)};
}

void check_one_device(const std::vector<Tensor>& tensors, const Tensor& first, const char* name) {
  for (const Tensor& t : tensors)
    STD_TORCH_CHECK(t.is_cpu() == first.is_cpu() && t.get_device_index() == first.get_device_index(), name,
                    " must be on one device");
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

// The learning rate as a number in the parameters' memory.
Weight live_lr_of(const MaybeTensor& lr, const Tensor& on) {
  if (!lr) return {};
  const Weight w{lr->data_ptr(), dtype_of(*lr, "lr")};
  STD_TORCH_CHECK(lr->numel() == 1 && (w.type == DType::f32 || w.type == DType::f64),
                  "lr must be one float32 or float64");
  check_one_device({*lr}, on, "lr and params");
  return w;
}

// One AdamW step of every parameter; with `orthonormal` each is an R: projected gradient, no decay, retraction. `ages`
// is empty, all being of age `age`, or one fp32 a parameter; `live_lr` is what `lr` is multiplied by.
Tensor step_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> m, std::vector<Tensor> v,
             std::vector<Tensor> ages, MaybeTensor live_lr, bool orthonormal, double lr, double beta1, double beta2,
             double eps, double weight_decay, int64_t age) {
  STD_TORCH_CHECK(
      !params.empty() && params.size() == grads.size() && params.size() == m.size() && params.size() == v.size(),
      "params, grads, m and v must be lists of one length, 1 or more");
  STD_TORCH_CHECK(ages.empty() || ages.size() == params.size(), "ages must be empty or as long as params");
  for (const auto* list : {&params, &grads, &m, &v, &ages})
    check_one_device(*list, params[0], "params, grads, m, v and ages");
  std::vector<StepItem> items;
  for (size_t i = 0; i < params.size(); ++i) {
    STD_TORCH_CHECK(raw_dtype(grads[i]) == raw_dtype(params[i]) && grads[i].numel() == params[i].numel() &&
                        grads[i].is_contiguous(),
                    "grads[", i, "] must be contiguous, of its parameter's shape and dtype");
    for (const Tensor* state : {&m[i], &v[i]})
      STD_TORCH_CHECK(
          raw_dtype(*state) == kept_type(params[i]) && state->numel() == params[i].numel() && state->is_contiguous(),
          "m and v must be contiguous, of the parameter's shape, fp32 (fp64 for fp64)");
    StepItem item;
    item.param = matrix(params[i], "params");
    STD_TORCH_CHECK(!orthonormal || (params[i].dim() == 2 && item.param.r <= item.param.d),
                    "an orthonormal parameter must be (r, d) with r <= d");
    item.g = grads[i].data_ptr();
    item.m = m[i].data_ptr();
    item.v = v[i].data_ptr();
    if (!ages.empty()) {
      STD_TORCH_CHECK(ages[i].numel() == 1 && ages[i].scalar_type() == ScalarType::Float, "ages[", i,
                      "] must be one float32");
      item.age = static_cast<const float*>(ages[i].data_ptr());
    }
    item.orthonormal = orthonormal;
    items.push_back(item);
  }
  StepArgs step{lr, beta1, beta2, eps, weight_decay, bias_correction(beta1, age), bias_correction(beta2, age)};
  step.live_lr = live_lr_of(live_lr, params[0]);
  return run(items, step, params[0]);
}

}  // namespace
}  // namespace fastreft

STABLE_TORCH_LIBRARY_FRAGMENT(fastreft, m) {
  m.def("retract_(Tensor(a!)[] matrices) -> Tensor");
  m.def(
      "step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] m, Tensor(c!)[] v, Tensor[] ages, Tensor? live_lr, "
      "bool orthonormal, float lr, float beta1, float beta2, float eps, float weight_decay, int age) -> Tensor");
}

static void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("retract_", TORCH_BOX(&fastreft::retract_));
  m.impl("step_", TORCH_BOX(&fastreft::step_));
}

STABLE_TORCH_LIBRARY_IMPL(fastreft, CPU, m) { implement(m); }
#ifdef FASTREFT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastreft, CUDA, m) { implement(m); }
#endif
