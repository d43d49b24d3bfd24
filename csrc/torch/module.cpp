// pybind11: what is not a tensor op. The ops (ops*.cpp) register themselves when this module is loaded.
#include <pybind11/pybind11.h>

#include <string>

#include "../kernels.h"
#include "../positions.h"
#include "bind_policy.h"
#include "kernel_entry.h"

#define FASTREFT_QUOTE(x) #x
#define FASTREFT_STRING(x) FASTREFT_QUOTE(x)

namespace py = pybind11;

static py::dict build_info() {
  py::dict info;
  info["cpu_isa"] = fastreft::cpu_isa();
#ifdef FASTREFT_WITH_CUDA
  info["devices"] = "cpu cuda";
#else
  info["devices"] = "cpu";
#endif
  info["cuda"] = FASTREFT_STRING(FASTREFT_CUDA_REASON);
  info["cuda_arches"] = FASTREFT_STRING(FASTREFT_CUDA_ARCHES);
  info["quick_asked"] = FASTREFT_STRING(FASTREFT_QUICK);
  info["torch_built_with"] = FASTREFT_STRING(FASTREFT_TORCH_BUILT_WITH);
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#endif
  return info;
}

// By address, without torch's dispatcher: the look comes before every forward.
static int64_t hidden_sample(uintptr_t p, int64_t size, int64_t batch, int64_t length, int64_t row, int64_t column) {
  return fastreft::hidden_sample({reinterpret_cast<const void*>(p), size, row, column}, batch, length);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastreft's native core: the ops are in torch.ops.fastreft, this module tells how it was built";
  m.def("build_info", &build_info, "How this core was built, as strings.");
  m.def("hidden_sample", &hidden_sample, "The first sample of which a mask of integers shows nothing; -1 if none.");
  m.attr("kernel_entry") = py::capsule(&fastreft::kernel_entry, fastreft::kKernelEntry);
  fastreft::bind_policy(m);
}
