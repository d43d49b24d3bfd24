// The optimizer's step of parameters on a CPU.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/variable.h>

#include "quick.h"
//
#include "../torch/step_ops.h"

namespace fastreft {

Tensor run(const std::vector<StepItem>& items, const StepArgs& step, const Tensor&) {
  check_step(kernels->step_cpu(items.data(), items.size(), step));
  return {};
}

PyObject* quick_step_(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 12, "step_ takes 12 arguments, not ", count);
  std::array<std::vector<Tensor>, 4> lists;  // params, grads, m, v
  for (size_t i = 0; i < lists.size(); ++i) {
    if (!PyList_CheckExact(args[i])) Py_RETURN_NOTIMPLEMENTED;
    lists[i].resize(PyList_GET_SIZE(args[i]));
    if (!plain_tensors(reinterpret_cast<PyListObject*>(args[i])->ob_item, lists[i])) Py_RETURN_NOTIMPLEMENTED;
    for (const Tensor& t : lists[i])
      if (!t.defined() || !t.is_cpu()) Py_RETURN_NOTIMPLEMENTED;
  }
  const int64_t rotations = PyLong_AsLongLong(args[4]);
  std::array<double, 6> n;  // lr, beta1, beta2, eps, weight_decay, r_lr_scale
  for (size_t i = 0; i < n.size(); ++i) n[i] = PyFloat_AsDouble(args[5 + i]);
  const int64_t age = PyLong_AsLongLong(args[11]);
  if (PyErr_Occurred()) return nullptr;
  {
    const pybind11::gil_scoped_release others_may_run;
    step_(lists[0], lists[1], lists[2], lists[3], {}, {}, rotations, n[0], n[1], n[2], n[3], n[4], n[5], age);
  }
  for (const Tensor& p : lists[0]) torch::autograd::impl::bump_version(p);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

}  // namespace fastreft
