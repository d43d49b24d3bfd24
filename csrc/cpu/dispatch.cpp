// Chooses the instruction set once, when it is first asked for.
#include <cstdlib>
#include <cstring>

#include "../kernels.h"
#include "loops.h"

namespace fastreft {

static const CpuKernels& choose() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("FASTREFT_CPU_ISA");
  auto allowed = [&](const char* name) { return !wanted || !*wanted || std::strcmp(wanted, name) == 0; };
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#if FASTREFT_BF16_PAIRS
  if (avx512 && __builtin_cpu_supports("avx512bf16") && allowed("avx512_bf16")) {
    static CpuKernels with_pairs = kAvx512Kernels;
    with_pairs.name = "avx512_bf16";
    with_pairs.pairs = &kBf16PairKernels;
    return with_pairs;
  }
#endif
  if (avx512 && allowed("avx512")) return kAvx512Kernels;
  if (avx2 && allowed("avx2")) return kAvx2Kernels;
#endif
  return kBaselineKernels;
}

const CpuKernels& cpu_kernels() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

const char* cpu_isa() { return cpu_kernels().name; }

}  // namespace fastreft
