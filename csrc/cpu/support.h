// Small things the CPU drivers share: scratch memory, row addresses, packed weights, a parallel loop over a lambda.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "../kernels.h"
#include "loops.h"

namespace fastreft {

struct FreeDeleter {
  void operator()(void* p) const { std::free(p); }
};
using Scratch = std::unique_ptr<char, FreeDeleter>;

inline Scratch scratch(int64_t bytes) {
  void* p = std::aligned_alloc(64, (static_cast<size_t>(bytes) + 64) / 64 * 64);
  if (!p) throw std::bad_alloc();
  return Scratch(static_cast<char*>(p));
}

// Memory for one call at a time on this thread, kept for the next one up to a size. Given back and taken anew each
// time, it would lie above the results in the heap, and freeing it would make the heap shrink and every result fault in
// again.
inline char* kept_scratch(int64_t bytes, Scratch& own) {
  constexpr int64_t largest = int64_t{16} << 20;
  thread_local Scratch kept;
  thread_local int64_t size = 0;
  if (bytes > largest) {
    own = scratch(bytes);
    return own.get();
  }
  if (bytes > size) {
    kept = scratch(bytes);
    size = bytes;
  }
  return kept.get();
}

inline int64_t size_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }
inline DType compute_type(DType type) { return type == DType::f64 ? DType::f64 : DType::f32; }

inline char* row_address(const Rows& rows, int64_t i, int64_t element) {
  const int64_t at =
      rows.inner == 1 ? i * rows.outer_stride : i / rows.inner * rows.outer_stride + i % rows.inner * rows.inner_stride;
  return static_cast<char*>(rows.p) + at * element;
}

template <typename F>
void parallel(ParallelFor run, int64_t count, int64_t grain, const F& f) {
  run(
      0, count, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// About how many multiply-adds are worth waking another thread for.
constexpr int64_t kGrainOperations = 200000;

// Weights in the compute type, rows padded to whole vectors. A is what h is projected on:
//   identity act: V - P, or V, or -P;   else V above -P, as many as there are.
// Forward: project on A, expand with U. Backward: project on U, expand with A. Where the processor multiplies bf16
// pairs, both are packed for it.
struct Packed {
  DType compute;
  int64_t r, d, padded_d;
  int64_t projections = 0;  // rows of A: 0, r or 2 r
  bool has_v = false, has_p = false, linear = false;
  Scratch b, c;

  Packed(const Weights& w, DType type, int64_t r, int64_t d, const CpuKernels& kernels, bool backward);

  // Of m rows: out (m, ld) = rows . weights; dst = src + coef (m, ld) . weights; acc (k, padded d) += coef^T rows.
  void project(const void* const* rows, int m, void* out, int64_t ld) const;
  void expand(const void* const* src, void* const* dst, int m, const void* coef, int64_t ld, bool past_caches) const;
  void accumulate(const void* const* rows, int m, const void* coef, int64_t ld, int64_t k, void* acc) const;

 private:
  const CpuKernels& kernels;
  const PairKernels* pairs;
  DType type;
  int64_t project_k = 0, expand_k = 0;
  const void *project_weights = nullptr, *expand_weights = nullptr;
  Scratch A, U, packed;
};

}  // namespace fastreft
