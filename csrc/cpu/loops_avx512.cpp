// The inner loops for avx512, see loops.inl.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,bmi2")
#endif
#define FASTREFT_ISA avx512
#define FASTREFT_VECTOR_BYTES 64
#define FASTREFT_TABLE kAvx512Kernels
#define FASTREFT_NAME "avx512"
#include "loops.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
