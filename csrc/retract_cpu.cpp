// Keeping R orthonormal, and the optimizer step that does: one task a matrix, everything between load and store in
// fp64.
//
// Retraction: S = R R^T = L L^T, R <- L^-1 R. One round leaves max |R R^T - I| at about fp64's rounding times the
// condition number of S; where a pivot says that it is large, a second round repairs the first. Rows that are dependent
// to fp64's precision (a zero row, a repeated row) take a Householder QR with a positive diagonal instead.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "cpu_support.h"

namespace fastreft {
namespace {

using Doubles = std::vector<double>;

bool finite(const double* x, int64_t count) {
  double poison = 0;  // 0 as long as everything is finite
  for (int64_t i = 0; i < count; ++i) poison += x[i] * 0.0;
  return poison == 0;
}

// S -> its Cholesky factor L in the lower triangle. Returns the smallest pivot over the largest diagonal entry, 0 or
// less where it broke down.
double cholesky(Doubles& S, int64_t r) {
  double largest = 0, smallest = INFINITY;
  for (int64_t i = 0; i < r; ++i) largest = std::max(largest, S[i * r + i]);
  for (int64_t j = 0; j < r; ++j) {
    double pivot = S[j * r + j];
    for (int64_t q = 0; q < j; ++q) pivot -= S[j * r + q] * S[j * r + q];
    smallest = std::min(smallest, pivot / largest);
    if (!(pivot > 1e-14 * largest)) return 0;
    const double root = std::sqrt(pivot);
    S[j * r + j] = root;
    for (int64_t i = j + 1; i < r; ++i) {
      double sum = S[i * r + j];
      for (int64_t q = 0; q < j; ++q) sum -= S[i * r + q] * S[j * r + q];
      S[i * r + j] = sum / root;
    }
  }
  return smallest;
}

// The inverse of a lower triangular L; zeros above the diagonal.
Doubles inverse(const Doubles& L, int64_t r) {
  Doubles X(r * r, 0.0);
  for (int64_t j = 0; j < r; ++j) {
    X[j * r + j] = 1 / L[j * r + j];
    for (int64_t i = j + 1; i < r; ++i) {
      double sum = 0;
      for (int64_t q = j; q < i; ++q) sum -= L[i * r + q] * X[q * r + j];
      X[i * r + j] = sum / L[i * r + i];
    }
  }
  return X;
}

// Y (r, d) -> the rows of Q of the Householder QR of Y^T, diagonal positive; defined for any finite Y with r <= d.
void householder(Doubles& Y, int64_t r, int64_t d) {
  Doubles tau(r, 0.0), sign(r, 1.0);
  for (int64_t j = 0; j < r; ++j) {  // row j holds the reflector's tail from column j + 1 on
    double* y = &Y[j * d];
    for (int64_t q = 0; q < j; ++q) {
      const double* v = &Y[q * d];
      double dot = y[q];
      for (int64_t c = q + 1; c < d; ++c) dot += v[c] * y[c];
      y[q] -= tau[q] * dot;
      for (int64_t c = q + 1; c < d; ++c) y[c] -= tau[q] * dot * v[c];
    }
    double norm = 0;
    for (int64_t c = j; c < d; ++c) norm += y[c] * y[c];
    norm = std::sqrt(norm);
    double tail = 0;
    for (int64_t c = j + 1; c < d; ++c) tail += y[c] * y[c];
    if (tail == 0) {  // already on its axis: no reflection
      sign[j] = y[j] < 0 ? -1 : 1;
      continue;
    }
    const double beta = y[j] > 0 ? -norm : norm, scale = 1 / (y[j] - beta);
    tau[j] = (beta - y[j]) / beta;
    for (int64_t c = j + 1; c < d; ++c) y[c] *= scale;
    sign[j] = beta < 0 ? -1 : 1;
  }
  Doubles Q(r * d, 0.0);
  for (int64_t j = 0; j < r; ++j) {
    double* x = &Q[j * d];
    x[j] = sign[j];
    for (int64_t q = std::min(j, r - 1); q >= 0; --q) {
      const double* v = &Y[q * d];
      double dot = x[q];
      for (int64_t c = q + 1; c < d; ++c) dot += v[c] * x[c];
      x[q] -= tau[q] * dot;
      for (int64_t c = q + 1; c < d; ++c) x[c] -= tau[q] * dot * v[c];
    }
  }
  Y.swap(Q);
}

// Y -> orthonormal rows by Cholesky; false, and Y as it was, where a pivot is not positive.
bool orthonormalise(Doubles& Y, int64_t r, int64_t d, const CpuKernels& k) {
  for (int round = 0; round < 2; ++round) {
    Doubles S(r * r), out(r * d);
    k.gram(Y.data(), Y.data(), r, d, true, S.data());
    const double pivot = cholesky(S, r);
    if (!(pivot > 0)) return false;
    k.combine(inverse(S, r).data(), true, Y.data(), r, d, out.data());
    Y.swap(out);
    if (pivot > 1e-3) break;
  }
  return true;
}

Doubles load(const void* p, const Matrix& shape, const CpuKernels& k) {
  Doubles x(shape.r * shape.d);
  k.widen(DType::f64, x.data(), p, shape.type, shape.r * shape.d, 1, false);
  return x;
}

bool finite(const void* p, const Matrix& shape, const CpuKernels& k) {
  return finite(load(p, shape, k).data(), shape.r * shape.d);
}

// The first i for which f(i) is false, or -1; f runs in parallel.
template <typename F>
int64_t first_failure(int64_t count, int64_t grain, ParallelFor run, const F& f) {
  std::atomic<int64_t> first{count};
  parallel(run, count, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      if (!f(i))
        for (int64_t seen = first; i < seen && !first.compare_exchange_weak(seen, i);) {}
  });
  return first < count ? first.load() : -1;
}

}  // namespace

