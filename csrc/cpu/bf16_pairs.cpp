// bf16 rows on processors that multiply pairs of bf16 and add them in fp32 (AVX512_BF16): twice the products of fp32 an
// instruction, and rows need no widening. Weights and coordinates are rounded to bf16 once, as torch's bf16 products
// have them; sums stay in fp32. The instructions take subnormal numbers as zero. A row's result depends on that row
// alone, as everywhere in the CPU core.
#include "loops.h"

#if FASTREFT_BF16_PAIRS
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")
#endif
#include <string.h>

#include "intrinsics.h"

namespace fastreft {
namespace {

constexpr int kStep = 32;  // elements a vector of bf16

inline __m512i load(const uint16_t* p) { return _mm512_loadu_si512(p); }
inline __m512i load_some(const uint16_t* p, int64_t count) {
  return _mm512_maskz_loadu_epi16((__mmask32)((uint64_t{1} << count) - 1), p);
}
inline __m512 products(__m512 sum, __m512i x, __m512i y) { return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)y); }
inline __m512i round_pair(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }
inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
// To nearest even; every NaN becomes the quiet one.
inline uint32_t round_one(float x) {
  const uint32_t u = bits_of(x);
  return x != x ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}
inline uint32_t pair(float first, float second) { return round_one(first) | round_one(second) << 16; }
inline __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

void pack_rows(uint16_t* dst, const float* A, int64_t k, int64_t dp) {
  for (int64_t i = 0; i < k * dp; i += kStep)
    _mm512_storeu_si512(dst + i, round_pair(_mm512_loadu_ps(A + i), _mm512_loadu_ps(A + i + 16)));
}
void pack_pairs(uint16_t* dst, const float* B, int64_t k, int64_t dp) {
  // Each 32-bit lane holds one column of rows j and j + 1; the last row of an odd k goes with zeros.
  for (int64_t j = 0; j < k; j += 2)
    for (int64_t c = 0; c < dp; c += 16) {
      const __m512 first = _mm512_loadu_ps(B + j * dp + c);
      const __m512 second = j + 1 < k ? _mm512_loadu_ps(B + (j + 1) * dp + c) : _mm512_setzero_ps();
      const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(first));
      const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(second));
      _mm512_storeu_si512(dst + j * dp + 2 * c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

// The sums of the lanes of four vectors at once, pairwise.
inline __m128 sum_four(const __m512* v) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1]));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3]));
  const __m512 lanes = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), _mm512_extractf32x8_ps(lanes, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

template <int M, int K>
void project_tile(const uint16_t* const* rows, const uint16_t* A, int64_t dp, int64_t d, float* out, int64_t ld) {
  __m512 sum[M][4] = {};
  auto step = [&](const __m512i* x, int64_t c) {
#pragma GCC unroll 4
    for (int j = 0; j < K; ++j) {
      const __m512i a = load(A + j * dp + c);
#pragma GCC unroll 4
      for (int i = 0; i < M; ++i) sum[i][j] = products(sum[i][j], x[i], a);
    }
  };
  const int64_t whole = d / kStep * kStep;
  __m512i x[M];
  for (int64_t c = 0; c < whole; c += kStep) {
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) x[i] = load(rows[i] + c);
    step(x, c);
  }
  if (whole < d) {
    for (int i = 0; i < M; ++i) x[i] = load_some(rows[i] + whole, d - whole);
    step(x, whole);
  }
  for (int i = 0; i < M; ++i) _mm_mask_storeu_ps(out + i * ld, (__mmask8)((1 << K) - 1), sum_four(sum[i]));
}
template <int M>
void project_rows(const uint16_t* const* rows, const uint16_t* A, int64_t k, int64_t d, int64_t dp, float* out,
                  int64_t ld) {
  int64_t j = 0;
  for (; j + 4 <= k; j += 4) project_tile<M, 4>(rows, A + j * dp, dp, d, out + j, ld);
  for (; j < k; ++j) project_tile<M, 1>(rows, A + j * dp, dp, d, out + j, ld);
}
void project(const uint16_t* const* rows, int m, const uint16_t* A, int64_t k, int64_t d, int64_t dp, float* out,
             int64_t ld) {
  int i = 0;
  for (; i + 4 <= m; i += 4) project_rows<4>(rows + i, A, k, d, dp, out + i * ld, ld);
  for (; i < m; ++i) project_rows<1>(rows + i, A, k, d, dp, out + i * ld, ld);
}

