// AdamW on one element.
#pragma once
#include "device.cuh"

namespace fastreft {

// What one AdamW element is worked out with, as C. Its direction, m / correction1 / (sqrt(v / correction2) + eps),
// takes one division as scale m / (sqrt(v) + floor).
template <typename C>
struct Adam {
  C rest1, beta2, rest2, scale, floor, lr, decay;

  __device__ __forceinline__ explicit Adam(const StepArgs& a)
      : rest1(static_cast<C>(1 - a.beta1)),
        beta2(static_cast<C>(a.beta2)),
        rest2(static_cast<C>(1 - a.beta2)),
        scale(static_cast<C>(sqrt(a.correction2) / a.correction1)),
        floor(static_cast<C>(sqrt(a.correction2) * a.eps)),
        lr(static_cast<C>(a.lr)),
        decay(static_cast<C>(1 - a.lr * a.weight_decay)) {}

  template <typename D>
  __device__ __forceinline__ explicit Adam(const Adam<D>& a)
      : rest1(static_cast<C>(a.rest1)),
        beta2(static_cast<C>(a.beta2)),
        rest2(static_cast<C>(a.rest2)),
        scale(static_cast<C>(a.scale)),
        floor(static_cast<C>(a.floor)),
        lr(static_cast<C>(a.lr)),
        decay(static_cast<C>(a.decay)) {}

  // The direction U (before the learning rate) that moments m and v give.
  __device__ __forceinline__ C direction(C m, C v) const { return scale * m / (sqrt(v) + floor); }
  // The moments move; returns the direction.
  __device__ __forceinline__ C move(C& m, C& v, C g) const {
    m = m + (g - m) * rest1;
    v = beta2 * v + rest2 * g * g;
    return direction(m, v);
  }
};

}  // namespace fastreft
