// The sixteen activations of `Act` and their slopes, in the type sums run in. At a kink the slope is torch's.
#pragma once
#include <math.h>

#include "device.cuh"

namespace fastreft {

template <typename C>
__device__ __forceinline__ C sigmoid(C x) {
  return C(1) / (C(1) + exp(-x));
}
template <typename C>
__device__ __forceinline__ C normal_cdf(C x) {
  return C(0.5) * (C(1) + erf(x * C(0.70710678118654752440)));
}
template <typename C>
__device__ __forceinline__ C gelu_tanh_inner(C x) {
  return C(0.79788456080286535588) * (x + C(0.044715) * x * x * x);
}
// torch's softplus: linear past 20.
template <typename C>
__device__ __forceinline__ C softplus(C x) {
  return x > C(20) ? x : log1p(exp(x));
}

template <typename C>
__device__ __forceinline__ C act_value(Act act, C x) {
  switch (act) {
    case Act::relu: return x < C(0) ? C(0) : x;  // written so that NaN stays NaN
    case Act::gelu: return x * normal_cdf(x);
    case Act::gelu_tanh: return C(0.5) * x * (C(1) + tanh(gelu_tanh_inner(x)));
    case Act::silu: return x * sigmoid(x);
    case Act::sigmoid: return sigmoid(x);
    case Act::tanh: return tanh(x);
    case Act::relu2: return x < C(0) ? C(0) : x * x;
    case Act::relu6: return x < C(0) ? C(0) : (x > C(6) ? C(6) : x);
    case Act::leaky_relu: return x > C(0) ? x : C(0.01) * x;
    case Act::quick_gelu: return x * sigmoid(C(1.702) * x);
    case Act::mish: return x * tanh(softplus(x));
    case Act::laplace: return C(0.5) * (C(1) + erf((x - C(0.707107)) / C(0.39894257487763823)));
    case Act::gelu_10: {
      const C y = x * normal_cdf(x);
      return y > C(10) ? C(10) : y;
    }
    case Act::hardswish: return x <= C(-3) ? C(0) : (x < C(3) ? x * (x + C(3)) / C(6) : x);
    case Act::sqrtsoftplus: return sqrt(softplus(x));
    default: return x;
  }
}

template <typename C>
__device__ __forceinline__ C act_slope(Act act, C x) {
  const C density = C(0.39894228040143267794) * exp(C(-0.5) * x * x);
  switch (act) {
    case Act::relu: return x > C(0) ? C(1) : C(0);
    case Act::gelu: return normal_cdf(x) + x * density;
    case Act::gelu_tanh: {
      const C t = tanh(gelu_tanh_inner(x));
      const C inner = C(0.79788456080286535588) * (C(1) + C(3 * 0.044715) * x * x);
      return C(0.5) * (C(1) + t) + C(0.5) * x * (C(1) - t * t) * inner;
    }
    case Act::silu: {
      const C s = sigmoid(x);
      return s * (C(1) + x * (C(1) - s));
    }
    case Act::sigmoid: {
      const C s = sigmoid(x);
      return s * (C(1) - s);
    }
    case Act::tanh: {
      const C t = tanh(x);
      return C(1) - t * t;
    }
    case Act::relu2: return x > C(0) ? C(2) * x : C(0);
    case Act::relu6: return x > C(0) && x < C(6) ? C(1) : C(0);
    case Act::leaky_relu: return x > C(0) ? C(1) : C(0.01);
    case Act::quick_gelu: {
      const C s = sigmoid(C(1.702) * x);
      return s * (C(1) + C(1.702) * x * (C(1) - s));
    }
    case Act::mish: {
      const C t = tanh(softplus(x));
      return t + x * (C(1) - t * t) * sigmoid(x);
    }
    case Act::laplace: {
      const C u = (x - C(0.707107)) / C(0.39894257487763823);
      return C(0.56418958354775628695) / C(0.39894257487763823) * exp(-u * u);
    }
    case Act::gelu_10: return x * normal_cdf(x) > C(10) ? C(0) : normal_cdf(x) + x * density;
    case Act::hardswish: return x <= C(-3) ? C(0) : (x < C(3) ? x / C(3) + C(0.5) : C(1));
    case Act::sqrtsoftplus: {
      const C root = sqrt(softplus(x));
      return root > C(0) ? sigmoid(x) / (C(2) * root) : C(0);
    }
    default: return C(1);
  }
}

}  // namespace fastreft
