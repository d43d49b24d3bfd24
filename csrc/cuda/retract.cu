// Retraction, and AdamW with retraction, of a list of matrices in one launch; plain AdamW of others in another.
//
// An orthonormal matrix has a cluster to itself (its CTAs split the columns), a plain parameter is cut into pieces of
// kPiece elements, a CTA each. The list travels as a kernel parameter: nothing is copied to the device beforehand, and
// a captured graph holds it.
//
// The step of an orthonormal R (r, d), see retract_common.cuh and retract_chunk.cuh for the pieces:
//     A = G R^T; g = G - 1/2 (A + A^T) R; Adam; Y = R - lr U; S = Y Y^T = L L^T; R = L^-1 Y; polish where S was skewed
// Where a CTA's columns of R and G fit into shared memory they stay there from A to the last product, and each byte
// moves once. Else Y lies in R's own memory, or in scratch where R has 16 bits.
#include <vector>

#include "../kernels.h"
#include "launch.h"
#include "retract_common.cuh"
#include "retract_step.cuh"

namespace fastreft {
namespace {

static_assert(sizeof(Place) + kRetractThreads * sizeof(double) <= kRetractHead && sizeof(Place) % 8 == 0);

constexpr int kItems = 128;       // a launch's list: 19 KB of kernel parameters, of 32 there are from CUDA 12.1 on
constexpr int64_t kPiece = 8192;  // elements of a plain parameter that a CTA takes
constexpr int64_t kAlign = 256;
constexpr int kShortenings = 8;  // halvings of a step before Gram-Schmidt

struct List {
  StepItem item[kItems];
  int first[kItems + 1];    // first CTA of each plain item
  int64_t columns[kItems];  // of each CTA of a matrix's cluster
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

// What the matrix is multiplied with next: something made of its gradient's product with it, or of its own.
enum class Turn { tangent, factor, polish };

// The step Y = R - lr U had dependent rows: Y <- Y + by U, back towards R.
template <typename C>
__device__ __forceinline__ void shorten(const Place& at, const StepItem& item, const StepArgs& a, C* Y, int64_t pitch,
                                        double by) {
  const Adam<C> adam(a);
  const int r = at.r;
  const int64_t d = at.d;
  __syncthreads();
#pragma unroll 1
  for (Walk walk(r, static_cast<int>(at.end - at.begin)); walk.there(); walk.next()) {
    const int64_t e = walk.row * d + at.begin + walk.column;
    Y[walk.row * pitch + walk.column] +=
        static_cast<C>(by) * adam.direction(static_cast<C*>(item.m)[e], static_cast<C*>(item.v)[e]);
  }
}

// Whether all of Y (r, d) is finite; the same answer in all of a CTA's threads.
template <typename C>
__device__ __forceinline__ bool finite_matrix(const Place& at, const C* Y) {
  C worst = 0;
#pragma unroll 1
  for (int64_t e = threadIdx.x; e < at.r * at.d; e += kRetractThreads) worst += Y[e] - Y[e];  // 0, or NaN
  return __syncthreads_or(!(worst == 0)) == 0;
}

// The whole treatment of one matrix by its cluster; returns what was found, the same in every thread. Each turn goes
// over the columns twice: for a Gram matrix, and to multiply with what was made of it.
template <typename C, bool Step>
__device__ __forceinline__ Found orthonormal(const StepArgs& given, const StepItem& item, const Place& at) {
  const double least = least_pivot<C>();
  const double floor = Step ? 1 : 0;  // a step starts from rows of length 1: one that all but vanished is noise

  bool swapped = false;  // which of the two chunks is the matrix as it is
  bool moved = false;    // the matrix in memory, for chunks that do not stay, is Y
  Found found = Found::fine;
  Turn turn = Step ? Turn::tangent : Turn::factor;
  bool multiply = false, last = false, here = false;  // here: the chunk that stays has been fetched
  bool overflowed = false;                            // the Gram matrix of what may be finite itself
  int shortenings = 0;
  while (true) {
    const bool tangent = Step && turn == Turn::tangent;
    C* const chunks = reinterpret_cast<C*>(shared_memory() + kRetractHead);
    C* const now = chunks + (swapped ? at.r * at.pitch : 0);
    C* const other = chunks + (swapped ? 0 : at.r * at.pitch);  // the gradient, then what comes out of a product
    C* const Y = static_cast<C*>(at.Y);
    const DType type = item.param.type;
    const bool apart = at.Y != item.param.p;
#pragma unroll 1
    for (int64_t j0 = at.begin; j0 < at.end; j0 += at.terms) {
      const int valid = static_cast<int>(at.end - j0 < at.terms ? at.end - j0 : at.terms);
      __syncthreads();  // nobody uses the chunks any more, and what others have worked out is there
      if (!here) {
        fill<C>(at, j0, valid, moved ? (sizeof(C) == 8 ? DType::f64 : DType::f32) : type, moved ? Y : item.param.p,
                tangent ? item.g : nullptr, now, other);
        here = at.resident;
        __syncthreads();
      }
      if (!multiply) {
        gram_of_chunk<C>(at, valid, tangent ? other : now, now, j0 == at.begin);
        continue;
      }
      product(at, valid, now, other, tangent);
      __syncthreads();
      const Walk walk = walk_memory<C>(at, valid);
      if (tangent) {
        const Adam<C> adam(step_of(given, item));
        C* const to = at.resident ? nullptr : Y + j0;
        at.vector ? chunk_step<kVector<C>>(at.pitch, walk, adam, item, j0, at.d, now, other, to)
                  : chunk_step<1>(at.pitch, walk, adam, item, j0, at.d, now, other, to);
      } else if (last || !at.resident) {
        by_stored<C>(type, [&](auto kept) {
          using T = decltype(kept);
          T* const to = static_cast<T*>(item.param.p) + j0;
          at.vector ? keep<T, kVector<C>>(at.pitch, walk, other, to, at.d)
                    : keep<T, 1>(at.pitch, walk, other, to, at.d);
        });
      }
    }

    if (multiply) {
      if (last) return found;
      if (at.resident) swapped = !swapped;
      if (tangent) moved = true;
      turn = tangent ? Turn::factor : Turn::polish;
      multiply = false;
      continue;
    }
    sum_over_cluster(at);
    multiply = true;
    if (shortenings == 0 && !all_finite(at)) {
      if (Step || turn != Turn::factor) return Found::not_finite;
      overflowed = true;
    }
    if (tangent) {
      symmetric<C>(at);
      continue;
    }
    if (turn == Turn::polish) {
      polish<C>(at);
      last = true;
      continue;
    }
    const Pivots pivots = overflowed ? Pivots{false, 1} : cholesky(at, least, floor);
    if (pivots.full_rank) {
      last = pivots.spread <= 4 || apart;
      invert<C>(at);
      continue;
    }
    found = overflowed ? Found::fine : Found::deficient;
    C* const y = at.resident ? now : Y + at.begin;
    const int64_t pitch = at.resident ? at.pitch : at.d;
    if (Step && shortenings < kShortenings) {  // go half way back, again and again
      ++shortenings;
      const StepArgs a = step_of(given, item);
      shorten(at, item, a, y, pitch, a.lr / static_cast<double>(1 << shortenings));
      multiply = false;
      continue;
    }
    if (at.resident || (!Step && apart)) {  // all of Y has to be in memory
#pragma unroll 1
      for (Walk walk(at.r, static_cast<int>(at.end - at.begin)); walk.there(); walk.next()) {
        const int64_t e = walk.row * at.d + at.begin + walk.column;
        Y[e] = at.resident ? y[walk.row * pitch + walk.column] : load_weight<C>({item.param.p, type}, e);
      }
    }
    cluster_sync(at.cluster);
    if (at.rank == 0) {
      if (overflowed && !finite_matrix<C>(at, Y)) return Found::not_finite;
      gram_schmidt<C>(at.r, at.d, Y, sizeof(C) == 8 ? 1e-12 : 1e-5);
#pragma unroll 1
      for (int64_t e = threadIdx.x; apart && e < at.r * at.d; e += kRetractThreads)
        store_weight(item.param.p, type, e, Y[e]);
    }
    return found;
  }
}

FASTREFT_HOST_DEVICE inline bool is_narrow(DType type) { return type == DType::bf16 || type == DType::f16; }

// Whether all of an item's memory can be accessed in quads.
__device__ __forceinline__ bool in_quads(const StepItem& item, bool narrow) {
  const uintptr_t quad = narrow ? 8 : 16;  // bytes of a quad of the parameter's type
  const auto aligned = [](const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  return aligned(item.param.p, quad) && aligned(item.g, quad) && aligned(item.m, 16) && aligned(item.v, 16);
}

template <typename C>
__global__ void __launch_bounds__(kPlainThreads, sizeof(C) == 8 ? 2 : 4)
    plain_kernel(const __grid_constant__ List list) {
  const int which = static_cast<int>(blockIdx.x);
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
  const int64_t begin = (which - list.first[low]) * kPiece, elements = item.param.r * item.param.d;
  const bool quads = in_quads(item, is_narrow(item.param.type));
  plain_step<C>(step_of(list.step, item), item, begin, begin + kPiece < elements ? begin + kPiece : elements, quads);
  if (begin == 0 && threadIdx.x == 0) list.status[list.place[low]] = 0;
}

template <typename C, bool Step>
__global__ void __launch_bounds__(kRetractThreads, 1) step_kernel(const __grid_constant__ List list) {
  const int rank = list.cluster > 1 ? cluster_rank() : 0;
  const int low = static_cast<int>(blockIdx.x) / list.cluster;
  const StepItem& item = list.item[low];
  const bool narrow = is_narrow(item.param.type), quads = in_quads(item, narrow);
  char* scratch = list.scratch[low] >= 0 ? list.scratch_base + list.scratch[low] : nullptr;
  const int64_t entries = item.param.r * item.param.r, columns = list.columns[low];
  Place& at = *reinterpret_cast<Place*>(shared_memory());
  char* const chunk = shared_memory() + kRetractHead;
  if (threadIdx.x == 0) {
    at.cluster = list.cluster;
    at.rank = rank;
    at.r = static_cast<int>(item.param.r);
    at.d = item.param.d;
    at.begin = columns * rank < item.param.d ? columns * rank : item.param.d;
    at.end = at.begin + columns < item.param.d ? at.begin + columns : item.param.d;
    at.resident = retract_chunks(item.param.r, columns, sizeof(C)) <= list.chunk_bytes;
    at.terms = at.resident ? static_cast<int>(columns) : list.terms;
    at.pitch = static_cast<int>(retract_pitch(at.terms, sizeof(C)));
    at.vector = quads && item.param.d % kVector<C> == 0;
    at.S = reinterpret_cast<double*>(entries <= list.shared_entries ? chunk + list.chunk_bytes : scratch);
    at.part = at.S + entries;
    if (entries > list.shared_entries) scratch += 2 * entries * static_cast<int64_t>(sizeof(double));
    at.Y = narrow ? static_cast<void*>(scratch) : item.param.p;
    at.item = low;
  }
  __syncthreads();
  const Found found = orthonormal<C, Step>(list.step, list.item[at.item], at);
  if (at.rank == 0 && threadIdx.x == 0) list.status[list.place[at.item]] = static_cast<int>(found);
}

// Where each plain item begins among the CTAs; one of no elements has one, too, for its status.
void plan_pieces(List& list) {
  int64_t ctas = 0;
  for (int i = 0; i < list.count; ++i) {
    list.first[i] = static_cast<int>(ctas);
    const int64_t pieces = ceil_div(list.item[i].param.r * list.item[i].param.d, kPiece);
    ctas += pieces > 0 ? pieces : 1;
  }
  list.first[list.count] = static_cast<int>(ctas);
}

// What is in one launch: items that are fp64 or are not, matrices or plain.
struct Sort {
  bool wide, orthonormal;
};

constexpr Sort kSorts[] = {{false, true}, {true, true}, {false, false}, {true, false}};

// One launch's list: the items of a sort from `next` on, up to kItems of them; `next` moves past them. Returns the
// scratch bytes the list needs, statuses aside.
int64_t plan(List& list, const StepItem* items, int count, const Sort& sort, int& next, const Device& device) {
  int64_t r = 1, d = 1;
  list.count = 0;
  for (; next < count && list.count < kItems; ++next) {
    const StepItem& item = items[next];
    if ((item.param.type == DType::f64) != sort.wide || item.orthonormal != sort.orthonormal) continue;
    list.place[list.count] = next;
    list.item[list.count++] = item;
    r = item.param.r > r ? item.param.r : r;
    d = item.param.d > d ? item.param.d : d;
  }
  if (!sort.orthonormal) {
    plan_pieces(list);
    return 0;
  }
  const bool wide = sort.wide;
  const RetractPlan policy = plan_retract(r, d, list.count, wide, device);
  list.cluster = policy.cluster;
  list.terms = policy.terms;
  list.shared_entries = policy.shared_entries;
  list.chunk_bytes = policy.chunk_bytes;
  for (int i = 0; i < list.count; ++i) {  // the largest of those whose columns may stay in shared memory
    const Matrix& matrix = list.item[i].param;
    list.columns[i] = retract_columns(matrix.d, list.cluster);
    const int64_t stays = retract_chunks(matrix.r, list.columns[i], wide ? 8 : 4);
    if (stays <= policy.room && stays > list.chunk_bytes) list.chunk_bytes = stays;
  }
  int64_t bytes = 0;
  for (int i = 0; i < list.count; ++i) {
    const Matrix& matrix = list.item[i].param;
    list.scratch[i] = -1;
    int64_t need = 0;
    if (matrix.r * matrix.r > list.shared_entries) need += 2 * matrix.r * matrix.r * 8;
    if (is_narrow(matrix.type)) need += matrix.r * matrix.d * 4;
    if (need == 0) continue;
    list.scratch[i] = bytes;
    bytes += round_up(need, kAlign);
  }
  return bytes;
}

int64_t status_bytes(int count) { return round_up(static_cast<int64_t>(sizeof(int)) * count, kAlign); }

int64_t scratch_bytes(const StepItem* items, int count) {
  Device device;
  if (current_device(device)) return -1;
  int64_t bytes = status_bytes(count);
  List list;
  for (const Sort& sort : kSorts) {
    for (int next = 0; next < count;) bytes += plan(list, items, count, sort, next, device);
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
  for (const Sort& sort : kSorts) {
    for (int next = 0; next < count;) {
      const int64_t bytes = plan(list, items, count, sort, next, device);
      if (list.count == 0) continue;
      list.scratch_base = static_cast<char*>(scratch) + used;
      used += bytes;
      Grid grid;
      int error = 0;
      if (sort.orthonormal) {
        grid.x = static_cast<int64_t>(list.count) * list.cluster;
        grid.threads = kRetractThreads;
        grid.cluster = list.cluster;
        grid.shared = retract_shared(list.shared_entries, list.chunk_bytes);
        error = sort.wide ? launch<step_kernel<double, Step>>(grid, stream, list)
                          : launch<step_kernel<float, Step>>(grid, stream, list);
      } else {
        grid.x = list.first[list.count];
        grid.threads = kPlainThreads;
        error = sort.wide ? launch<plain_kernel<double>>(grid, stream, list)
                          : launch<plain_kernel<float>>(grid, stream, list);
      }
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
