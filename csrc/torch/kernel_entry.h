// The kernels as csrc/quick/, an extension of its own, reaches them.
#pragma once
#include "../edit.h"

namespace fastreft {

struct KernelEntry {
  void (*forward)(EditArgs& args, bool on_cpu, int32_t device);
  void (*backward)(EditGradArgs& args, bool on_cpu, int32_t device);
  int64_t (*step_cpu)(const StepItem* items, int64_t count, const StepArgs& step);
};

// A capsule of fastreft._C holds the address of this.
constexpr const char* kKernelEntry = "fastreft._C.kernel_entry";
extern const KernelEntry kernel_entry;

}  // namespace fastreft
