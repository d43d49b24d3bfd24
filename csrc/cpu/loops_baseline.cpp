// The inner loops for the compiler's default target (SSE2 on x86-64, NEON on 64-bit ARM), see loops.inl.
#define FASTREFT_ISA baseline
#define FASTREFT_VECTOR_BYTES 16
#define FASTREFT_TABLE kBaselineKernels
#define FASTREFT_NAME "baseline"
#include "loops.inl"
