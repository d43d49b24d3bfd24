// The inner loops of the CPU core, for one instruction set (see simd.h). A row's result depends on that row alone:
// every blocking below keeps the order in which one row's terms are added.
#include "loops.h"
#include "simd.h"

namespace fastreft {
namespace FASTREFT_ISA {

template <DType>
struct Storage;
template <>
struct Storage<DType::f32> {
  using T = float;
  using C = float;
};
template <>
struct Storage<DType::f64> {
  using T = double;
  using C = double;
};
template <>
struct Storage<DType::bf16> {
  using T = bf16;
  using C = float;
};
template <>
struct Storage<DType::f16> {
  using T = f16;
  using C = float;
};

#define FASTREFT_FOR_TYPE(type, ...) \
  switch (type) {                    \
    case DType::f32: {               \
      using T = float;               \
      using C = float;               \
      (void)sizeof(T);               \
      (void)sizeof(C);               \
      __VA_ARGS__;                   \
      break;                         \
    }                                \
    case DType::f64: {               \
      using T = double;              \
      using C = double;              \
      (void)sizeof(T);               \
      (void)sizeof(C);               \
      __VA_ARGS__;                   \
      break;                         \
    }                                \
    case DType::bf16: {              \
      using T = bf16;                \
      using C = float;               \
      (void)sizeof(T);               \
      (void)sizeof(C);               \
      __VA_ARGS__;                   \
      break;                         \
    }                                \
    case DType::f16: {               \
      using T = f16;                 \
      using C = float;               \
      (void)sizeof(T);               \
      (void)sizeof(C);               \
      __VA_ARGS__;                   \
      break;                         \
    }                                \
  }

static int64_t padded(DType compute, int64_t d) {
  const int64_t width = compute == DType::f64 ? lanes<double> : lanes<float>;
  return (d + width - 1) / width * width;
}

template <typename C, typename T>
static void widen_as(C* dst, const T* src, int64_t count, double sign, bool add) {
  const C s = (C)sign;
  for (int64_t i = 0; i < count; ++i) {
    const C x = (C)to_scalar(src[i]) * s;
    dst[i] = add ? dst[i] + x : x;
  }
}
static void widen(DType compute, void* dst, const void* src, DType src_type, int64_t count, double sign, bool add) {
  FASTREFT_FOR_TYPE(src_type, if (compute == DType::f64) widen_as((double*)dst, (const T*)src, count, sign, add);
                    else widen_as((float*)dst, (const T*)src, count, sign, add));
}
static void narrow(DType compute, void* dst, DType dst_type, const void* src, int64_t count) {
  FASTREFT_FOR_TYPE(dst_type, for (int64_t i = 0; i < count; ++i)((T*)dst)[i] = Round<T>::from(
                                  compute == DType::f64 ? ((const double*)src)[i] : (double)((const float*)src)[i]));
}

// ---- project: M rows by K rows of A, all M * K sums in registers ----------------------------------------------------
template <int M, int K, typename T, typename C>
static void project_tile(const T* const* rows, const C* A, int64_t dp, int64_t d, C* out, int64_t ld) {
  constexpr int L = lanes<C>;
  Vec<C> acc[M][K] = {};
  const int64_t whole = d / L * L;
  for (int64_t c = 0; c < whole; c += L) {
    Vec<C> x[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) x[i] = load<C>(rows[i] + c);
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      const Vec<C> a = load(A + j * dp + c);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) acc[i][j] += x[i] * a;
    }
  }
  if (whole < d)
    for (int i = 0; i < M; ++i) {
      const Vec<C> x = load_some<C>(rows[i] + whole, d - whole);
      for (int j = 0; j < K; ++j) acc[i][j] += x * load(A + j * dp + whole);
    }
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < K; ++j) out[i * ld + j] = sum_lanes<C>(acc[i][j]);
}
template <int M, typename T, typename C>
static void project_rows(const T* const* rows, const C* A, int64_t k, int64_t d, C* out, int64_t ld) {
  const int64_t dp = padded(sizeof(C) == 8 ? DType::f64 : DType::f32, d);
  int64_t j = 0;
  for (; j + 4 <= k; j += 4) project_tile<M, 4>(rows, A + j * dp, dp, d, out + j, ld);
  for (; j < k; ++j) project_tile<M, 1>(rows, A + j * dp, dp, d, out + j, ld);
}
static void project(DType type, const void* const* rows, int m, const void* A, int64_t k, int64_t d, void* out,
                    int64_t ld) {
  FASTREFT_FOR_TYPE(type, {
    int i = 0;
    for (; i + 4 <= m; i += 4) project_rows<4>((const T* const*)rows + i, (const C*)A, k, d, (C*)out + i * ld, ld);
    for (; i < m; ++i) project_rows<1>((const T* const*)rows + i, (const C*)A, k, d, (C*)out + i * ld, ld);
  });
}

