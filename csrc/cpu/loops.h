// What a CPU instruction set offers: the inner loops, chosen once at run time. Everything is per block of at most
// kBlock rows, given as an array of row pointers, so that dense, listed and strided rows are one case.
#pragma once
#include <cstdint>

#include "../edit.h"

namespace fastreft {

constexpr int kBlock = 16;  // rows a block: their g and h stay in a core's L2 while a backward reads them thrice

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)
#define FASTREFT_BF16_PAIRS 1
#endif

constexpr int kMostPairs = 128;  // pairs of coordinates that fit the pair kernels' buffers

// project, expand and accumulate for bf16 rows, with weights packed as bf16; dp is d rounded up to whole vectors.
struct PairKernels {
  static constexpr int64_t padding = 32;
  // dst (k, dp): rows for project.   dst (k / 2 rounded up, dp, 2): pairs of rows for expand.   From (k, dp) fp32.
  void (*pack_rows)(uint16_t* dst, const float* A, int64_t k, int64_t dp);
  void (*pack_pairs)(uint16_t* dst, const float* B, int64_t k, int64_t dp);
  // As in CpuKernels; k at most 2 kMostPairs.
  void (*project)(const uint16_t* const* rows, int m, const uint16_t* A, int64_t k, int64_t d, int64_t dp, float* out,
                  int64_t ld);
  void (*expand)(const uint16_t* const* src, uint16_t* const* dst, int m, const float* coef, int64_t ld,
                 const uint16_t* B, int64_t k, int64_t d, int64_t dp, bool past_caches);
  void (*accumulate)(const uint16_t* const* rows, int m, const float* coef, int64_t ld, int64_t k, float* acc,
                     int64_t d, int64_t dp);
};

struct CpuKernels {
  const char* name;
  // Inner dimension of the packed weights: d rounded up to whole vectors, the rest zero.
  int64_t (*padded)(DType compute, int64_t d);
  // dst[0..count) (compute type) = src (any type) * sign, added to dst if `add`.
  void (*widen)(DType compute, void* dst, const void* src, DType src_type, int64_t count, double sign, bool add);
  // dst (any type) = src (compute type), or dst rounded.
  void (*narrow)(DType compute, void* dst, DType dst_type, const void* src, int64_t count);
  // out[i * ld + j] = rows[i] . A[j]              i < m, j < k, A (k, padded d)
  void (*project)(DType type, const void* const* rows, int m, const void* A, int64_t k, int64_t d, void* out,
                  int64_t ld);
  // dst[i] = src[i] + sum_j coef[i * ld + j] B[j]
  void (*expand)(DType type, const void* const* src, void* const* dst, int m, const void* coef, int64_t ld,
                 const void* B, int64_t k, int64_t d, bool past_caches);
  // acc[j] += sum_i coef[i * ld + j] rows[i]      acc (k, padded d)
  void (*accumulate)(DType type, const void* const* rows, int m, const void* coef, int64_t ld, int64_t k, void* acc,
                     int64_t d);
  // Is every one of `count` values finite?
  bool (*finite)(DType type, const void* p, int64_t count);
  // y = x + a u, fp64
  void (*move)(double* y, const double* x, double a, const double* u, int64_t count);
  // total[j] += part[j], compute type
  void (*add)(DType compute, void* total, const void* part, int64_t count);
  // S (r, r) = X Y^T of (r, d) matrices of `type`, products and sums in fp64; `symmetric`: the lower triangle is enough
  void (*gram)(DType type, const void* X, const void* Y, int64_t r, int64_t d, bool symmetric, double* S);
  // out = L X, L (r, r) row-major; `lower` says that L is lower triangular. In place is not allowed.
  void (*combine)(const double* L, bool lower, const double* X, int64_t r, int64_t d, double* out);
  // Adam's direction u = (m / correction1) / (sqrt(v / correction2) + eps) of `count` elements; moves m and v (fp32,
  // fp64 where `type` is f64).
  void (*adam)(DType type, const double* g, void* m, void* v, int64_t count, const StepArgs& step, double* u);
  // What bf16 rows take instead of project, expand and accumulate, or nullptr.
  const PairKernels* pairs;
};

extern const CpuKernels kBaselineKernels;  // SSE2, NEON or whatever the compiler's default is
#if defined(__x86_64__)
extern const CpuKernels kAvx2Kernels;
extern const CpuKernels kAvx512Kernels;
extern const PairKernels kBf16PairKernels;
#endif

// The best set this processor has; FASTREFT_CPU_ISA=baseline|avx2|avx512|avx512_bf16 asks for a lesser one.
const CpuKernels& cpu_kernels();

}  // namespace fastreft