int64_t retract_cpu(const Matrix* matrices, int64_t count, ParallelFor run) {
  const CpuKernels& k = cpu_kernels();
  const int64_t bad = first_failure(count, 1, run, [&](int64_t i) { return finite(matrices[i].p, matrices[i], k); });
  if (bad >= 0) return bad;
  parallel(run, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Matrix& M = matrices[i];
      Doubles Y = load(M.p, M, k);
      if (!orthonormalise(Y, M.r, M.d, k)) householder(Y, M.r, M.d);
      k.narrow(DType::f64, M.p, M.type, Y.data(), M.r * M.d);
    }
  });
  return -1;
}

int64_t step_cpu(const StepItem* items, int64_t count, const StepArgs& step, ParallelFor run) {
  const CpuKernels& k = cpu_kernels();
  const int64_t bad = first_failure(count, 1, run, [&](int64_t i) { return finite(items[i].g, items[i].param, k); });
  if (bad >= 0) return bad;
  return first_failure(count, 1, run, [&](int64_t i) {
    const StepItem& item = items[i];
    const Matrix& M = item.param;
    const int64_t r = M.r, d = M.d, size = r * d;
    Doubles G = load(item.g, M, k), p = load(M.p, M, k), u(size);
    if (item.orthonormal) {  // the part of the gradient along the manifold: G - 1/2 (A + A^T) R, A = G R^T
      Doubles A(r * r), normal(size);
      k.gram(G.data(), p.data(), r, d, false, A.data());
      for (int64_t a = 0; a < r; ++a)
        for (int64_t b = 0; b <= a; ++b) A[a * r + b] = A[b * r + a] = -0.5 * (A[a * r + b] + A[b * r + a]);
      k.combine(A.data(), false, p.data(), r, d, normal.data());
      k.add(DType::f64, G.data(), normal.data(), size);
    }
    k.adam(M.type, G.data(), item.m, item.v, size, step, u.data());
    if (!item.orthonormal) {
      const double keep = 1 - step.lr * step.weight_decay;
      for (int64_t q = 0; q < size; ++q) p[q] = p[q] * keep - step.lr * u[q];
      k.narrow(DType::f64, M.p, M.type, p.data(), size);
      return finite(p.data(), size);
    }
    // A step so long that the rows become dependent is halved until they are not.
    Doubles Y(size);
    for (double lr = step.lr; lr > step.lr * 1e-6; lr *= 0.5) {
      for (int64_t q = 0; q < size; ++q) Y[q] = p[q] - lr * u[q];
      if (!finite(Y.data(), size)) return false;
      if (orthonormalise(Y, r, d, k)) {
        k.narrow(DType::f64, M.p, M.type, Y.data(), size);
        return true;
      }
    }
    return false;
  });
}

}  // namespace fastreft