// M rows by N vectors of 32 columns; the k terms are summed first and added to the row last.
template <int M, int N>
void expand_tile(const uint16_t* const* src, uint16_t* const* dst, const uint32_t* coef, int64_t pairs,
                 const uint16_t* B, int64_t dp, int64_t c, int64_t count, bool past_caches) {
  __m512 sum[M][2 * N] = {};
  for (int64_t j = 0; j < pairs; ++j) {
    __m512i b[2 * N];
#pragma GCC unroll 4
    for (int q = 0; q < 2 * N; ++q) b[q] = load(B + 2 * (j * dp + c + 16 * q));
#pragma GCC unroll 4
    for (int i = 0; i < M; ++i) {
      const __m512i z = _mm512_set1_epi32((int)coef[i * pairs + j]);
#pragma GCC unroll 4
      for (int q = 0; q < 2 * N; ++q) sum[i][q] = products(sum[i][q], b[q], z);
    }
  }
  const __mmask32 some = (__mmask32)((uint64_t{1} << (count < kStep ? count : kStep)) - 1);
#pragma GCC unroll 4
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int q = 0; q < N; ++q) {
      const uint16_t* from = src[i] + c + q * kStep;
      uint16_t* to = dst[i] + c + q * kStep;
      const __m512i h = N == 1 ? _mm512_maskz_loadu_epi16(some, from) : load(from);
      const __m512i out = round_pair(_mm512_add_ps(widen(_mm512_castsi512_si256(h)), sum[i][2 * q]),
                                     _mm512_add_ps(widen(_mm512_extracti64x4_epi64(h, 1)), sum[i][2 * q + 1]));
      if (N == 1) _mm512_mask_storeu_epi16(to, some, out);
      else if (past_caches && (uintptr_t)to % 64 == 0) _mm512_stream_si512((__m512i*)to, out);
      else _mm512_storeu_si512(to, out);
    }
}
template <int M>
void expand_rows(const uint16_t* const* src, uint16_t* const* dst, const float* coef, int64_t ld, const uint16_t* B,
                 int64_t k, int64_t d, int64_t dp, bool past_caches) {
  const int64_t pairs = (k + 1) / 2;
  uint32_t rounded[M * kMostPairs];
  for (int i = 0; i < M; ++i)
    for (int64_t j = 0; j < k; j += 2)
      rounded[i * pairs + j / 2] = pair(coef[i * ld + j], j + 1 < k ? coef[i * ld + j + 1] : 0);
  int64_t c = 0;
  for (; c + 2 * kStep <= d; c += 2 * kStep)
    expand_tile<M, 2>(src, dst, rounded, pairs, B, dp, c, 2 * kStep, past_caches);
  for (; c < d; c += kStep) expand_tile<M, 1>(src, dst, rounded, pairs, B, dp, c, d - c, past_caches);
}
void expand(const uint16_t* const* src, uint16_t* const* dst, int m, const float* coef, int64_t ld, const uint16_t* B,
            int64_t k, int64_t d, int64_t dp, bool past_caches) {
  int i = 0;
  for (; i + 4 <= m; i += 4) expand_rows<4>(src + i, dst + i, coef + i * ld, ld, B, k, d, dp, past_caches);
  for (; i < m; ++i) expand_rows<1>(src + i, dst + i, coef + i * ld, ld, B, k, d, dp, past_caches);
  if (past_caches) _mm_sfence();
}

// K sums by 32 columns in registers, over the rows of the block, two at a time.
template <int K>
void accumulate_tile(const uint16_t* const* rows, int m, const uint32_t* coef, int64_t k, float* acc, int64_t dp,
                     int64_t d) {
  alignas(64) uint16_t places[64];
  for (int i = 0; i < 64; ++i) places[i] = (uint16_t)(i / 2 + (i % 2 ? 32 : 0));
  const __m512i low = _mm512_load_si512(places), high = _mm512_load_si512(places + 32);
  for (int64_t c = 0; c < d; c += kStep) {
    const __mmask32 some = (__mmask32)((uint64_t{1} << (d - c < kStep ? d - c : kStep)) - 1);
    __m512 sum[K][2];
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      sum[j][0] = _mm512_loadu_ps(acc + j * dp + c);
      sum[j][1] = _mm512_loadu_ps(acc + j * dp + c + 16);
    }
    for (int i = 0; i < m; i += 2) {
      const __m512i x = _mm512_maskz_loadu_epi16(some, rows[i] + c);
      const __m512i y = i + 1 < m ? _mm512_maskz_loadu_epi16(some, rows[i + 1] + c) : _mm512_setzero_si512();
      const __m512i first = _mm512_permutex2var_epi16(x, low, y), second = _mm512_permutex2var_epi16(x, high, y);
#pragma GCC unroll 8
      for (int j = 0; j < K; ++j) {
        const __m512i w = _mm512_set1_epi32((int)coef[i / 2 * k + j]);
        sum[j][0] = products(sum[j][0], first, w);
        sum[j][1] = products(sum[j][1], second, w);
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < K; ++j) {
      _mm512_storeu_ps(acc + j * dp + c, sum[j][0]);
      _mm512_storeu_ps(acc + j * dp + c + 16, sum[j][1]);
    }
  }
}
void accumulate(const uint16_t* const* rows, int m, const float* coef, int64_t ld, int64_t k, float* acc, int64_t d,
                int64_t dp) {
  uint32_t rounded[kBlock / 2 * 2 * kMostPairs];
  for (int i = 0; i < m; i += 2)
    for (int64_t j = 0; j < k; ++j)
      rounded[i / 2 * k + j] = pair(coef[i * ld + j], i + 1 < m ? coef[(i + 1) * ld + j] : 0);
  int64_t j = 0;
  for (; j + 8 <= k; j += 8) accumulate_tile<8>(rows, m, rounded + j, k, acc + j * dp, dp, d);
  for (; j + 4 <= k; j += 4) accumulate_tile<4>(rows, m, rounded + j, k, acc + j * dp, dp, d);
  for (; j < k; ++j) accumulate_tile<1>(rows, m, rounded + j, k, acc + j * dp, dp, d);
}

}  // namespace

extern const PairKernels kBf16PairKernels;
const PairKernels kBf16PairKernels = {pack_rows, pack_pairs, project, expand, accumulate};

}  // namespace fastreft
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
