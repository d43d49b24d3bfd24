// What all edit kernels share: where a row lies, how a weight of any dtype is read, and the coordinates' arithmetic.
#pragma once
#include "activation.cuh"
#include "edit_args.h"

namespace fastreft {

// The first element of row i, counted from Rows::p.
__device__ __forceinline__ int64_t row_offset(const Rows& rows, int64_t i) {
  const int64_t outer = rows.inner > 1 ? i / rows.inner : i;
  const int64_t inner = rows.inner > 1 ? i - outer * rows.inner : 0;
  return outer * rows.outer_stride + inner * rows.inner_stride;
}

// The row of the state that the i-th listed row is, or -1 where there is nothing to do.
__device__ __forceinline__ int64_t listed_row(const int64_t* index, int64_t i, int64_t n, int64_t total) {
  if (i >= n) return -1;
  if (index == nullptr) return i;
  const int64_t row = index[i];
  return row >= 0 && row < total ? row : -1;
}

template <typename T, int V, typename C>
__device__ __forceinline__ void load_pack(const void* p, int64_t at, C (&x)[V]) {
  const Pack<T, V> pack = *reinterpret_cast<const Pack<T, V>*>(static_cast<const T*>(p) + at);
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] = static_cast<C>(to_float(pack.x[v]));
}

// V neighbouring elements of a weight, whatever its dtype. The branch is the same for the whole grid.
template <int V, typename C>
__device__ __forceinline__ void load_weight(const Weight& w, int64_t at, C (&x)[V]) {
  constexpr int wide = V > 4 ? 4 : V;  // fp32 goes 16 bytes at a time
  switch (w.type) {
    case DType::f32:
#pragma unroll
      for (int v = 0; v < V; v += wide) {
        const Pack<float, wide> pack =
            *reinterpret_cast<const Pack<float, wide>*>(static_cast<const float*>(w.p) + at + v);
#pragma unroll
        for (int i = 0; i < wide; ++i) x[v + i] = static_cast<C>(pack.x[i]);
      }
      break;
    case DType::f64:
#pragma unroll
      for (int v = 0; v < V; ++v) x[v] = static_cast<C>(static_cast<const double*>(w.p)[at + v]);
      break;
    case DType::bf16: load_pack<bf16, V>(w.p, at, x); break;
    case DType::f16: load_pack<f16, V>(w.p, at, x); break;
  }
}

template <typename C>
__device__ __forceinline__ C load_weight(const Weight& w, int64_t at) {
  C x[1];
  load_weight<1>(w, at, x);
  return x[0];
}

template <typename C>
__device__ __forceinline__ void store_weight(void* p, DType type, int64_t at, C x) {
  switch (type) {
    case DType::f32: static_cast<float*>(p)[at] = static_cast<float>(x); break;
    case DType::f64: static_cast<double*>(p)[at] = static_cast<double>(x); break;
    case DType::bf16: store_as(static_cast<float>(x), static_cast<bf16*>(p)[at]); break;
    case DType::f16: store_as(static_cast<float>(x), static_cast<f16*>(p)[at]); break;
  }
}

template <int V, typename C>
__device__ __forceinline__ void load_matrix(const Matrix2& m, int64_t at, C (&x)[V]) {
  load_weight<V>(m.w, at, x);
  if (m.minus.p != nullptr) {
    C y[V];
    load_weight<V>(m.minus, at, y);
#pragma unroll
    for (int v = 0; v < V; ++v) x[v] -= y[v];
  }
}

// z from the two products; a is what the activation saw.
template <typename C>
__device__ __forceinline__ C forward_coordinate(const Pass& p, int k, C s0, C s1, C& a) {
  a = p.b.p != nullptr ? s0 + load_weight<C>(p.b, k) : s0;
  C z = act_value(p.act, a) - s1;
  return p.c.p != nullptr ? z - load_weight<C>(p.c, k) : z;
}

template <typename C>
__device__ __forceinline__ void keep_coordinate(const Pass& p, int64_t i, int k, C z, C a) {
  if (p.z == nullptr) return;
  const int kept = p.act == Act::identity ? p.r : 2 * p.r;
  C* to = static_cast<C*>(p.z) + i * kept;
  to[k] = z;
  if (kept > p.r) to[p.r + k] = a;
}

template <typename C>
__device__ __forceinline__ C backward_coordinate(const Pass& p, int64_t i, int k, C gz) {
  if (p.act == Act::identity) return gz;
  return gz * act_slope(p.act, static_cast<const C*>(p.z)[i * 2 * p.r + p.r + k]);
}

}  // namespace fastreft
