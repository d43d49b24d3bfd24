// The elementwise activations of Transformers' ACT2FN and their slopes, on the r coordinates of a row: few values,
// so plain fp64 maths.
#pragma once
#include <cmath>

#include "../edit.h"

namespace fastreft {

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
inline double softplus(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }
inline double normal_cdf(double x) { return 0.5 * (1 + std::erf(x * 0.70710678118654752440)); }
inline double normal_pdf(double x) { return 0.39894228040143267794 * std::exp(-0.5 * x * x); }

inline double activate(Act act, double x) {
  switch (act) {
    case Act::identity: return x;
    case Act::relu: return x > 0 ? x : 0;
    case Act::gelu: return x * normal_cdf(x);
    case Act::gelu_tanh: return 0.5 * x * (1 + std::tanh(0.79788456080286535588 * (x + 0.044715 * x * x * x)));
    case Act::silu: return x * sigmoid(x);
    case Act::sigmoid: return sigmoid(x);
    case Act::tanh: return std::tanh(x);
    case Act::relu2: return x > 0 ? x * x : 0;
    case Act::relu6: return x < 0 ? 0 : x > 6 ? 6 : x;
    case Act::leaky_relu: return x > 0 ? x : 0.01 * x;
    case Act::quick_gelu: return x * sigmoid(1.702 * x);
    case Act::mish: return x * std::tanh(softplus(x));
    case Act::laplace: return 0.5 * (1 + std::erf((x - 0.707107) / (0.282095 * 1.41421356237309504880)));
    case Act::gelu_10: return std::fmin(x * normal_cdf(x), 10);  // gelu never comes near -10
    case Act::hardswish: return x <= -3 ? 0 : x >= 3 ? x : x * (x + 3) / 6;
    case Act::sqrtsoftplus: return std::sqrt(softplus(x));
    case Act::count: break;
  }
  return x;
}

inline double activation_slope(Act act, double x) {
  switch (act) {
    case Act::identity: return 1;
    case Act::relu: return x > 0;
    case Act::gelu: return normal_cdf(x) + x * normal_pdf(x);
    case Act::gelu_tanh: {
      const double k = 0.79788456080286535588, t = std::tanh(k * (x + 0.044715 * x * x * x));
      return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * k * (1 + 3 * 0.044715 * x * x);
    }
    case Act::silu: {
      const double s = sigmoid(x);
      return s * (1 + x * (1 - s));
    }
    case Act::sigmoid: {
      const double s = sigmoid(x);
      return s * (1 - s);
    }
    case Act::tanh: {
      const double t = std::tanh(x);
      return 1 - t * t;
    }
    case Act::relu2: return x > 0 ? 2 * x : 0;
    case Act::relu6: return x > 0 && x < 6;
    case Act::leaky_relu: return x > 0 ? 1 : 0.01;
    case Act::quick_gelu: {
      const double s = sigmoid(1.702 * x);
      return s * (1 + 1.702 * x * (1 - s));
    }
    case Act::mish: {
      const double t = std::tanh(softplus(x));
      return t + x * (1 - t * t) * sigmoid(x);
    }
    case Act::laplace: {
      const double s = 0.282095, y = (x - 0.707107) / (s * 1.41421356237309504880);
      return 0.56418958354775628695 * std::exp(-y * y) / (s * 1.41421356237309504880);
    }
    case Act::gelu_10: return x * normal_cdf(x) > 10 ? 0 : normal_cdf(x) + x * normal_pdf(x);
    case Act::hardswish: return x <= -3 ? 0 : x >= 3 ? 1 : (2 * x + 3) / 6;
    case Act::sqrtsoftplus: return 0.5 * sigmoid(x) / std::sqrt(softplus(x));
    case Act::count: break;
  }
  return 1;
}

}  // namespace fastreft
