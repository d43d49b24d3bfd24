#include "quick.h"

const fastreft::KernelEntry* fastreft::kernels = nullptr;

namespace {

template <typename F>
PyMethodDef method(const char* name, F* function) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {method("edit_rows_", &fastreft::quick_edit_rows_),
                         method("prompt_rows", &fastreft::quick_prompt_rows),
                         method("step_", &fastreft::quick_step_),
                         method("hidden_sample", &fastreft::quick_hidden_sample),
                         {nullptr, nullptr, 0, nullptr}};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_quick", nullptr, -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__quick() {
  fastreft::kernels = static_cast<const fastreft::KernelEntry*>(PyCapsule_Import(fastreft::kKernelEntry, 0));
  return fastreft::kernels ? PyModule_Create(&definition) : nullptr;
}
