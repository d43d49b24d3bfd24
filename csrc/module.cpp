// pybind11: what is not a tensor op. The ops (ops*.cpp) register themselves when this module is loaded.
#include <pybind11/pybind11.h>

#include <string>

#include "bind_policy.h"
#include "cpu.h"

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
  info["torch_built_with"] = FASTREFT_STRING(FASTREFT_TORCH_BUILT_WITH);
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#elif defined(__GNUC__)
  info["compiler"] = "gcc " __VERSION__;
#endif
  return info;
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastreft's native core: the ops are in torch.ops.fastreft, this module tells how it was built";
  m.def("build_info", &build_info, "How this core was built, as strings.");
  fastreft::bind_policy(m);
}
