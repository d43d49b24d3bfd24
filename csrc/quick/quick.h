// fastreft._quick: what a forward calls, in C++ and past torch's dispatcher, whose way takes longer than the work
// itself.
//
// It is written against torch's own C++, as the stable ABI has no autograd. So it is an extension apart, and optional:
// it serves only the torch that it was built with. Where it is not there, or returns NotImplemented, with nothing done,
// Python does the work.
#pragma once
#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/autograd/python_variable.h>

#include <array>

#include "tensor.h"
//
#include "../torch/kernel_entry.h"

namespace fastreft {

// Is this a tensor of a CPU or a GPU that nothing looks at on its way to a kernel, as a mode, a transform or a tracer
// does?
inline bool plain(const Tensor& t) {
  using c10::DispatchKey;
  using c10::DispatchKeySet;
  static const uint64_t known =
      (DispatchKeySet({DispatchKey::CPU, DispatchKey::CUDA, DispatchKey::AutogradCPU, DispatchKey::AutogradCUDA,
                       DispatchKey::ADInplaceOrView, DispatchKey::BackendSelect}) |
       c10::autocast_dispatch_keyset)
          .raw_repr();
  const auto here = c10::impl::tls_local_dispatch_key_set();
  return (((t.key_set() | here.included_) - here.excluded_).raw_repr() & ~known) == 0;
}

// The tensors among some arguments, undefined for None; false where one is not plain, or a mode looks at all calls.
template <typename Tensors>
bool plain_tensors(PyObject* const* args, Tensors& to) {
  if (at::impl::torch_function_mode_enabled()) return false;
  for (size_t i = 0; i < to.size(); ++i) {
    if (args[i] == Py_None) continue;
    if (!THPVariable_CheckExact(args[i])) return false;
    to[i] = THPVariable_Unpack(args[i]);
    if (!plain(to[i])) return false;
  }
  return true;
}

inline MaybeTensor maybe(const Tensor& t) { return t.defined() ? MaybeTensor(t) : std::nullopt; }

extern const KernelEntry* kernels;  // those of fastreft._C

// (h, rows, U, V, P, b, c, act, unique) -> h, edited in place
PyObject* quick_edit_rows_(PyObject*, PyObject* const* args, Py_ssize_t count);
// (mask, labels, batch, length, first, last, pyreft_compat) -> rows, see ../positions.h
PyObject* quick_prompt_rows(PyObject*, PyObject* const* args, Py_ssize_t count);
// (params, grads, m, v, orthonormal, lr, beta1, beta2, eps, weight_decay, age) -> None, see ../step_ops.h; on a CPU
// alone
PyObject* quick_step_(PyObject*, PyObject* const* args, Py_ssize_t count);
// (mask) -> the first sample of which it shows nothing, -1
PyObject* quick_hidden_sample(PyObject*, PyObject* const* args, Py_ssize_t count);

}  // namespace fastreft
