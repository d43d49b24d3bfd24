// The weights of one call, as the inner loops want them.
#include <cstring>

#include "support.h"

namespace fastreft {

Packed::Packed(const Weights& w, DType type_, int64_t r_, int64_t d_, const CpuKernels& k, bool backward)
    : compute(compute_type(type_)), r(r_), d(d_), kernels(k), type(type_) {
  has_v = w.V.p != nullptr;
  has_p = w.P.p != nullptr;
  linear = w.act == Act::identity;
  projections = (linear ? has_v || has_p : has_v + has_p) * r;
  pairs = type == DType::bf16 && std::max(r, projections) <= 2 * kMostPairs ? k.pairs : nullptr;
  padded_d =
      pairs ? (d + PairKernels::padding - 1) / PairKernels::padding * PairKernels::padding : k.padded(compute, d);

  const int64_t e = size_of(compute);
  auto matrix = [&](int64_t rows) {
    Scratch s = scratch(rows * padded_d * e);
    if (padded_d != d) std::memset(s.get(), 0, rows * padded_d * e);
    return s;
  };
  auto copy = [&](char* to, const Weight& from, double sign, bool add) {
    const char* p = static_cast<const char*>(from.p);
    if (padded_d == d) return k.widen(compute, to, p, from.type, r * d, sign, add);
    for (int64_t j = 0; j < r; ++j)
      k.widen(compute, to + j * padded_d * e, p + j * d * size_of(from.type), from.type, d, sign, add);
  };
  auto vector = [&](const Weight& from) {
    Scratch s;
    if (!from.p) return s;
    s = scratch(r * e);
    k.widen(compute, s.get(), from.p, from.type, r, 1, false);
    return s;
  };
  const void* u = w.U.p;  // as it is, if it can be
  if (w.U.type != compute || padded_d != d) {
    U = matrix(r);
    copy(U.get(), w.U, 1, false);
    u = U.get();
  }
  const void* a = nullptr;
  if (linear && has_v && !has_p && w.V.type == compute && padded_d == d) {
    a = w.V.p;  // likewise
  } else if (projections) {
    A = matrix(projections);
    if (has_v) copy(A.get(), w.V, 1, false);
    if (has_p) copy(A.get() + (projections - r) * padded_d * e, w.P, -1, linear && has_v);
    a = A.get();
  }
  b = vector(w.b);
  c = vector(w.c);

  project_k = backward ? r : projections;
  expand_k = backward ? projections : r;
  project_weights = backward ? u : a;
  expand_weights = backward ? a : u;
  if (!pairs) return;
  const int64_t rows = project_k * padded_d;
  packed = scratch((rows + (expand_k + 1) / 2 * 2 * padded_d) * 2);
  uint16_t* to = reinterpret_cast<uint16_t*>(packed.get());
  pairs->pack_rows(to, static_cast<const float*>(project_weights), project_k, padded_d);
  pairs->pack_pairs(to + rows, static_cast<const float*>(expand_weights), expand_k, padded_d);
  project_weights = to;
  expand_weights = to + rows;
}

void Packed::project(const void* const* rows, int m, void* out, int64_t ld) const {
  if (pairs)
    pairs->project(reinterpret_cast<const uint16_t* const*>(rows), m, static_cast<const uint16_t*>(project_weights),
                   project_k, d, padded_d, static_cast<float*>(out), ld);
  else kernels.project(type, rows, m, project_weights, project_k, d, out, ld);
}

void Packed::expand(const void* const* src, void* const* dst, int m, const void* coef, int64_t ld,
                    bool past_caches) const {
  if (pairs)
    pairs->expand(reinterpret_cast<const uint16_t* const*>(src), reinterpret_cast<uint16_t* const*>(dst), m,
                  static_cast<const float*>(coef), ld, static_cast<const uint16_t*>(expand_weights), expand_k, d,
                  padded_d, past_caches);
  else kernels.expand(type, src, dst, m, coef, ld, expand_weights, expand_k, d, past_caches);
}

void Packed::accumulate(const void* const* rows, int m, const void* coef, int64_t ld, int64_t k, void* acc) const {
  if (pairs)
    pairs->accumulate(reinterpret_cast<const uint16_t* const*>(rows), m, static_cast<const float*>(coef), ld, k,
                      static_cast<float*>(acc), d, padded_d);
  else kernels.accumulate(type, rows, m, coef, ld, k, acc, d);
}

}  // namespace fastreft
