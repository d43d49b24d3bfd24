// One vector type per instruction set, written with the compilers' vector extensions (GCC, Clang), so that one
// source serves AVX-512, AVX2, NEON and plain C++. Each cpu_<isa>.cpp sets its target, names its namespace in
// FASTREFT_ISA and includes this; nothing here may be an inline function of the standard library, because the
// linker would be free to keep the AVX-512 copy of it for everybody.
#include <stdint.h>
#include <string.h>

#include "intrinsics.h"

namespace fastreft {
namespace FASTREFT_ISA {

constexpr int kBytes = FASTREFT_VECTOR_BYTES;

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

template <typename C>
struct VecOf;
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kBytes)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kBytes)));
};
template <typename C>
using Vec = typename VecOf<C>::type;
template <typename C>
constexpr int lanes = kBytes / sizeof(C);

typedef uint16_t U16 __attribute__((vector_size(kBytes / 2)));
typedef uint32_t U32 __attribute__((vector_size(kBytes)));

template <typename V>
static inline V load_bytes(const void* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

// ---- scalar conversions -------------------------------------------------------------------------------------
static inline float to_scalar(float x) { return x; }
static inline double to_scalar(double x) { return x; }
static inline float to_scalar(bf16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
static inline float to_scalar(f16 x) {
  _Float16 h;
  memcpy(&h, &x.bits, 2);
  return (float)h;
}
template <typename T>
struct Round;  // from a compute type to a storage type, to nearest even
template <>
struct Round<float> {
  static float from(double x) { return (float)x; }
};
template <>
struct Round<double> {
  static double from(double x) { return x; }
};
template <>
struct Round<bf16> {
  static bf16 from(double wide) {
    float x = (float)wide;
    uint32_t u;
    memcpy(&u, &x, 4);
    if (x != x) return {0x7fc0};
    return {(uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16)};
  }
};
template <>
struct Round<f16> {
  static f16 from(double x) {
    _Float16 h = (_Float16)(float)x;
    f16 y;
    memcpy(&y.bits, &h, 2);
    return y;
  }
};

// ---- vector loads: storage T -> lanes of the compute type C ------------------------------------------------------
template <typename C>
static inline Vec<C> load(const C* p) {
  return load_bytes<Vec<C>>(p);
}
template <typename C>
static inline Vec<C> load(const bf16* p) {
  static_assert(sizeof(C) == 4, "bf16 is computed in fp32");
  U32 wide = __builtin_convertvector(load_bytes<U16>(p), U32) << 16;
  return load_bytes<Vec<float>>(&wide);
}
template <typename C>
static inline Vec<C> load(const f16* p) {
  static_assert(sizeof(C) == 4, "fp16 is computed in fp32");
#if FASTREFT_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtph_ps(load_bytes<__m256i>(p));
#elif FASTREFT_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtph_ps(load_bytes<__m128i>(p));
#else
  Vec<float> v;
  for (int i = 0; i < lanes<float>; ++i) v[i] = to_scalar(p[i]);
  return v;
#endif
}

// ---- and back ---------------------------------------------------------------------------------------------------
// `past_caches` writes round the caches: for results too large to be still there when they are read.
template <typename V>
static inline void put(void* p, const V& v, bool past_caches) {
#if defined(__x86_64__)
  if (past_caches && ((uintptr_t)p % sizeof(V)) == 0) {
#if FASTREFT_VECTOR_BYTES == 64
    if constexpr (sizeof(V) == 64) return _mm512_stream_si512((__m512i*)p, load_bytes<__m512i>(&v));
#endif
#if FASTREFT_VECTOR_BYTES >= 32
    if constexpr (sizeof(V) == 32) return _mm256_stream_si256((__m256i*)p, load_bytes<__m256i>(&v));
#endif
    if constexpr (sizeof(V) == 16) return _mm_stream_si128((__m128i*)p, load_bytes<__m128i>(&v));
  }
#endif
  memcpy(p, &v, sizeof(V));
}
template <typename C>
static inline void store(C* p, Vec<C> v, bool past_caches = false) {
  put(p, v, past_caches);
}
static inline void store(bf16* p, Vec<float> v, bool past_caches = false) {
  U32 u = load_bytes<U32>(&v);
  U32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  U32 nan = (U32)(v != v);
  U32 bits = (rounded & ~nan) | (nan & 0x7fc0);
  put(p, __builtin_convertvector(bits, U16), past_caches);
}
static inline void store(f16* p, Vec<float> v, [[maybe_unused]] bool past_caches = false) {
#if FASTREFT_VECTOR_BYTES == 64
  put(p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), past_caches);
#elif FASTREFT_VECTOR_BYTES == 32
  put(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), past_caches);
#else
  for (int i = 0; i < lanes<float>; ++i) p[i] = Round<f16>::from(v[i]);
#endif
}
static inline void fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// ---- the last, incomplete vector of a row: through a small buffer -------------------------------------------------
template <typename C, typename T>
static inline Vec<C> load_some(const T* p, int64_t count) {
  T buffer[lanes<C>] = {};
  memcpy(buffer, p, (size_t)count * sizeof(T));
  return load<C>(buffer);
}
template <typename C, typename T>
static inline void store_some(T* p, Vec<C> v, int64_t count) {
  T buffer[lanes<C>];
  store(buffer, v);
  memcpy(p, buffer, (size_t)count * sizeof(T));
}

template <typename C>
static inline Vec<C> broadcast(C x) {
  return x - Vec<C>{};
}

// Lanes are added pairwise, halves first: the order is part of the result.
template <typename C>
static inline C sum_lanes(Vec<C> v) {
  C x[lanes<C>];
  memcpy(x, &v, sizeof(v));
  for (int width = lanes<C> / 2; width; width /= 2)
    for (int i = 0; i < width; ++i) x[i] += x[i + width];
  return x[0];
}

}  // namespace FASTREFT_ISA
}  // namespace fastreft
