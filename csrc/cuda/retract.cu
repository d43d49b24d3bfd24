// Retraction of a list of matrices, and AdamW of a list of parameters, with retraction of the orthonormal ones, in one
// launch.
//
// An orthonormal matrix has a cluster to itself (its CTAs split the columns). Plain parameters are cut into pieces of
// kPiece elements; all CTAs share them, by warps of their own that have no barrier with the others, which wait for
// memory and each other most of the time. Where there is too much that is plain, or nothing else, it has a launch to
// itself. The list travels as a kernel parameter: nothing is copied to the device beforehand, and a captured graph
// holds it.
//
// The step of an orthonormal R (r, d), see retract_common.cuh and retract_chunk.cuh for the pieces:
//     A = G R^T; g = G - 1/2 (A + A^T) R; Adam; Y = R - lr U; S = Y Y^T = L L^T; R = L^-1 Y; polish where S was skewed
// Where a CTA's columns of R and G fit into shared memory they stay there from A to the last product, and each byte
// moves once. Else Y lies in R's own memory, or in scratch where R has 16 bits.
#include <vector>

#include "../kernels.h"
#include "launch.h"
#include "retract_common.cuh"
#include "retract_list.h"
#include "retract_step.cuh"

namespace fastreft {
namespace {

static_assert(sizeof(Place) + kRetractThreads * sizeof(double) <= kRetractHead && sizeof(Place) % 8 == 0);

constexpr int kShortenings = 8;  // halvings of a step before Gram-Schmidt

template <typename C>
__device__ __forceinline__ double least_pivot() {
  return sizeof(C) == 8 ? 1e-13 : 1e-6;
}

// What the matrix is multiplied with next: something made of its gradient's product with it, or of its own.
enum class Turn { tangent, factor, polish };

// The step Y = R - lr U had dependent rows: Y <- Y + by U, back towards R.
template <typename C>
__device__ __forceinline__ void shorten(const Place& at, const StepItem& item, C* Y, int64_t pitch, double by) {
  const Adam<C> adam(at.adam);
  const int r = at.r;
  const int64_t d = at.d;
  meet();
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
  return !any_of<kRetractThreads>(!(worst == 0));
}

// The whole treatment of one matrix by its cluster; returns what was found, the same in every thread. Each turn goes
// over the columns twice: for a Gram matrix, and to multiply with what was made of it.
template <typename C, bool Step>
__device__ __forceinline__ Found orthonormal(const StepItem& item, Place& at) {
  const double least = least_pivot<C>();
  const double floor = Step ? 1 : 0;  // a step starts from rows of length 1: one that all but vanished is noise

  Found found = Found::fine;
  Turn turn = Step ? Turn::tangent : Turn::factor;
  bool multiply = false, last = false;
  bool overflowed = false;  // the Gram matrix of what may be finite itself
  int shortenings = 0, sums = 0;
  while (true) {
    const bool tangent = Step && turn == Turn::tangent;
    const bool moved = Step && !tangent;  // the matrix in memory, for chunks that do not stay, is Y
    // Which of the two chunks is the matrix as it is: they change places with every product, where they stay.
    const bool swapped = at.resident && turn == (Step ? Turn::factor : Turn::polish);
    C* const chunks = reinterpret_cast<C*>(shared_memory() + kRetractHead);
    C* const now = chunks + (swapped ? at.r * at.pitch : 0);
    C* const other = chunks + (swapped ? 0 : at.r * at.pitch);  // the gradient, then what comes out of a product
    C* const Y = static_cast<C*>(at.Y);
    const DType type = item.param.type;
    const bool apart = at.Y != item.param.p;
#pragma unroll 1
    for (int64_t j0 = at.begin; j0 < at.end; j0 += at.terms) {
      const int valid = static_cast<int>(at.end - j0 < at.terms ? at.end - j0 : at.terms);
      meet();  // nobody uses the chunks any more, and what others have worked out is there
      if (!at.resident || sums == 0) {
        fill<C>(at, j0, valid, moved ? (sizeof(C) == 8 ? DType::f64 : DType::f32) : type, moved ? Y : item.param.p,
                tangent ? item.g : nullptr, now, other);
        meet();
      }
      if (!multiply) {
        gram_of_chunk<C>(at, valid, tangent ? other : now, now, j0 == at.begin);
        continue;
      }
      product(at, valid, now, other, tangent);
      meet();
      const Walk walk = walk_memory<C>(at, valid);
      if (tangent) {
        const Adam<C> adam(at.adam);
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
      turn = tangent ? Turn::factor : Turn::polish;
      multiply = false;
      continue;
    }
    sum_over_cluster(at, sums++);
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
    const Pivots pivots = overflowed ? Pivots{false, 1} : inverse_factor<C>(at, least, floor);
    if (pivots.full_rank) {
      last = pivots.spread <= 4 || apart;
      continue;
    }
    found = overflowed ? Found::fine : Found::deficient;
    C* const y = at.resident ? now : Y + at.begin;
    const int64_t pitch = at.resident ? at.pitch : at.d;
    if (Step && shortenings < kShortenings) {  // go half way back, again and again
      ++shortenings;
      shorten(at, item, y, pitch, at.adam.lr / static_cast<double>(1 << shortenings));
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
    __threadfence();
    sum_over_cluster(at, sums);  // of no use but that all CTAs have come so far
    __threadfence();
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

// Whether all of an item's memory can be accessed in quads.
__device__ __forceinline__ bool in_quads(const StepItem& item, bool narrow) {
  const uintptr_t quad = narrow ? 8 : 16;  // bytes of a quad of the parameter's type
  const auto aligned = [](const void* p, uintptr_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  return aligned(item.param.p, quad) && aligned(item.g, quad) && aligned(item.m, 16) && aligned(item.v, 16);
}

// A CTA's share of the list's plain pieces, by `Threads` of its threads.
template <typename C, int Threads>
__device__ __forceinline__ void plain_share(const StepList& list, int thread) {
  const int pieces = list.first[list.plain];
  int64_t piece = static_cast<int64_t>(blockIdx.x) * list.share;
  const int64_t end = piece + list.share < pieces ? piece + list.share : pieces;
  int low = 0, high = list.plain;  // the last item that starts at or before `piece`
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (list.first[middle] <= piece) {
      low = middle;
    } else {
      high = middle;
    }
  }
#pragma unroll 1
  for (; piece < end; ++low) {
    const int64_t first = list.first[low], next = list.first[low + 1] < end ? list.first[low + 1] : end;
    const StepItem& item = list.item[list.matrices + low];
    const int64_t elements = item.param.r * item.param.d, begin = (piece - first) * kPiece;
    const int64_t stop = (next - first) * kPiece < elements ? (next - first) * kPiece : elements;
    const bool quads = in_quads(item, is_narrow(item.param.type));
    plain_step<C, Threads>(step_of(list.step, item), item, begin, stop, quads, thread);
    if (begin == 0 && thread == 0) list.status[list.place[list.matrices + low]] = 0;
    piece = next;
  }
}

template <typename C>
__global__ void __launch_bounds__(kPlainThreads, sizeof(C) == 8 ? 2 : 4)
    plain_kernel(const __grid_constant__ StepList list) {
  plain_share<C, kPlainThreads>(list, static_cast<int>(threadIdx.x));
}

// The moments of a CTA's columns, to where their turn finds them sooner.
template <typename C>
__device__ __forceinline__ void fetch_moments(const Place& at, const StepItem& item, int thread) {
  constexpr int kLine = 128 / static_cast<int>(sizeof(C));
  const int columns = static_cast<int>(at.end - at.begin), lines = (columns + kLine - 1) / kLine;
  if (!at.resident) return;
#pragma unroll 1
  for (int i = thread; i < at.r * lines; i += kBesideThreads) {
    const int64_t e = i / lines * at.d + at.begin + i % lines * kLine;
    fetch_to_l2(static_cast<const C*>(item.m) + e);
    fetch_to_l2(static_cast<const C*>(item.v) + e);
  }
}

// What the threads beside a retraction do.
template <typename C>
__device__ __forceinline__ void beside(const StepList& list, const Place& at) {
  const int thread = static_cast<int>(threadIdx.x) - kRetractThreads;
  fetch_moments<C>(at, list.item[at.item], thread);
  plain_share<C, kBesideThreads>(list, thread);
}

// Threads of a CTA that steps matrices. fp64's retraction takes the registers that others beside it would need.
template <typename C, bool Step>
constexpr int kStepThreads = kRetractThreads + (Step && sizeof(C) == 4 ? kBesideThreads : 0);

template <typename C, bool Step>
__global__ void __launch_bounds__(kStepThreads<C, Step>, 1) step_kernel(const __grid_constant__ StepList list) {
  const int rank = list.cluster > 1 ? cluster_rank() : 0;
  const int low = static_cast<int>(blockIdx.x) / list.cluster;
  const StepItem& item = list.item[low];
  char* const chunk = shared_memory() + kRetractHead;
  Place& at = *reinterpret_cast<Place*>(shared_memory());
  if (threadIdx.x == 0) {
    const bool narrow = is_narrow(item.param.type), quads = in_quads(item, narrow);
    char* scratch = list.scratch[low] >= 0 ? list.scratch_base + list.scratch[low] : nullptr;
    const int64_t pairs = retract_pairs(item.param.r), columns = retract_columns(item.param.d, list.cluster);
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
    at.S = reinterpret_cast<double*>(list.shared_entries > 0 ? chunk + list.chunk_bytes : scratch);
    at.part = at.S + 2 * pairs;
    at.received = at.part + 2 * pairs;
    if (list.shared_entries == 0) scratch += 4 * pairs * static_cast<int64_t>(sizeof(double));
    at.Y = narrow ? static_cast<void*>(scratch) : item.param.p;
    at.item = low;
    arrivals_init(&at.parts, 1);
    arrivals_init(&at.sums, 1);
    arrivals_init_fence();
  }
  if (Step && threadIdx.x == 32) at.adam = Adam<double>(step_of(list.step, item));
  cluster_sync(list.cluster);
  if (threadIdx.x < kRetractThreads) {
    const Found found = orthonormal<C, Step>(list.item[at.item], at);
    if (at.rank == 0 && threadIdx.x == 0) list.status[list.place[at.item]] = static_cast<int>(found);
  } else if constexpr (kStepThreads<C, Step> > kRetractThreads) {
    beside<C>(list, at);
  }
}

int64_t status_bytes(int count) { return round_up(static_cast<int64_t>(sizeof(int)) * count, kAlign); }

int64_t scratch_bytes(const StepItem* items, int count) {
  Device device;
  if (current_device(device)) return -1;
  int64_t bytes = status_bytes(count);
  StepList list;
  for (const bool wide : {false, true}) {
    Turns turns{wide};
    do bytes += plan(list, items, count, turns, device);
    while (list.matrices + list.plain > 0);
  }
  return bytes;
}

template <typename C, bool Step>
int launch_list(const StepList& list, void* stream) {
  Grid grid;
  if (list.matrices > 0) {
    grid.x = static_cast<int64_t>(list.matrices) * list.cluster;
    grid.threads = kStepThreads<C, Step>;
    grid.cluster = list.cluster;
    grid.shared = retract_shared(list.shared_entries, list.chunk_bytes);
    return launch<step_kernel<C, Step>>(grid, stream, list);
  }
  grid.x = ceil_div(list.first[list.plain], kPlainPieces);
  grid.threads = kPlainThreads;
  return launch<plain_kernel<C>>(grid, stream, list);
}

template <bool Step>
int step_all(const StepItem* items, int count, const StepArgs& args, void* scratch, void* stream) {
  Device device;
  if (int error = current_device(device)) return error;
  int64_t used = status_bytes(count);
  StepList list;
  list.status = static_cast<int*>(scratch);
  list.step = args;
  for (const bool wide : {false, true}) {
    for (Turns turns{wide};;) {
      const int64_t bytes = plan(list, items, count, turns, device);
      if (list.matrices + list.plain == 0) break;
      list.scratch_base = static_cast<char*>(scratch) + used;
      used += bytes;
      const int error = wide ? launch_list<double, Step>(list, stream) : launch_list<float, Step>(list, stream);
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
