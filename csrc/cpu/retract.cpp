// Keeping R orthonormal, and the optimizer step that does: one task a matrix, everything between load and store in
// fp64.
//
// Retraction: S = R R^T = L L^T, R <- L^-1 R. One round leaves max |R R^T - I| at about fp64's rounding times the
// condition number of S; where a pivot says that it is large, a second round repairs the first. Rows that are dependent
// to fp64's precision (a zero row, a repeated row) take a Householder QR with a positive diagonal instead.
#include <algorithm>
#include <atomic>
#include <cmath>

#include "support.h"

namespace fastreft {
namespace {

using Doubles = std::vector<double>;

// A matrix in fp64, cut into blocks of columns that stay in a core's cache while they pass through a step; block b is
// (r, columns(b)), contiguous.
struct Blocked {
  int64_t r = 0, d = 0, width = 0;
  Doubles data;

  void shape(const Matrix& M) {
    r = M.r;
    d = M.d;
    width = std::max<int64_t>(256, 8192 / r / 8 * 8);
    data.resize(r * d);
  }
  int64_t count() const { return (d + width - 1) / width; }
  int64_t columns(int64_t b) const { return std::min(width, d - b * width); }
  double* at(int64_t b) { return data.data() + b * width * r; }
};

// A thread's buffers, kept from one matrix to the next: fresh ones of this size would be mapped and faulted in each
// time.
struct Workspace {
  Blocked Y;
  Doubles value, gradient, direction, other;  // one block each
  Doubles S, part;                            // (r, r)
};

// The columns of block b of a stored matrix, as fp64, and back.
void load_block(double* to, const void* p, const Matrix& M, int64_t from, int64_t columns, const CpuKernels& k) {
  for (int64_t j = 0; j < M.r; ++j)
    k.widen(DType::f64, to + j * columns, static_cast<const char*>(p) + (j * M.d + from) * size_of(M.type), M.type,
            columns, 1, false);
}
void store_block(const Matrix& M, const double* x, int64_t from, int64_t columns, const CpuKernels& k) {
  for (int64_t j = 0; j < M.r; ++j)
    k.narrow(DType::f64, static_cast<char*>(M.p) + (j * M.d + from) * size_of(M.type), M.type, x + j * columns,
             columns);
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

// S += X X^T of one block, lower triangle; `part` is scratch.
void add_gram(Doubles& S, Doubles& part, const double* X, int64_t r, int64_t columns, const CpuKernels& k) {
  part.resize(r * r);
  k.gram(DType::f64, X, X, r, columns, true, part.data());
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j <= i; ++j) S[i * r + j] += part[i * r + j];
}

enum class Outcome { done, dependent, not_finite };

// M <- the orthonormal rows of own.Y, whose Gram is own.S. M is left as it was where that cannot be done by Cholesky.
Outcome orthonormalise(const Matrix& M, Workspace& own, const CpuKernels& k) {
  Blocked& Y = own.Y;
  const int64_t r = Y.r;
  for (bool last = false; !last;) {
    for (int64_t i = 0; i < r; ++i)
      if (!std::isfinite(own.S[i * r + i])) return Outcome::not_finite;
    const double pivot = cholesky(own.S, r);
    if (!(pivot > 0)) return Outcome::dependent;
    last = pivot > 1e-3;
    const Doubles L = inverse(own.S, r);
    std::fill(own.S.begin(), own.S.end(), 0.0);
    for (int64_t b = 0; b < Y.count(); ++b) {
      const int64_t columns = Y.columns(b);
      own.other.resize(r * columns);
      k.combine(L.data(), true, Y.at(b), r, columns, own.other.data());
      if (last) {
        store_block(M, own.other.data(), b * Y.width, columns, k);
      } else {
        std::copy(own.other.begin(), own.other.end(), Y.at(b));
        add_gram(own.S, own.part, Y.at(b), r, columns, k);
      }
    }
  }
  return Outcome::done;
}

// The first i for which f(i, workspace) is false, or -1; f runs in parallel, where `size` elements in all are worth it.
template <typename F>
int64_t first_failure(int64_t count, int64_t size, ParallelFor run, const F& f) {
  std::atomic<int64_t> first{count};
  const int64_t worth_a_thread = 1 << 14;
  parallel(run, count, std::max<int64_t>(1, count * worth_a_thread / std::max<int64_t>(1, size)),
           [&](int64_t begin, int64_t end) {
             Workspace own;
             for (int64_t i = begin; i < end; ++i)
               if (!f(i, own))
                 for (int64_t seen = first; i < seen && !first.compare_exchange_weak(seen, i);) {}
           });
  return first < count ? first.load() : -1;
}

// A plain AdamW step; false, and the parameter as it was from there on, where the result would not be finite.
bool step_plain(const StepItem& item, const StepArgs& step, Workspace& own, const CpuKernels& k) {
  const Matrix& M = item.param;
  const int64_t size = M.r * M.d, piece = 4096, e = size_of(M.type), kept = size_of(compute_type(M.type));
  const double keep = 1 - step.lr * step.weight_decay;
  for (Doubles* buffer : {&own.value, &own.gradient, &own.direction}) buffer->resize(piece);
  double *p = own.value.data(), *g = own.gradient.data(), *u = own.direction.data();
  for (int64_t from = 0; from < size; from += piece) {
    const int64_t count = std::min(piece, size - from);
    char* at = static_cast<char*>(M.p) + from * e;
    k.widen(DType::f64, p, at, M.type, count, 1, false);
    k.widen(DType::f64, g, static_cast<const char*>(item.g) + from * e, M.type, count, 1, false);
    k.adam(M.type, g, static_cast<char*>(item.m) + from * kept, static_cast<char*>(item.v) + from * kept, count, step,
           u);
    for (int64_t q = 0; q < count; ++q) p[q] *= keep;
    k.move(p, p, -step.lr, u, count);
    if (!k.finite(DType::f64, p, count)) return false;
    k.narrow(DType::f64, at, M.type, p, count);
  }
  return true;
}

// A <- -1/2 (G R^T + R G^T); false where it is not finite, which it is not if G or R is not.
bool normal_part(const StepItem& item, Doubles& A, const CpuKernels& k) {
  const int64_t r = item.param.r;
  A.resize(r * r);
  k.gram(item.param.type, item.g, item.param.p, r, item.param.d, false, A.data());
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j <= i; ++j) A[i * r + j] = A[j * r + i] = -0.5 * (A[i * r + j] + A[j * r + i]);
  return k.finite(DType::f64, A.data(), r * r);
}

// A step of an R; false, and R as it was, where the result would not be finite.
bool step_orthonormal(const StepItem& item, const Doubles& A, const StepArgs& step, Workspace& own,
                      const CpuKernels& k) {
  const Matrix& M = item.param;
  const int64_t r = M.r, d = M.d, kept = size_of(compute_type(M.type));
  Blocked& Y = own.Y;
  Y.shape(M);
  for (Doubles* buffer : {&own.value, &own.gradient, &own.direction, &own.other}) buffer->resize(r * Y.width);
  double *R = own.value.data(), *G = own.gradient.data(), *u = own.direction.data();

  // The part of the gradient along the manifold, G - 1/2 (A + A^T) R, through Adam; then Y = R - lr u.
  own.S.assign(r * r, 0.0);
  for (int64_t b = 0; b < Y.count(); ++b) {
    const int64_t columns = Y.columns(b), from = b * Y.width;
    load_block(G, item.g, M, from, columns, k);
    load_block(R, M.p, M, from, columns, k);
    own.other.resize(r * columns);
    k.combine(A.data(), false, R, r, columns, own.other.data());
    k.add(DType::f64, G, own.other.data(), r * columns);
    for (int64_t j = 0; j < r; ++j) {
      const int64_t at = (j * d + from) * kept;
      k.adam(M.type, G + j * columns, static_cast<char*>(item.m) + at, static_cast<char*>(item.v) + at, columns, step,
             u + j * columns);
    }
    double* y = Y.at(b);
    k.move(y, R, -step.lr, u, r * columns);
    add_gram(own.S, own.part, y, r, columns, k);
  }
  // A step so long that the rows become dependent is halved, Y <- (Y + R) / 2, until they are not.
  for (int attempt = 0; attempt < 20; ++attempt) {
    const Outcome outcome = orthonormalise(M, own, k);
    if (outcome != Outcome::dependent) return outcome == Outcome::done;
    own.S.assign(r * r, 0.0);
    for (int64_t b = 0; b < Y.count(); ++b) {
      double* y = Y.at(b);
      load_block(R, M.p, M, b * Y.width, Y.columns(b), k);
      for (int64_t q = 0; q < r * Y.columns(b); ++q) y[q] = 0.5 * (y[q] + R[q]);
      add_gram(own.S, own.part, y, r, Y.columns(b), k);
    }
  }
  return false;
}

}  // namespace

