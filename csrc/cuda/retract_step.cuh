// AdamW on elements: of a plain parameter in memory, or of a chunk of an orthonormal one (retract_chunk.cuh).
#pragma once
#include "retract_chunk.cuh"

namespace fastreft {

// What one AdamW element is worked out with, as C.
template <typename C>
struct Adam {
  C rest1, beta2, rest2, correction1, root2, eps, lr, decay;

  __device__ __forceinline__ explicit Adam(const StepArgs& a)
      : rest1(static_cast<C>(1 - a.beta1)),
        beta2(static_cast<C>(a.beta2)),
        rest2(static_cast<C>(1 - a.beta2)),
        correction1(static_cast<C>(a.correction1)),
        root2(static_cast<C>(sqrt(a.correction2))),
        eps(static_cast<C>(a.eps)),
        lr(static_cast<C>(a.lr)),
        decay(static_cast<C>(1 - a.lr * a.weight_decay)) {}

  // The direction U (before the learning rate) that moments m and v give.
  __device__ __forceinline__ C direction(C m, C v) const { return m / correction1 / (sqrt(v) / root2 + eps); }
  // The moments move; returns the direction.
  __device__ __forceinline__ C move(C& m, C& v, C g) const {
    m = m + (g - m) * rest1;
    v = beta2 * v + rest2 * g * g;
    return direction(m, v);
  }
};

constexpr int kPlainThreads = 256;

// What an element of a plain parameter reads.
template <typename T, typename C, int V>
struct Elements {
  Pack<T, V> p, g;
  Pack<C, V> m, v;
};

// A plain step of elements [begin, end), V at a time; what comes next is on its way while one is worked on.
template <typename T, int V, typename C>
__device__ __forceinline__ void plain_elements(const Adam<C>& adam, const StepItem& item, int64_t begin, int64_t end) {
  T* const p = static_cast<T*>(item.param.p);
  const T* const g = static_cast<const T*>(item.g);
  C* const m = static_cast<C*>(item.m);
  C* const v = static_cast<C*>(item.v);
  const auto load = [&](int64_t e, Elements<T, C, V>& x) {
    if (e >= end) return;
    x.p = *reinterpret_cast<const Pack<T, V>*>(p + e);
    x.g = *reinterpret_cast<const Pack<T, V>*>(g + e);
    x.m = *reinterpret_cast<const Pack<C, V>*>(m + e);
    x.v = *reinterpret_cast<const Pack<C, V>*>(v + e);
  };
  int64_t e = begin + static_cast<int64_t>(threadIdx.x) * V;
  Elements<T, C, V> next = {};
  load(e, next);
#pragma unroll 1
  for (; e < end; e += kPlainThreads * V) {
    Elements<T, C, V> x = next;
    load(e + kPlainThreads * V, next);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      const C u = adam.move(x.m.x[i], x.v.x[i], to_float(x.g.x[i]));
      x.p.x[i] = rounded<T>(to_float(x.p.x[i]) * adam.decay - adam.lr * u);
    }
    // Not by assignment: worked out one by one, the elements of a pack would be stored one by one.
    store_streaming(m + e, x.m);
    store_streaming(v + e, x.v);
    store_streaming(p + e, x.p);
  }
}

// The same for all of a piece: quads, and what is left one by one; everything one by one where nothing is aligned.
template <typename C>
__device__ __forceinline__ void plain_step(const StepArgs& a, const StepItem& item, int64_t begin, int64_t end,
                                           bool vector) {
  const Adam<C> adam(a);
  const int64_t quads = vector ? begin + (end - begin) / kVector<C> * kVector<C> : begin;
  by_stored<C>(item.param.type, [&](auto type) {
    plain_elements<decltype(type), kVector<C>>(adam, item, begin, quads);
    plain_elements<decltype(type), 1>(adam, item, quads, end);
  });
}

// Y = R - lr U for a chunk from column j0 on, with R and the gradient given as chunks; Y takes the gradient's place, or
// goes to memory where `Y` is there (r rows, d apart).
template <int V, typename C>
__device__ __forceinline__ void chunk_step(int pitch, Walk walk, const Adam<C>& adam, const StepItem& item, int64_t j0,
                                           int64_t d, const C* R, C* g, C* Y) {
  C* const m = static_cast<C*>(item.m) + j0;
  C* const v = static_cast<C*>(item.v) + j0;
  Walk ahead = walk;
  Pack<C, V> next_m = {}, next_v = {};
  const auto load = [&] {
    if (!ahead.there()) return;
    const int64_t e = ahead.row * d + ahead.column * V;
    next_m = *reinterpret_cast<const Pack<C, V>*>(m + e);
    next_v = *reinterpret_cast<const Pack<C, V>*>(v + e);
  };
  load();
#pragma unroll 1
  for (; walk.there(); walk.next()) {
    Pack<C, V> old_m = next_m, old_v = next_v;
    ahead.next();
    load();
    const int place = walk.row * pitch + walk.column * V;
    const int64_t e = walk.row * d + walk.column * V;
    const Pack<C, V> x = *reinterpret_cast<const Pack<C, V>*>(R + place);
    Pack<C, V> y = *reinterpret_cast<const Pack<C, V>*>(g + place);
#pragma unroll
    for (int i = 0; i < V; ++i) y.x[i] = x.x[i] - adam.lr * adam.move(old_m.x[i], old_v.x[i], y.x[i]);
    *reinterpret_cast<Pack<C, V>*>(m + e) = old_m;
    *reinterpret_cast<Pack<C, V>*>(v + e) = old_v;
    *reinterpret_cast<Pack<C, V>*>(Y != nullptr ? Y + e : g + place) = y;
  }
}

}  // namespace fastreft