// ---- expand: M rows by N vectors; the k terms are summed first and added to the row last
// -------------------------------
template <int M, int N, typename T, typename C>
static void expand_tile(const T* const* src, T* const* dst, const C* coef, int64_t ld, const C* B, int64_t dp,
                        int64_t k, int64_t c, bool past_caches) {
  constexpr int L = lanes<C>;
  Vec<C> acc[M][N] = {};
  for (int64_t j = 0; j < k; ++j) {
    Vec<C> b[N];
#pragma GCC unroll 8
    for (int q = 0; q < N; ++q) b[q] = load(B + j * dp + c + q * L);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec<C> z = broadcast(coef[i * ld + j]);
#pragma GCC unroll 8
      for (int q = 0; q < N; ++q) acc[i][q] += z * b[q];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int q = 0; q < N; ++q) store(dst[i] + c + q * L, load<C>(src[i] + c + q * L) + acc[i][q], past_caches);
}
template <int M, typename T, typename C>
static void expand_rows(const T* const* src, T* const* dst, const C* coef, int64_t ld, const C* B, int64_t k, int64_t d,
                        bool past_caches) {
  constexpr int L = lanes<C>;
  const int64_t dp = padded(sizeof(C) == 8 ? DType::f64 : DType::f32, d);
  int64_t c = 0;
  for (; c + 4 * L <= d; c += 4 * L) expand_tile<M, 4>(src, dst, coef, ld, B, dp, k, c, past_caches);
  for (; c + L <= d; c += L) expand_tile<M, 1>(src, dst, coef, ld, B, dp, k, c, past_caches);
  if (c < d)
    for (int i = 0; i < M; ++i) {
      Vec<C> acc = {};
      for (int64_t j = 0; j < k; ++j) acc += broadcast(coef[i * ld + j]) * load(B + j * dp + c);
      store_some<C>(dst[i] + c, load_some<C>(src[i] + c, d - c) + acc, d - c);
    }
}
static void expand(DType type, const void* const* src, void* const* dst, int m, const void* coef, int64_t ld,
                   const void* B, int64_t k, int64_t d, bool past_caches) {
  FASTREFT_FOR_TYPE(type, {
    int i = 0;
    for (; i + 4 <= m; i += 4)
      expand_rows<4>((const T* const*)src + i, (T* const*)dst + i, (const C*)coef + i * ld, ld, (const C*)B, k, d,
                     past_caches);
    for (; i < m; ++i)
      expand_rows<1>((const T* const*)src + i, (T* const*)dst + i, (const C*)coef + i * ld, ld, (const C*)B, k, d,
                     past_caches);
  });
  if (past_caches) fence();
}

// ---- accumulate: K sums by N vectors in registers, over the rows of the block
// ------------------------------------------
template <int K, int N, typename T, typename C>
static void accumulate_tile(const T* const* rows, int m, const C* coef, int64_t ld, C* acc, int64_t dp, int64_t c,
                            int64_t count) {
  constexpr int L = lanes<C>;
  Vec<C> sum[K][N];
#pragma GCC unroll 8
  for (int j = 0; j < K; ++j)
#pragma GCC unroll 8
    for (int q = 0; q < N; ++q) sum[j][q] = load(acc + j * dp + c + q * L);
  for (int i = 0; i < m; ++i) {
    Vec<C> x[N];
#pragma GCC unroll 8
    for (int q = 0; q < N; ++q)
      x[q] = N == 1 && count < L ? load_some<C>(rows[i] + c, count) : load<C>(rows[i] + c + q * L);
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      const Vec<C> w = broadcast(coef[i * ld + j]);
#pragma GCC unroll 8
      for (int q = 0; q < N; ++q) sum[j][q] += w * x[q];
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < K; ++j)
#pragma GCC unroll 8
    for (int q = 0; q < N; ++q) store(acc + j * dp + c + q * L, sum[j][q]);
}
template <int K, typename T, typename C>
static void accumulate_sums(const T* const* rows, int m, const C* coef, int64_t ld, C* acc, int64_t dp, int64_t d) {
  constexpr int L = lanes<C>;
  int64_t c = 0;
  for (; c + 4 * L <= d; c += 4 * L) accumulate_tile<K, 4>(rows, m, coef, ld, acc, dp, c, L);
  for (; c < d; c += L) accumulate_tile<K, 1>(rows, m, coef, ld, acc, dp, c, d - c);
}
static void accumulate(DType type, const void* const* rows, int m, const void* coef, int64_t ld, int64_t k, void* acc,
                       int64_t d) {
  FASTREFT_FOR_TYPE(type, {
    const int64_t dp = padded(sizeof(C) == 8 ? DType::f64 : DType::f32, d);
    int64_t j = 0;
    for (; j + 4 <= k; j += 4)
      accumulate_sums<4>((const T* const*)rows, m, (const C*)coef + j, ld, (C*)acc + j * dp, dp, d);
    for (; j < k; ++j) accumulate_sums<1>((const T* const*)rows, m, (const C*)coef + j, ld, (C*)acc + j * dp, dp, d);
  });
}