int64_t retract_cpu(const Matrix* matrices, int64_t count, ParallelFor run) {
  const CpuKernels& k = cpu_kernels();
  int64_t size = 0;
  for (int64_t i = 0; i < count; ++i) size += matrices[i].r * matrices[i].d;
  const int64_t bad = first_failure(count, size, run, [&](int64_t i, Workspace&) {
    return k.finite(matrices[i].type, matrices[i].p, matrices[i].r * matrices[i].d);
  });
  if (bad >= 0) return bad;
  return first_failure(count, size, run, [&](int64_t i, Workspace& own) {
    const Matrix& M = matrices[i];
    own.Y.shape(M);
    own.S.assign(M.r * M.r, 0.0);
    for (int64_t b = 0; b < own.Y.count(); ++b) {
      load_block(own.Y.at(b), M.p, M, b * own.Y.width, own.Y.columns(b), k);
      add_gram(own.S, own.part, own.Y.at(b), M.r, own.Y.columns(b), k);
    }
    if (orthonormalise(M, own, k) == Outcome::done) return true;
    own.other.resize(M.r * M.d);
    load_block(own.other.data(), M.p, M, 0, M.d, k);
    householder(own.other, M.r, M.d);
    store_block(M, own.other.data(), 0, M.d, k);
    return true;
  });
}

int64_t step_cpu(const StepItem* items, int64_t count, const StepArgs& step, ParallelFor run) {
  const CpuKernels& k = cpu_kernels();
  int64_t size = 0;
  for (int64_t i = 0; i < count; ++i) size += items[i].param.r * items[i].param.d;
  // Every gradient is looked at before any parameter changes; for an R the look is the first half of its projection.
  std::vector<Doubles> normal(count);
  const int64_t bad = first_failure(count, size, run, [&](int64_t i, Workspace&) {
    const StepItem& item = items[i];
    return item.orthonormal ? normal_part(item, normal[i], k)
                            : k.finite(item.param.type, item.g, item.param.r * item.param.d);
  });
  if (bad >= 0) return bad;
  return first_failure(count, size, run, [&](int64_t i, Workspace& own) {
    const StepArgs its = step_of(step, items[i]);
    return items[i].orthonormal ? step_orthonormal(items[i], normal[i], its, own, k)
                                : step_plain(items[i], its, own, k);
  });
}

}  // namespace fastreft
