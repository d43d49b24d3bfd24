// Launch policy: pure functions of the shapes and the device, no CUDA here. Everything a kernel's layout of shared
// memory depends on is computed in this file, once, for the host that launches and for the kernel that runs.
#pragma once
#include <cstdint>

#include "../host_device.h"

namespace fastreft {

struct Device {
  int major = 0, minor = 0;  // compute capability, or the architecture of the code where that is older
  int multiprocessors = 0;
  int64_t shared = 0;       // bytes a CTA may ask for
  int largest_cluster = 1;  // CTAs; 8 from cc 9.0 on, 16 where the device has room for so many
  // Clusters of c CTAs that run at once, by [CTAs of a multiprocessor - 1][c], where the device was asked.
  bool asked = false;
  int resident[2][17] = {};
};

// Code knows what it was compiled for, not where it runs: without code for 9.0 a later device runs what its driver made
// of older PTX, in which a cluster is one CTA (device.cuh), so that a cluster of several would do one CTA's share
// several times. `ptx` is the virtual architecture the code was compiled for, times 10, as
// cudaFuncAttributes::ptxVersion has it, which is __CUDA_ARCH__ / 10 whatever the device; binaryVersion will not do,
// being the device's own where a driver compiled the PTX.
constexpr int usable_major(int device_major, int ptx) { return ptx / 10 < device_major ? ptx / 10 : device_major; }

// What each of two CTAs of a multiprocessor may ask for: 1 KB of each CTA's share is the system's.
constexpr int64_t half_of_shared(int64_t shared) { return (shared + 1024) / 2 - 1024; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// ---- tensor cores: one pass over rows (edit_fused.cuh) ------------------------------------------------------------

constexpr int kFusedWarps = 8, kFusedThreads = kFusedWarps * 32;
// Beside them the warp that moves their tiles (edit_mover.cuh) and those that work out coordinates (edit_owner.cuh): a
// multiprocessor's four parts have room for 12 warps where they have room for 9.
constexpr int kMoverWarp = kFusedWarps, kOwnerWarps = 3, kTeamThreads = (kMoverWarp + 1 + kOwnerWarps) * 32;
constexpr int kMostStages = 8;
constexpr int kMaxFusedRank = 64;

// 0 where r has no padded form.
constexpr int padded_rank(int64_t r) {
  return r <= 0 ? 0 : r <= 8 ? 8 : r <= 16 ? 16 : r <= 32 ? 32 : r <= 64 ? 64 : 0;
}

// CTAs of a multiprocessor the kernel is compiled for: with 32 coordinates the matrices leave no room for a second one
// (cc 9.0 and later), and the fragments need more than half the registers.
constexpr int per_sm_of_rank(int rank) { return rank > 16 ? 1 : 2; }

// The parts of a CTA's shared memory, in bytes from its start.
struct FusedLayout {
  int64_t pitch = 0;   // elements from one row of a slice to the next; 8 more than its width: no bank conflicts
  int64_t shrink = 0;  // [shrinks * rank, pitch] T
  int64_t expand = 0;  // [depth, pitch] T
  int64_t tiles = 0;   // [stages, rows, pitch] T, and behind them those of a second input
  int sets = 1;        // tiles whose sums and coordinates are on their way at once
  int second_stages = 0;
  int64_t received = 0;     // [sets, cluster, parts, own_rows, shrinks * rank] fp32
  int64_t coordinates = 0;  // [sets, rows, coordinate_pitch] T
  int64_t coordinate_pitch = 0;
  int depth = 0;  // coordinates of the expand
  // [sets] of `received`, [sets] of `coordinates`, [stages] filled, [stages] edited, [second_stages] filled
  int64_t arrivals = 0;
  int64_t received_set = 0;  // bytes of one set
  int64_t coordinates_set = 0;
  int64_t bytes = 0;
};

struct FusedShape {
  int rank = 0;                  // padded
  int shrinks = 0, expands = 0;  // matrices, 1 or 2; where there is none, one of zeros, which keeps the ranks in step
  int extra = 0;                 // further coordinates a row, behind those of the expand (the one-pass backward's)
  bool second = false;           // whether another tensor is streamed beside the one that is edited
  int cluster = 1, rows = 16, stages = 2;
  int width = 0;      // columns a CTA owns, or handles at a time, a multiple of 128: 16 for each warp
  int pieces = 1;     // of that width; more than one where the matrices are streamed (edit_streamed.cuh)
  bool held = false;  // the matrices' slices are in registers (edit_held.cuh), and only pass through shared memory
};

// Where the warps of a CTA hold the matrices: 64 columns each of the one that expands, and of the one that shrinks 16
// coordinates over one of two parts of the slice. Tiles of 64 rows, of which there is room for two, were slower on an
// H100: turns did not overlap.
constexpr int kHeldWidth = 64 * kFusedWarps, kHeldRows = 32, kHeldLogParts = 1;

// A shrink's work is cut into items of 16 or 32 rows and 8 or 16 coordinates over one, two or four parts of the
// columns, so that all 8 warps have one where there are so few. What is added up to what in which order does not depend
// on the number of parts: see Cta::shrink_tile.
struct ShrinkWork {
  int items = 0, log_parts = 0;
  int own_shift = 0;  // log2 of the rows of a tile whose coordinates one CTA works out; the last CTAs may have none
};
constexpr int shrink_item_rows(int rank, int rows) { return rank > 16 && rows > 16 ? 32 : 16; }
constexpr int shrink_item_coordinates(int rank) { return rank > 8 ? 16 : 8; }

// Rows of the matrices that expand, and coordinates a row for them: 16 a step of mma, or a single 8, whose other half
// is zeros in registers.
constexpr int expand_depth(int expands, int rank) {
  return expands * rank > 16 ? expands * rank : expands * rank == 8 ? 8 : 16;
}

inline ShrinkWork shrink_work(const FusedShape& s) {
  ShrinkWork work;
  work.items = s.rows / shrink_item_rows(s.rank, s.rows) * (s.shrinks * s.rank / shrink_item_coordinates(s.rank));
  while (work.log_parts < 2 && work.items << work.log_parts < kFusedWarps) ++work.log_parts;
  if (s.held) work.log_parts = kHeldLogParts;
  while ((s.cluster << work.own_shift) < s.rows) ++work.own_shift;
  return work;
}

inline FusedLayout fused_layout(const FusedShape& s) {
  const ShrinkWork work = shrink_work(s);
  FusedLayout at;
  at.pitch = s.width + 8;
  const int64_t row = at.pitch * 2;
  const int64_t depth = at.depth = expand_depth(s.expands, s.rank);
  at.coordinate_pitch = depth + s.extra == 8 ? 24 : depth + s.extra + 8;  // no bank conflicts, either
  at.shrink = depth * row;
  const int64_t matrices = at.shrink + s.shrinks * s.rank * row;
  at.tiles = s.held ? 0 : matrices;
  at.sets = s.pieces == 1 && s.stages > 2 ? 2 : 1;  // the next tile is shrunk while this one is expanded
  // What is streamed beside a tile is needed when its coordinates are there, and not before: two stages do for it.
  at.second_stages = !s.second ? 0 : s.stages < 2 ? 1 : 2;
  const int64_t tiles = at.tiles + (s.stages + at.second_stages) * s.rows * row;
  at.received = tiles > matrices ? tiles : matrices;
  at.received_set = (static_cast<int64_t>(s.cluster) << (work.log_parts + work.own_shift)) * s.shrinks * s.rank * 4;
  at.coordinates = at.received + at.sets * at.received_set;
  at.coordinates_set = s.rows * at.coordinate_pitch * 2;
  at.arrivals = at.coordinates + at.sets * at.coordinates_set;
  at.bytes = at.arrivals + (2 * (at.sets + s.stages) + at.second_stages) * 8;
  return at;
}

struct FusedPlan {
  bool fits = false;
  FusedShape shape;
  int64_t tiles = 0;  // of `rows` rows
  int64_t clusters = 0;
  int64_t shared = 0;
  int per_sm = 1;  // CTAs of one multiprocessor the plan counts on
};

// Clusters that run at once. A persistent grid larger than that would take twice the time. Not asked: clusters stay
// inside a group of at least 16 multiprocessors, pairs inside a pair of them.
inline int64_t resident_clusters(const Device& device, int cluster, int per_sm) {
  if (device.asked && cluster > 1) return device.resident[per_sm - 1][cluster];
  const int64_t count =
      cluster <= 2 ? device.multiprocessors * per_sm / cluster : device.multiprocessors / 16 * (16 * per_sm / cluster);
  return count > 0 ? count : 1;
}

// A shape for these matrices; rank 0 where tensor cores do not take them.
inline FusedShape fused_shape(int64_t n, int64_t d, int64_t r, int shrinks, int expands) {
  FusedShape s;
  if (n > 0 && d > 0 && d % 8 == 0) s.rank = padded_rank(r);
  s.shrinks = shrinks > 0 ? shrinks : 1;
  s.expands = expands > 0 ? expands : 1;
  return s;
}

// The most CTAs a multiprocessor and the tallest tiles of whose shape `fit(tiles, clusters, limit)` can make one of at
// most `limit` bytes, `clusters` of them running at once: false where there are none. plan.shape has the cluster
// already.
template <typename Fit>
bool plan_tiles(FusedPlan& plan, int64_t n, int most_per_sm, const Device& device, const Fit& fit) {
  FusedShape& s = plan.shape;
  for (int per_sm = most_per_sm; per_sm >= 1; --per_sm) {
    const int64_t limit = per_sm == 2 ? half_of_shared(device.shared) : device.shared;
    const int64_t clusters = resident_clusters(device, s.cluster, per_sm);
    if (clusters < 1) continue;  // the device does not run clusters of this size
    for (s.rows = 64; s.rows >= 16; s.rows /= 2) {
      const int64_t tiles = ceil_div(n, s.rows);
      const bool idle_clusters = s.rows > 16 && tiles < clusters;  // rather more at work than taller tiles
      if (idle_clusters || !fit(tiles, clusters, limit)) continue;
      plan.fits = true;
      plan.per_sm = per_sm;
      plan.tiles = tiles;
      plan.clusters = tiles < clusters ? tiles : clusters;
      plan.shared = fused_layout(s).bytes;
      return true;
    }
  }
  return false;
}

// `columns` caps the width of a CTA's slice (0: no cap), for kernels that keep sums over it in registers; `most_per_sm`
// is what the kernel was compiled for.
inline FusedPlan plan_fused(int64_t n, int64_t d, int64_t r, int shrinks, int expands, int extra, bool second,
                            int columns, int most_per_sm, const Device& device) {
  FusedPlan plan;
  FusedShape& s = plan.shape;
  s = fused_shape(n, d, r, shrinks, expands);
  if (s.rank == 0) return plan;
  s.extra = extra;
  s.second = second;
  const auto fit = [&](int64_t tiles, int64_t clusters, int64_t limit) {
    // No more stages than there are tiles for: memory left over is room for a CTA that copies (edit_copy.cuh).
    const int64_t turns = ceil_div(tiles, clusters);
    s.stages = turns < kMostStages ? static_cast<int>(turns) : kMostStages;
    const int least = turns < 2 ? 1 : 2;
    while (s.stages > least && fused_layout(s).bytes > limit) --s.stages;
    return fused_layout(s).bytes <= limit;
  };
  // The cluster with the largest tiles on a multiprocessor, beside the matrices: what a turn costs hardly depends on
  // how much it moves. Of such, two CTAs on one, whose turns overlap, then the smallest. Where there are too few rows
  // for all, larger ones share what every CTA begins with.
  const int usual = device.largest_cluster < 8 ? device.largest_cluster : 8;
  FusedPlan best;
  for (int most = 1; most <= device.largest_cluster; most *= 2) {
    const bool few_rows = ceil_div(n, 16) * most < device.multiprocessors;
    if (few_rows && ceil_div(d, most) > 512 && 2 * most <= usual) continue;
    s.width = static_cast<int>(round_up(ceil_div(d, most), 16 * kFusedWarps));
    s.cluster = static_cast<int>(ceil_div(d, s.width));  // fewer than `most` where the last ones would have no columns
    const bool too_wide = columns > 0 && s.width > columns;
    if (too_wide || !plan_tiles(plan, n, most_per_sm, device, fit)) continue;
    const auto moved = [](const FusedPlan& p) { return p.per_sm * p.shape.rows * p.shape.width; };
    const bool better = moved(plan) > moved(best) || (moved(plan) == moved(best) && plan.per_sm > best.per_sm);
    if (best.fits && (most > usual || !better)) continue;
    best = plan;
    if (few_rows) break;
  }
  return best;
}

// A pass with 32 or 64 coordinates whose matrices are in registers: more than two tiles are on their way then, and
// turns overlap. For a few tiles a CTA it is not worth its beginning, in which none is.
inline FusedPlan plan_held(int64_t n, int64_t d, int64_t r, int shrinks, int expands, const Device& device) {
  constexpr int kHeldTurns = 4, kHeldStages = 3;
  FusedPlan plan;
  FusedShape& s = plan.shape;
  s = fused_shape(n, d, r, shrinks, expands);
  s.held = true;
  s.rows = kHeldRows;
  s.width = kHeldWidth;
  s.cluster = static_cast<int>(ceil_div(d, kHeldWidth));
  const bool wasteful = 4 * d < 3 * static_cast<int64_t>(s.cluster) * s.width;  // columns that are not there
  if (s.rank <= 16 || s.shrinks + s.expands > 2 || wasteful || s.cluster > device.largest_cluster) return plan;
  plan.clusters = resident_clusters(device, s.cluster, 1);
  plan.tiles = ceil_div(n, s.rows);
  if (plan.clusters < 1 || plan.tiles < kHeldTurns * plan.clusters) return plan;
  s.stages = kMostStages;
  while (s.stages > kHeldStages && fused_layout(s).bytes > device.shared) --s.stages;
  plan.shared = fused_layout(s).bytes;
  plan.fits = plan.shared <= device.shared;
  return plan;
}

// A plain pass: the forward, or dh and the coordinates.
inline FusedPlan plan_pass(int64_t n, int64_t d, int64_t r, int shrinks, int expands, const Device& device) {
  const FusedPlan held = plan_held(n, d, r, shrinks, expands, device);
  if (held.fits) return held;
  return plan_fused(n, d, r, shrinks, expands, 0, false, 0, per_sm_of_rank(padded_rank(r)), device);
}

// The pass where the matrices do not stay in shared memory (edit_streamed.cuh): pieces of the columns, one CTA a tile.
inline FusedPlan plan_streamed(int64_t n, int64_t d, int64_t r, int shrinks, int expands, const Device& device) {
  FusedPlan plan;
  FusedShape& s = plan.shape;
  s = fused_shape(n, d, r, shrinks, expands);
  if (s.rank == 0) return plan;
  const auto fit = [&](int64_t, int64_t, int64_t limit) {
    for (s.width = 512; s.width >= 128; s.width /= 2) {
      const bool half_would_do = s.width > 128 && s.width >= 2 * d;
      s.pieces = static_cast<int>(ceil_div(d, s.width));
      if (!half_would_do && fused_layout(s).bytes <= limit) return true;
    }
    return false;
  };
  plan_tiles(plan, n, per_sm_of_rank(s.rank), device, fit);
  return plan;
}

// The one-pass backward (edit_both.cuh): g and h streamed, sums over a slice of so many columns at most in registers.
FASTREFT_HOST_DEVICE constexpr int both_columns(int rank) { return rank > 16 ? 256 : 512; }
FASTREFT_HOST_DEVICE constexpr int both_depth(int rank) {
  return rank > 16 ? rank : 16;
}  // rows of the sums: mma's 16 at least

inline FusedPlan plan_both(int64_t n, int64_t d, int64_t r, int expands, const Device& device) {
  const int rank = padded_rank(r);
  if (rank > 32) return {};
  Device usual = device;  // clusters of 16, of which fewer run at once than would fill it, were never timed here
  if (rank > 16 && usual.largest_cluster > 8) usual.largest_cluster = 8;
  return plan_fused(n, d, r, 1, expands, 2 * both_depth(rank), true, both_columns(rank), 1, usual);
}

// ---- copying what is not edited (edit_copy.cuh) --------------------------------------------------------------------

constexpr int kCopyRows = 256;  // of a CTA at most, a byte of shared memory each: less than any pass has

// About four CTAs a multiprocessor, each of which reads the whole index.
inline int plan_copy(int64_t total, const Device& device) {
  const int64_t rows = ceil_div(total, 4 * device.multiprocessors);
  return static_cast<int>(rows < kCopyRows ? rows : kCopyRows);
}
inline int64_t copy_blocks(int64_t total, int copy_rows, int cluster) {
  return copy_rows > 0 ? round_up(ceil_div(total, copy_rows), cluster) : 0;
}

// ---- CUDA cores: one pass over rows (edit_simple.cuh) -------------------------------------------------------------

constexpr int kSimpleThreads = 256, kSimpleRows = 4, kSimpleChunk = 4;

struct SimplePlan {
  bool fits = false;
  int64_t blocks = 0;
  int64_t shared = 0;
};

// `size`: bytes of the type sums run in.
inline SimplePlan plan_simple(int64_t n, int64_t r, int64_t size, const Device& device) {
  SimplePlan plan;
  plan.blocks = ceil_div(n, kSimpleRows);
  plan.shared = (2 * kSimpleRows * r + kSimpleThreads / 32 * 2 * kSimpleChunk * kSimpleRows) * size;
  plan.fits = plan.shared <= device.shared && plan.blocks < (int64_t{1} << 31);
  return plan;
}

// ---- sums over rows: the weights' gradients -----------------------------------------------------------------------

constexpr int kGradThreads = 128, kGradRows = 16, kGradChunk = 8, kGradPerSm = 2;

constexpr int64_t grad_shared(int64_t size) { return 3 * kGradRows * kGradChunk * size + kGradRows * 8; }

struct GradPlan {
  int64_t range = 0;  // rows a partial sum covers, a multiple of kGradRows
  int splits = 0;     // partial sums
  int64_t column_blocks = 0;
  int chunks = 0;  // of coordinates
};

// Ranges of rows such that the CTAs fill the places there are, `per_sm` on a multiprocessor, once: a few more than that
// would take the time of twice as many. At most 64, whose partial sums are then added.
inline GradPlan plan_grad(int64_t n, int64_t d, int64_t r, int64_t columns, int64_t coordinates, int per_sm,
                          const Device& device) {
  GradPlan plan;
  plan.column_blocks = ceil_div(d, columns);
  plan.chunks = static_cast<int>(ceil_div(r, coordinates));
  const int64_t blocks = plan.column_blocks * plan.chunks;
  if (n <= 0 || blocks == 0) return plan;
  int64_t splits = per_sm * device.multiprocessors / blocks;
  if (splits < 1) splits = 1;
  if (splits > 64) splits = 64;
  if (splits > ceil_div(n, kGradRows)) splits = ceil_div(n, kGradRows);
  plan.range = round_up(ceil_div(n, splits), kGradRows);
  plan.splits = static_cast<int>(ceil_div(n, plan.range));
  return plan;
}

// On tensor cores (edit_sums.cuh), in elements of 2 bytes.
constexpr int kSumsRows = 32, kSumsStages = 5, kSumsThreads = kFusedThreads + 64;  // two warps move

// Of a CTA: as many as leave registers for a warp's sums, of which there are `three` where gz is not gp.
FASTREFT_HOST_DEVICE constexpr int sums_columns(int depth, bool three) { return depth > 32 && three ? 128 : 256; }

// A row's coordinates: z, gp and gz, the last where it may be asked for. Elements from one row's to the next: no bank
// conflicts, so that a tile is one bulk copy.
FASTREFT_HOST_DEVICE constexpr int packed_parts(int depth, bool three) { return depth > 32 && !three ? 2 : 3; }
FASTREFT_HOST_DEVICE constexpr int packed_pitch(int depth, int parts) { return parts * depth + 8; }

struct SumsLayout {
  int pitch = 0;        // of g and h
  int h = 0;            // from g to h
  int coordinates = 0;  // from g to [kSumsRows, packed_pitch]
  int stage = 0;        // elements of one stage
};
FASTREFT_HOST_DEVICE constexpr SumsLayout sums_layout(int depth, bool three) {
  const int columns = sums_columns(depth, three);
  SumsLayout at;
  at.pitch = columns + 8;
  at.h = kSumsRows * at.pitch;
  at.coordinates = 2 * at.h;
  at.stage = at.coordinates + kSumsRows * packed_pitch(depth, packed_parts(depth, three));
  return at;
}
// Bytes: the stages and, of each, two Arrivals.
constexpr int64_t sums_shared(int depth, bool three, int stages) {
  return static_cast<int64_t>(stages) * (sums_layout(depth, three).stage * 2 + 16);
}
constexpr int sums_stages(int depth, bool three, const Device& device) {
  int stages = kSumsStages;
  while (stages > 1 && sums_shared(depth, three, stages) > device.shared) --stages;
  return stages;
}

}  // namespace fastreft
