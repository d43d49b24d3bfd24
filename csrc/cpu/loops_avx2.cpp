// The inner loops for avx2, see loops.inl.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,bmi2"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c,bmi2")
#endif
#define FASTREFT_ISA avx2
#define FASTREFT_VECTOR_BYTES 32
#define FASTREFT_TABLE kAvx2Kernels
#define FASTREFT_NAME "avx2"
#include "loops.inl"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
