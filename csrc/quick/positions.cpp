// The rows of a batch of prompts, and its samples without a token, on a CPU.
#include <torch/csrc/Exceptions.h>

#include "quick.h"
//
#include "../torch/positions_ops.h"

namespace fastreft {
namespace {

bool readable_here(const Tensor& t) {
  return !t.defined() || (t.is_cpu() && c10::isIntegralType(t.scalar_type(), /*includeBool=*/true));
}

}  // namespace

PyObject* quick_prompt_rows(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 7, "prompt_rows takes 7 arguments, not ", count);
  std::array<Tensor, 2> t;
  if (!plain_tensors(args, t) || !readable_here(t[0]) || !readable_here(t[1])) Py_RETURN_NOTIMPLEMENTED;
  std::array<int64_t, 4> n;
  for (size_t i = 0; i < n.size(); ++i) n[i] = PyLong_AsLongLong(args[2 + i]);
  if (PyErr_Occurred()) return nullptr;
  return THPVariable_Wrap(prompt_rows(maybe(t[0]), maybe(t[1]), n[0], n[1], n[2], n[3], args[6] == Py_True));
  END_HANDLE_TH_ERRORS
}

PyObject* quick_hidden_sample(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 1, "hidden_sample takes 1 argument, not ", count);
  std::array<Tensor, 1> mask;
  if (!plain_tensors(args, mask) || !mask[0].defined() || !readable_here(mask[0])) Py_RETURN_NOTIMPLEMENTED;
  const int64_t batch = mask[0].size(0), length = mask[0].size(1);
  return PyLong_FromLongLong(hidden_sample(entries(mask[0], batch, length, "mask"), batch, length));
  END_HANDLE_TH_ERRORS
}

}  // namespace fastreft
