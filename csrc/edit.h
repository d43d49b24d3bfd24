// The one primitive of fastreft, as plain structs: no torch here, so that the CPU kernels, the CUDA
// kernels and the host simulation of the CUDA kernels all take the same arguments.
//
//     a = V h + b                       (r)   pre-activation
//     z = act(a) - P h - c              (r)   the edit's coordinates
//     out = h + U^T z                   (d)
//
// Backward, with g = d loss / d out:
//     gz = U g      gp = gz * act'(a)                                             (r)
//     dh = g + V^T gp - P^T gz                                                    (d)
//     dU = sum z g^T   dV = sum gp h^T   dP = -sum gz h^T   db = sum gp   dc = -sum gz
// `tied` says that P is U (LoReFT, ConsReFT): dU then receives dU + dP and dP is not written.
//
// Where act is the identity and both V and P are there, the kernels form D = V - P once and project once.
#pragma once
#include <cstdint>

#include "host_device.h"

namespace fastreft {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// The numbers are part of the op's schema: fastreft/ops/activations.py lists the same ones.
enum class Act : int {
  identity = 0,
  relu,
  gelu,
  gelu_tanh,
  silu,
  sigmoid,
  tanh,
  relu2,
  relu6,
  leaky_relu,
  quick_gelu,
  mish,
  laplace,
  gelu_10,
  hardswish,
  sqrtsoftplus,
  count
};

// A weight matrix (r, d) or vector (r), contiguous; p == nullptr where the method has none.
struct Weight {
  const void* p = nullptr;
  DType type = DType::f32;
};

// `total` rows of d elements, unit stride inside a row. Row i starts at element
// (i / inner) * outer_stride + (i % inner) * inner_stride, so that transposed [S, B, d] states need no copy.
struct Rows {
  void* p = nullptr;
  int64_t inner = 1;
  int64_t outer_stride = 0;
  int64_t inner_stride = 0;
};

struct Weights {
  Weight U;  // (r, d)
  Weight V;  // (r, d) or none
  Weight P;  // (r, d) or none; with `tied` the same pointer as U
  Weight b;  // (r) or none
  Weight c;  // (r) or none
  Act act = Act::identity;
  bool tied = false;
};

struct EditArgs {
  int64_t n = 0;      // rows to edit
  int64_t total = 0;  // rows there are
  int64_t d = 0, r = 0;
  DType type = DType::f32;         // of h and out
  Rows h;                          // [total, d]
  Rows out;                        // [total, d]; with `index` h's own memory (in place), or other memory (CUDA only)
                                   // into which the rows that are not listed are copied
  const int64_t* index = nullptr;  // [n] rows to edit, -1 = skip; nullptr = every row, n == total
  Weights w;
  void* saved = nullptr;   // [n, d] of `type`: the rows before the edit, or none; only with `index`
  void* z = nullptr;       // [n, k] fp32 (fp64 where type is f64): z, then a where act is not the
                           // identity (k = r or 2 r), or none
  void* stream = nullptr;  // CUDA only
};

struct EditGradArgs {
  int64_t n = 0, total = 0, d = 0, r = 0;
  DType type = DType::f32;         // of g, h and dh
  Rows g;                          // [total, d]
  Rows dh;                         // [total, d], or p == nullptr where not wanted; with `index` as EditArgs::out to h
  const int64_t* index = nullptr;  // as in EditArgs
  Rows h;                          // [n, d]: the rows before the edit
  const void* z = nullptr;         // [n, k] as EditArgs::z left it
  Weights w;
  void *dU = nullptr, *dV = nullptr, *dP = nullptr;  // (r, d), each of its weight's dtype, or none
  void *db = nullptr, *dc = nullptr;                 // (r), likewise
  void* scratch = nullptr;                           // device memory for partial sums, CUDA only
  void* stream = nullptr;
};

// How a pooled adapter comes to its coordinates, from its r vectors of A, or 2 r of them.
enum class Form : int32_t {
  constant = 0,  // z = act(b) - c
  together = 1,  // z = act(A h + b) - c
  apart = 2,     // z = act(V h + b) - P h - c, V the first r vectors of A and P the r behind them
};

// Many adapters' weights in memory that they share, for inference.
struct Pool {
  Weight A, U;                     // (vectors, d)
  Weight b, c;                     // (vectors), or none
  const int32_t* table = nullptr;  // [adapters, 4]: an adapter's first vector, its r (0: it edits nothing), Act, Form
  int64_t vectors = 0, adapters = 0;
};

struct PooledArgs {
  int64_t n = 0;      // rows to edit
  int64_t total = 0;  // rows there are
  int64_t d = 0;
  DType type = DType::f32;           // of h
  Rows h;                            // [total, d], edited in place
  const int64_t* index = nullptr;    // [n] rows, -1 = skip
  const int64_t* adapter = nullptr;  // [n] which adapter of the pool edits the row, -1 = none
  Pool pool;
  int64_t most_r = 0;      // no adapter's r is larger
  void* stream = nullptr;  // CUDA only
};

// How many values a row keeps for the backward.
inline int64_t kept_per_row(Act act, int64_t r) { return act == Act::identity ? r : 2 * r; }

// One matrix of a retraction: (r, d), contiguous, r <= d.
struct Matrix {
  void* p = nullptr;
  int64_t r = 0, d = 0;
  DType type = DType::f32;
};

// One parameter of an optimizer step. g has the parameter's dtype; m and v are fp32 (fp64 where it is f64). Everything
// contiguous. `orthonormal`: the parameter is an R: its gradient is projected to the tangent space, no weight decay,
// and the result retracted
//     A = G R^T;  G <- G - 1/2 (A + A^T) R;  Adam;  Y = R - lr U;  Y Y^T = L L^T;  R = L^-1 Y
// else a plain AdamW step (r * d elements, any shape).
struct StepItem {
  Matrix param;
  const void* g = nullptr;
  void *m = nullptr, *v = nullptr;
  const float* age = nullptr;  // t, in the parameter's memory; nullptr: StepArgs has the corrections
  bool orthonormal = false;
};

struct StepArgs {
  double lr = 0, beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0;
  double correction1 = 1, correction2 = 1;  // 1 - beta^t
  Weight live_lr;         // fp32 or fp64, in the parameters' memory: what lr is multiplied by; or none
  double r_lr_scale = 1;  // what the lr of orthonormal parameters is multiplied by
};

// A product rounded by itself: nvcc may make one instruction, with one rounding, of a product and what is added to it.
FASTREFT_HOST_DEVICE inline double rounded_product(double a, double b) {
#ifdef __CUDA_ARCH__
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// 1 - beta^t by multiplications alone: the same bits on every device.
FASTREFT_HOST_DEVICE inline double bias_correction(double beta, int64_t t) {
  double power = 1;
  for (; t > 0; t >>= 1, beta = rounded_product(beta, beta))
    if (t & 1) power = rounded_product(power, beta);
  return 1 - power;
}

// The step of one item: what lies in memory, which a captured graph reads anew at each replay, in its place.
FASTREFT_HOST_DEVICE inline StepArgs step_of(StepArgs step, const StepItem& item) {
  if (item.orthonormal) step.lr *= step.r_lr_scale;
  if (step.live_lr.p != nullptr)
    step.lr *= step.live_lr.type == DType::f64 ? *static_cast<const double*>(step.live_lr.p)
                                               : static_cast<double>(*static_cast<const float*>(step.live_lr.p));
  if (item.age != nullptr) {
    const int64_t t = static_cast<int64_t>(*item.age);
    step.correction1 = bias_correction(step.beta1, t);
    step.correction2 = bias_correction(step.beta2, t);
  }
  return step;
}

}  // namespace fastreft
