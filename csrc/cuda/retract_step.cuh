// AdamW on elements: of a plain parameter in memory, or of a chunk of an orthonormal one (retract_chunk.cuh).
#pragma once
#include "retract_chunk.cuh"

namespace fastreft {

constexpr int kPlainThreads = 256;

// A plain step of elements [begin, end) by `Threads` of a CTA, of which this is the `thread`-th, V at a time, two of
// those on their way together. Not the next while one is worked on: beside a retraction that has registers spilled.
template <int V, int Threads, typename C>
__device__ __forceinline__ void plain_elements(const Adam<C>& adam, const StepItem& item, int64_t begin, int64_t end,
                                               int thread) {
  constexpr int kTogether = V > 1 ? 2 : 1;  // one by one is for what is left, or not aligned
  C* const m = static_cast<C*>(item.m);
  C* const v = static_cast<C*>(item.v);
#pragma unroll 1
  for (int64_t first = begin + static_cast<int64_t>(thread) * V; first < end; first += kTogether * Threads * V) {
    Pack<C, V> x[kTogether], g[kTogether], old_m[kTogether] = {}, old_v[kTogether] = {};
    const auto each = [&](const auto& f) {
#pragma unroll
      for (int q = 0; q < kTogether; ++q) {
        const int64_t e = first + q * Threads * V;
        if (e < end) f(q, e);
      }
    };
    each([&](int q, int64_t e) {
      old_m[q] = *reinterpret_cast<const Pack<C, V>*>(m + e);
      old_v[q] = *reinterpret_cast<const Pack<C, V>*>(v + e);
    });
    by_stored<C>(item.param.type, [&](auto type) {  // what takes most of the code is there once for all types
      using T = decltype(type);
      Pack<T, V> stored_x[kTogether] = {}, stored_g[kTogether] = {};
      each([&](int q, int64_t e) {
        stored_x[q] = *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(item.param.p) + e);
        stored_g[q] = *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(item.g) + e);
      });
#pragma unroll
      for (int i = 0; i < kTogether * V; ++i) {
        x[i / V].x[i % V] = to_float(stored_x[i / V].x[i % V]);
        g[i / V].x[i % V] = to_float(stored_g[i / V].x[i % V]);
      }
    });
    each([&](int q, int64_t e) {
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const C u = adam.move(old_m[q].x[i], old_v[q].x[i], g[q].x[i]);
        x[q].x[i] = x[q].x[i] * adam.decay - adam.lr * u;
      }
      // Not by assignment: worked out one by one, the elements of a pack would be stored one by one.
      store_streaming(m + e, old_m[q]);
      store_streaming(v + e, old_v[q]);
    });
    by_stored<C>(item.param.type, [&](auto type) {
      using T = decltype(type);
      each([&](int q, int64_t e) {
        Pack<T, V> y;
#pragma unroll
        for (int i = 0; i < V; ++i) y.x[i] = rounded<T>(x[q].x[i]);
        store_streaming(static_cast<T*>(item.param.p) + e, y);
      });
    });
  }
}

// The same for any of them: quads, and what is left one by one; everything one by one where nothing is aligned.
template <typename C, int Threads>
__device__ __forceinline__ void plain_step(const StepArgs& a, const StepItem& item, int64_t begin, int64_t end,
                                           bool vector, int thread) {
  const Adam<C> adam(a);
  const int64_t quads = vector ? begin + (end - begin) / kVector<C> * kVector<C> : begin;
  plain_elements<kVector<C>, Threads>(adam, item, begin, quads, thread);
  plain_elements<1, Threads>(adam, item, quads, end, thread);
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