static void add(DType compute, void* total, const void* part, int64_t count) {
  if (compute == DType::f64)
    for (int64_t i = 0; i < count; ++i) ((double*)total)[i] += ((const double*)part)[i];
  else
    for (int64_t i = 0; i < count; ++i) ((float*)total)[i] += ((const float*)part)[i];
}

// x * 0 is 0 for a finite x and NaN for any other, and a sum keeps a NaN.
template <typename C, typename T>
static bool finite_as(const T* p, int64_t count) {
  constexpr int L = lanes<C>;
  Vec<C> poison[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= count; i += 4 * L)
    for (int q = 0; q < 4; ++q) poison[q] += load<C>(p + i + q * L) * (C)0;
  for (; i < count; i += L) poison[0] += load_some<C>(p + i, count - i < L ? count - i : L) * (C)0;
  return sum_lanes<C>((poison[0] + poison[1]) + (poison[2] + poison[3])) == 0;
}
static bool finite(DType type, const void* p, int64_t count) {
  FASTREFT_FOR_TYPE(type, return finite_as<C>((const T*)p, count));
  return false;
}

static void move(double* y, const double* x, double a, const double* u, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = x[i] + a * u[i];
}

// ---- the optimizer step and the retraction: all in fp64
// -----------------------------------------------------------------
// lanes<double> stored values as fp64.
template <typename T>
static inline Vec<double> load_wide(const T* p) {
  constexpr int L = lanes<double>;
  typedef float Narrow __attribute__((vector_size(kBytes / 2)));
  if constexpr (sizeof(T) == 8) {
    return load<double>((const double*)p);
  } else if constexpr (sizeof(T) == 4) {
    return __builtin_convertvector(load_bytes<Narrow>(p), Vec<double>);
  } else {
    Vec<double> v;
    for (int i = 0; i < L; ++i) v[i] = to_scalar(p[i]);
    return v;
  }
}
template <typename T>
static inline Vec<double> load_wide_some(const T* p, int64_t count) {
  T buffer[lanes<double>] = {};
  memcpy(buffer, p, (size_t)count * sizeof(T));
  return load_wide(buffer);
}

template <int M, int K, typename T>
static void gram_tile(const T* X, const T* Y, int64_t r, int64_t d, double* S) {
  constexpr int L = lanes<double>;
  Vec<double> acc[M][K] = {};
  const int64_t whole = d / L * L;
  for (int64_t c = 0; c < whole; c += L) {
    Vec<double> y[K];
    for (int j = 0; j < K; ++j) y[j] = load_wide(Y + j * d + c);
    for (int i = 0; i < M; ++i) {
      const Vec<double> x = load_wide(X + i * d + c);
      for (int j = 0; j < K; ++j) acc[i][j] += x * y[j];
    }
  }
  for (int i = 0; whole < d && i < M; ++i)
    for (int j = 0; j < K; ++j)
      acc[i][j] += load_wide_some(X + i * d + whole, d - whole) * load_wide_some(Y + j * d + whole, d - whole);
  for (int i = 0; i < M; ++i)
    for (int j = 0; j < K; ++j) S[i * r + j] = sum_lanes<double>(acc[i][j]);
}
template <typename T>
static void gram_as(const T* X, const T* Y, int64_t r, int64_t d, bool symmetric, double* S) {
  for (int64_t i = 0; i < r;) {
    const int64_t m = i + 4 <= r ? 4 : 1;
    const int64_t end = symmetric ? i + m : r;
    for (int64_t j = 0; j < end;) {
      const int64_t k = j + 4 <= end ? 4 : 1;
      const T *x = X + i * d, *y = Y + j * d;
      double* s = S + i * r + j;
      if (m == 4 && k == 4) gram_tile<4, 4>(x, y, r, d, s);
      else if (m == 4) gram_tile<4, 1>(x, y, r, d, s);
      else if (k == 4) gram_tile<1, 4>(x, y, r, d, s);
      else gram_tile<1, 1>(x, y, r, d, s);
      j += k;
    }
    i += m;
  }
}
static void gram(DType type, const void* X, const void* Y, int64_t r, int64_t d, bool symmetric, double* S) {
  FASTREFT_FOR_TYPE(type, gram_as((const T*)X, (const T*)Y, r, d, symmetric, S));
}

