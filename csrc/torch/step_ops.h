// The optimizer's step as a function of tensors, and what it shares with the retraction. Compiled twice, as edit_ops.h
// is.
#pragma once
#include <vector>

#include "tensors.h"

namespace fastreft {

// To the kernel of the parameters' device; returns what became of each parameter, see optim.cpp.
Tensor run(const std::vector<StepItem>& items, const StepArgs& step, const Tensor& on);

// `bad` is what step_cpu returned.
inline void check_step(int64_t bad) {
  STD_TORCH_CHECK(bad < 0, "params[", bad, "] has a gradient, or would get a value, that is not finite");
}

inline Matrix matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  const int64_t rows = t.dim() == 2 ? t.size(0) : 1;
  return {t.data_ptr(), rows, rows ? t.numel() / rows : 0, dtype_of(t, name)};
}

inline void check_one_device(const std::vector<Tensor>& tensors, const Tensor& first, const char* name) {
  for (const Tensor& t : tensors)
    STD_TORCH_CHECK(t.is_cpu() == first.is_cpu() && device_index(t) == device_index(first), name,
                    " must be on one device");
}

// The learning rate as a number in the parameters' memory.
inline Weight live_lr_of(const MaybeTensor& lr, const Tensor& on) {
  if (!lr) return {};
  const Weight w{lr->data_ptr(), dtype_of(*lr, "lr")};
  STD_TORCH_CHECK(lr->numel() == 1 && (w.type == DType::f32 || w.type == DType::f64),
                  "lr must be one float32 or float64");
  check_one_device({*lr}, on, "lr and params");
  return w;
}

// One AdamW step of every parameter; the first `rotations` of them are Rs: projected gradient, no decay, retraction,
// and `r_lr_scale` times the rate. `ages` is empty, all being of age `age`, or one fp32 a parameter; `live_lr` is what
// `lr` is multiplied by.
inline Tensor step_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> m, std::vector<Tensor> v,
                    std::vector<Tensor> ages, MaybeTensor live_lr, int64_t rotations, double lr, double beta1,
                    double beta2, double eps, double weight_decay, double r_lr_scale, int64_t age) {
  STD_TORCH_CHECK(
      !params.empty() && params.size() == grads.size() && params.size() == m.size() && params.size() == v.size(),
      "params, grads, m and v must be lists of one length, 1 or more");
  STD_TORCH_CHECK(ages.empty() || ages.size() == params.size(), "ages must be empty or as long as params");
  STD_TORCH_CHECK(0 <= rotations && rotations <= static_cast<int64_t>(params.size()),
                  "rotations must be how many of params are orthonormal, not ", rotations);
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
    item.orthonormal = static_cast<int64_t>(i) < rotations;
    STD_TORCH_CHECK(!item.orthonormal || (params[i].dim() == 2 && item.param.r <= item.param.d),
                    "an orthonormal parameter must be (r, d) with r <= d");
    item.g = grads[i].data_ptr();
    item.m = m[i].data_ptr();
    item.v = v[i].data_ptr();
    if (!ages.empty()) {
      STD_TORCH_CHECK(ages[i].numel() == 1 && ages[i].scalar_type() == ScalarType::Float, "ages[", i,
                      "] must be one float32");
      item.age = static_cast<const float*>(ages[i].data_ptr());
    }
    items.push_back(item);
  }
  StepArgs step{lr, beta1, beta2, eps, weight_decay, bias_correction(beta1, age), bias_correction(beta2, age)};
  step.live_lr = live_lr_of(live_lr, params[0]);
  step.r_lr_scale = r_lr_scale;
  return run(items, step, params[0]);
}

}  // namespace fastreft
