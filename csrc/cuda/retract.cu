// Retraction, and AdamW with retraction, of a list of matrices in one launch.
//
// A cluster works on one item at a time: an orthonormal matrix has a cluster to itself (its CTAs split the columns), a
// plain parameter is cut into pieces of kPiece elements. The list travels as a kernel parameter: nothing is copied to
// the device beforehand, and a captured graph holds it.
//
// The step of an orthonormal R (r, d), see retract_common.cuh for the pieces:
//     A = G R^T; g = G - 1/2 (A + A^T) R; Adam; Y = R - lr U; S = Y Y^T = L L^T; R = L^-1 Y; polish where S was skewed
// Y lies in R's own memory, or in scratch where R has 16 bits.
#include <vector>

#include "../kernels.h"
#include "launch.h"
#include "retract_common.cuh"

namespace fastreft {
namespace {

constexpr int kItems = 128;       // a launch's list: 11 KB of kernel parameters, of 32 there are from CUDA 12.1 on
constexpr int64_t kPiece = 8192;  // elements of a plain parameter a CTA takes
constexpr int64_t kAlign = 256;
constexpr int kShortenings = 8;  // halvings of a step before Gram-Schmidt

struct List {
  StepItem item[kItems];
  int first[kItems + 1];    // first cluster of each item
  int place[kItems];        // of each item among the caller's
  int64_t scratch[kItems];  // bytes into `scratch`, or -1
  int count = 0;
  int cluster = 1, terms = 32;
  int64_t shared_entries = 0;  // r x r doubles that shared memory has room for, each of S and part
  int64_t chunk_bytes = 0;
  char* scratch_base = nullptr;
  int* status = nullptr;  // of all the caller's items
  StepArgs step;
};

template <typename C>
__device__ __forceinline__ double least_pivot() {
  return sizeof(C) == 8 ? 1e-13 : 1e-6;
}

// What one AdamW element reads besides its parameter.
template <typename C>
struct Moments {
  C g, m, v;
};

// The direction U (before the learning rate) that moments m and v give.
template <typename C>
__device__ __forceinline__ C adam_direction(const StepArgs& a, const C m, const C v) {
  const C root = sqrt(v) / static_cast<C>(sqrt(a.correction2)) + static_cast<C>(a.eps);
  return m / static_cast<C>(a.correction1) / root;
}
// The moments of one element move; returns its direction.
template <typename C>
__device__ __forceinline__ C adam(const StepArgs& a, const StepItem& item, int64_t e, const Moments<C>& old, C g) {
  const C m = old.m + (g - old.m) * static_cast<C>(1 - a.beta1);
  const C v = static_cast<C>(a.beta2) * old.v + static_cast<C>(1 - a.beta2) * g * g;
  static_cast<C*>(item.m)[e] = m;
  static_cast<C*>(item.v)[e] = v;
  return adam_direction(a, m, v);
}
template <typename C>
__device__ __forceinline__ Moments<C> load_moments(const StepItem& item, int64_t e) {
  return {load_weight<C>(Weight{item.g, item.param.type}, e), static_cast<const C*>(item.m)[e],
          static_cast<const C*>(item.v)[e]};
}

template <typename C>
__device__ __forceinline__ void plain_step(const StepArgs& a, const StepItem& item, int64_t piece) {
  constexpr int Batch = 4;
  const int64_t elements = item.param.r * item.param.d;
  const int64_t end = (piece + 1) * kPiece < elements ? (piece + 1) * kPiece : elements;
  for (int64_t e0 = piece * kPiece + threadIdx.x; e0 < end; e0 += Batch * kRetractThreads) {
    Moments<C> moments[Batch] = {};
    C p[Batch] = {};
#pragma unroll
    for (int q = 0; q < Batch; ++q) {
      const int64_t e = e0 + q * kRetractThreads;
      if (e >= end) continue;
      moments[q] = load_moments<C>(item, e);
      p[q] = load_weight<C>(Weight{item.param.p, item.param.type}, e);
    }
#pragma unroll
    for (int q = 0; q < Batch; ++q) {
      const int64_t e = e0 + q * kRetractThreads;
      if (e >= end) continue;
      const C u = adam(a, item, e, moments[q], moments[q].g);
      store_weight(item.param.p, item.param.type, e,
                   p[q] * static_cast<C>(1 - a.lr * a.weight_decay) - static_cast<C>(a.lr) * u);
    }
  }
}

// The whole treatment of one matrix by its cluster; returns what was found, the same in every thread.
template <typename C, bool Step>
__device__ __forceinline__ Found orthonormal(const StepArgs& a, const StepItem& item, const Place& at, C* Y) {
  const int r = static_cast<int>(item.param.r);
  const int64_t d = item.param.d;
  const DType type = item.param.type;
  const Weight R{item.param.p, type};
  const bool apart = static_cast<const void*>(Y) != item.param.p;
  const auto old = [&](int i, int64_t j) { return load_weight<C>(R, i * d + j); };
  const auto moved = [&](int i, int64_t j) { return Y[i * d + j]; };
  const auto nothing = [](int, int64_t) { return 0; };
  const auto store = [&](int i, int64_t j, C x, int) { store_weight(item.param.p, type, i * d + j, x); };
  const double least = least_pivot<C>();
  const double floor = Step ? 1 : 0;  // a step starts from rows of length 1: one that all but vanished is noise

  if constexpr (Step) {
    const Weight G{item.g, type};
    const auto gradient = [&](int i, int64_t j) { return load_weight<C>(G, i * d + j); };
    gram<C, false>(at, r, gradient, old);
    if (!all_finite(at, r)) return Found::not_finite;
    C* T = reinterpret_cast<C*>(at.part);
    for (int e = threadIdx.x; e < r * r; e += kRetractThreads)
      T[e] = static_cast<C>(0.5 * (at.S[e] + at.S[e % r * r + e / r]));
    struct Element {
      Moments<C> moments;
      C R;
    };
    apply<C>(
        at, r, old, [&](int i, int64_t j) { return Element{load_moments<C>(item, i * d + j), old(i, j)}; },
        [&](int i, int64_t j, C radial, const Element& was) {
          const int64_t e = i * d + j;
          Y[e] = was.R - static_cast<C>(a.lr) * adam(a, item, e, was.moments, was.moments.g - radial);
        });
  } else if (apart) {
    for (int i = 0; i < r; ++i)
      for (int64_t j = at.begin + threadIdx.x; j < at.end; j += kRetractThreads) Y[i * d + j] = old(i, j);
  }

  gram<C, true>(at, r, moved, moved);
  if (!all_finite(at, r)) return Found::not_finite;
  Pivots pivots = cholesky(at, r, least, floor);
  Found found = pivots.full_rank ? Found::fine : Found::deficient;
  if constexpr (Step) {
    // Y = R - lr U has dependent rows: go half way back, again and again.
    double taken = a.lr;
    for (int shorter = 0; shorter < kShortenings && !pivots.full_rank; ++shorter) {
      taken /= 2;
      __syncthreads();
      for (int i = 0; i < r; ++i) {
        for (int64_t j = at.begin + threadIdx.x; j < at.end; j += kRetractThreads) {
          const int64_t e = i * d + j;
          Y[e] += static_cast<C>(taken) * adam_direction(a, static_cast<C*>(item.m)[e], static_cast<C*>(item.v)[e]);
        }
      }
      gram<C, true>(at, r, moved, moved);
      pivots = cholesky(at, r, least, floor);
    }
  }
  if (!pivots.full_rank) {
    cluster_sync(at.cluster);  // all of Y is there
    if (at.rank == 0) {
      gram_schmidt<C>(at, r, d, Y, sizeof(C) == 8 ? 1e-12 : 1e-5);
      for (int64_t e = threadIdx.x; apart && e < r * d; e += kRetractThreads) store_weight(item.param.p, type, e, Y[e]);
    }
    return found;
  }
  invert<C>(at, r);
  apply<C>(at, r, moved, nothing, store);
  if (pivots.spread > 4 && !apart) {
    gram<C, true>(at, r, old, old);
    polish<C>(at, r);
    apply<C>(at, r, old, nothing, store);
  }
  return found;
}

template <typename C, bool Step>
__global__ void __launch_bounds__(kRetractThreads, sizeof(C) == 8 ? 1 : 2)
    step_kernel(const __grid_constant__ List list) {
  const int rank = list.cluster > 1 ? cluster_rank() : 0;
  const int which = static_cast<int>(blockIdx.x) / list.cluster;
  int low = 0, high = list.count;  // the last item that starts at or before `which`
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (list.first[middle] <= which) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const StepItem& item = list.item[low];
  const StepArgs step = Step ? step_of(list.step, item) : list.step;
  int* status = list.status + list.place[low];
  if (Step && !item.orthonormal) {
    plain_step<C>(step, item, static_cast<int64_t>(which - list.first[low]) * list.cluster + rank);
    if (which == list.first[low] && rank == 0 && threadIdx.x == 0) *status = 0;
    return;
  }
  const int64_t entries = item.param.r * item.param.r;
  const int64_t columns = (item.param.d + list.cluster - 1) / list.cluster;
  char* scratch = list.scratch[low] >= 0 ? list.scratch_base + list.scratch[low] : nullptr;
  Place at;
  at.cluster = list.cluster;
  at.rank = rank;
  at.begin = columns * rank < item.param.d ? columns * rank : item.param.d;
  at.end = at.begin + columns < item.param.d ? at.begin + columns : item.param.d;
  at.terms = list.terms;
  at.group = reinterpret_cast<double*>(shared_memory());
  at.chunk = reinterpret_cast<char*>(at.group + kRetractThreads);
  if (entries <= list.shared_entries) {
    at.S = reinterpret_cast<double*>(at.chunk + list.chunk_bytes);
    at.part = at.S + entries;
  } else {
    at.S = reinterpret_cast<double*>(scratch);
    at.part = at.S + entries;
    scratch += 2 * entries * static_cast<int64_t>(sizeof(double));
  }
  const bool narrow = item.param.type == DType::bf16 || item.param.type == DType::f16;
  const Found found =
      orthonormal<C, Step>(step, item, at, static_cast<C*>(narrow ? static_cast<void*>(scratch) : item.param.p));
  if (rank == 0 && threadIdx.x == 0) *status = static_cast<int>(found);
}

// One launch's list: the items from `next` on whose type is fp64 or is not, as `wide` says, up to kItems of them;
// `next` moves past them. Returns the scratch bytes the list needs, statuses aside.
int64_t plan(List& list, const StepItem* items, int count, bool wide, int& next, const Device& device) {
  int64_t r = 1, d = 1;
  int matrices = 0;
  list.count = 0;
  for (; next < count && list.count < kItems; ++next) {
    const StepItem& item = items[next];
    if ((item.param.type == DType::f64) != wide) continue;
    list.place[list.count] = next;
    list.item[list.count++] = item;
    if (!item.orthonormal) continue;
    ++matrices;
    r = item.param.r > r ? item.param.r : r;
    d = item.param.d > d ? item.param.d : d;
  }
  const RetractPlan policy = plan_retract(r, d, matrices, wide, device);
  list.cluster = policy.cluster;
  list.terms = policy.terms;
  list.shared_entries = policy.shared_entries;
  list.chunk_bytes = policy.chunk_bytes;
  int64_t bytes = 0, clusters = 0;
  for (int i = 0; i < list.count; ++i) {
    const Matrix& matrix = list.item[i].param;
    list.first[i] = static_cast<int>(clusters);
    list.scratch[i] = -1;
    if (!list.item[i].orthonormal) {
      const int64_t pieces = ceil_div(matrix.r * matrix.d, kPiece);
      clusters += pieces > 0 ? ceil_div(pieces, list.cluster) : 1;
      continue;
    }
    clusters += 1;
    int64_t need = 0;
    if (matrix.r * matrix.r > list.shared_entries) need += 2 * matrix.r * matrix.r * 8;
    if (matrix.type == DType::bf16 || matrix.type == DType::f16) need += matrix.r * matrix.d * 4;
    if (need == 0) continue;
    list.scratch[i] = bytes;
    bytes += round_up(need, kAlign);
  }
  list.first[list.count] = static_cast<int>(clusters);
  return bytes;
}

int64_t status_bytes(int count) { return round_up(static_cast<int64_t>(sizeof(int)) * count, kAlign); }

int64_t scratch_bytes(const StepItem* items, int count) {
  Device device;
  if (current_device(device)) return -1;
  int64_t bytes = status_bytes(count);
  List list;
  for (const bool wide : {false, true}) {
    for (int next = 0; next < count;) bytes += plan(list, items, count, wide, next, device);
  }
  return bytes;
}

template <bool Step>
int step_all(const StepItem* items, int count, const StepArgs& args, void* scratch, void* stream) {
  Device device;
  if (int error = current_device(device)) return error;
  int64_t used = status_bytes(count);
  List list;
  list.status = static_cast<int*>(scratch);
  list.step = args;
  for (const bool wide : {false, true}) {
    for (int next = 0; next < count;) {
      const int64_t bytes = plan(list, items, count, wide, next, device);
      if (list.count == 0) continue;
      list.scratch_base = static_cast<char*>(scratch) + used;
      used += bytes;
      Grid grid;
      grid.x = static_cast<int64_t>(list.first[list.count]) * list.cluster;
      grid.threads = kRetractThreads;
      grid.cluster = list.cluster;
      grid.shared = retract_shared(list.shared_entries, list.chunk_bytes);
      const int error = wide ? launch<step_kernel<double, Step>>(grid, stream, list)
                             : launch<step_kernel<float, Step>>(grid, stream, list);
      if (error) return error;
    }
  }
  return 0;
}

std::vector<StepItem> as_items(const Matrix* matrices, int count) {
  std::vector<StepItem> items(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) {
    items[static_cast<size_t>(i)].param = matrices[i];
    items[static_cast<size_t>(i)].orthonormal = true;
  }
  return items;
}

}  // namespace

int64_t retract_scratch_bytes(const Matrix* matrices, int count) {
  return scratch_bytes(as_items(matrices, count).data(), count);
}

int retract_cuda(const Matrix* matrices, int count, void* scratch, void* stream) {
  return step_all<false>(as_items(matrices, count).data(), count, StepArgs{}, scratch, stream);
}

int64_t adamw_step_scratch_bytes(const StepItem* items, int count) { return scratch_bytes(items, count); }

int adamw_step_cuda(const StepItem* items, int count, const StepArgs& args, void* scratch, void* stream) {
  return step_all<true>(items, count, args, scratch, stream);
}

}  // namespace fastreft