template <int M>
static void combine_rows(const double* coef, int64_t ld, int64_t k, const double* X, int64_t d, double* out) {
  constexpr int L = lanes<double>;
  int64_t c = 0;
  for (; c + 2 * L <= d; c += 2 * L) {
    Vec<double> acc[M][2] = {};
    for (int64_t j = 0; j < k; ++j) {
      const Vec<double> x0 = load(X + j * d + c), x1 = load(X + j * d + c + L);
      for (int i = 0; i < M; ++i) {
        const Vec<double> w = broadcast(coef[i * ld + j]);
        acc[i][0] += w * x0;
        acc[i][1] += w * x1;
      }
    }
    for (int i = 0; i < M; ++i) {
      store(out + i * d + c, acc[i][0]);
      store(out + i * d + c + L, acc[i][1]);
    }
  }
  for (; c < d; ++c)
    for (int i = 0; i < M; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < k; ++j) sum += coef[i * ld + j] * X[j * d + c];
      out[i * d + c] = sum;
    }
}
static void combine(const double* L, bool lower, const double* X, int64_t r, int64_t d, double* out) {
  int64_t i = 0;  // of a lower triangular L the zeros right of the tile are skipped
  for (; i + 4 <= r; i += 4) combine_rows<4>(L + i * r, r, lower ? i + 4 : r, X, d, out + i * d);
  for (; i < r; ++i) combine_rows<1>(L + i * r, r, lower ? i + 1 : r, X, d, out + i * d);
}

template <typename C>
static void adam_as(const double* g, C* m, C* v, int64_t count, const StepArgs& step, double* u) {
  const C beta1 = (C)step.beta1, beta2 = (C)step.beta2, rest1 = (C)(1 - step.beta1), rest2 = (C)(1 - step.beta2);
  const C scale = (C)(1 / step.correction1), root = (C)(1 / step.correction2), eps = (C)step.eps;
  for (int64_t i = 0; i < count; ++i) {
    const C x = (C)g[i], m1 = beta1 * m[i] + rest1 * x, v1 = beta2 * v[i] + rest2 * x * x;
    m[i] = m1;
    v[i] = v1;
    const C size = v1 * root;
    u[i] = m1 * scale / ((sizeof(C) == 4 ? (C)__builtin_sqrtf((float)size) : (C)__builtin_sqrt((double)size)) + eps);
  }
}
static void adam(DType type, const double* g, void* m, void* v, int64_t count, const StepArgs& step, double* u) {
  if (type == DType::f64) adam_as(g, (double*)m, (double*)v, count, step, u);
  else adam_as(g, (float*)m, (float*)v, count, step, u);
}

}  // namespace FASTREFT_ISA

extern const CpuKernels FASTREFT_TABLE;
const CpuKernels FASTREFT_TABLE = {
    FASTREFT_NAME,
    FASTREFT_ISA::padded,
    FASTREFT_ISA::widen,
    FASTREFT_ISA::narrow,
    FASTREFT_ISA::project,
    FASTREFT_ISA::expand,
    FASTREFT_ISA::accumulate,
    FASTREFT_ISA::finite,
    FASTREFT_ISA::move,
    FASTREFT_ISA::add,
    FASTREFT_ISA::gram,
    FASTREFT_ISA::combine,
    FASTREFT_ISA::adam,
    nullptr,
};
}  // namespace fastreft
