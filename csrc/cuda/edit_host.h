// Host helpers that the forward and the backward share: alignment questions, what a pass is told, and its two roads.
#pragma once
#include "edit_units.h"

namespace fastreft {

inline int element_size(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }
inline bool sixteen_bits(DType type) { return type == DType::bf16 || type == DType::f16; }
inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

// Whether every row starts on 16 bytes (a null pointer has no rows).
inline bool vector_rows(const Rows& rows, DType type) {
  const int64_t size = element_size(type);
  return rows.p == nullptr || (aligned16(rows.p) && rows.outer_stride * size % 16 == 0 &&
                               (rows.inner <= 1 || rows.inner_stride * size % 16 == 0));
}
inline bool vector_matrix(const Matrix2& m) { return aligned16(m.w.p) && aligned16(m.minus.p); }

// Whether a pass may move 16 bytes at a time.
inline bool vector_pass(const Pass& p, DType type) {
  return p.d % (16 / element_size(type)) == 0 && vector_rows(p.in, type) && vector_rows(p.out, type) &&
         aligned16(p.saved) && vector_matrix(p.shrink[0]) && vector_matrix(p.shrink[1]) && vector_matrix(p.expand[0]) &&
         vector_matrix(p.expand[1]);
}

// V and P as a pass takes them: one matrix, V - P, where the activation is the identity.
inline void set_both(Matrix2 (&pair)[2], const Weights& w) {
  pair[0].w = w.V;
  if (w.act == Act::identity && w.V.p != nullptr && w.P.p != nullptr) {
    pair[0].minus = w.P;
  } else {
    pair[1].w = w.P;
  }
}

// What a pass is told in both directions: the forward's from h to out, the backward's from g to dh.
template <typename Args>
Pass pass_between(const Rows& in, const Rows& out, const Args& args, const Device& device) {
  Pass p;
  p.n = args.n;
  p.total = args.total;
  p.d = static_cast<int>(args.d);
  p.r = static_cast<int>(args.r);
  p.in = in;
  p.out = out;
  p.index = args.index;
  p.act = args.w.act;
  const bool elsewhere = out.p != nullptr && out.p != in.p;
  if (args.index != nullptr && elsewhere) p.copy_rows = plan_copy(args.total, device);
  return p;
}

inline int present(const Matrix2 (&pair)[2]) { return (pair[0].w.p != nullptr) + (pair[1].w.p != nullptr); }

// Bytes of the type that sums run in.
inline int sum_size(DType type) { return type == DType::f64 ? 8 : 4; }

template <bool Backward>
int simple_pass(const Pass& p, DType type, bool shrinks, void* stream, const Device& device) {
  const SimplePlan plan = plan_simple(p.n, p.r, sum_size(type), device);
  if (!plan.fits) return kInvalidValue;
  Grid grid;
  grid.x = plan.blocks + copy_blocks(p.total, p.copy_rows, 1);
  if (grid.x == 0) return 0;
  grid.threads = kSimpleThreads;
  grid.shared = plan.shared;
  const bool vector = vector_pass(p, type);
  return Backward ? simple_backward(p, vector, shrinks, type, grid, stream)
                  : simple_forward(p, vector, type, grid, stream);
}

// The plan of a pass on tensor cores; `fits` is false where the CUDA cores have to do it.
inline FusedPlan fused_plan_of(const Pass& p, DType type, const Device& device) {
  if (device.major < 8 || !sixteen_bits(type) || !vector_pass(p, type)) return {};
  const FusedPlan resident = plan_pass(p.n, p.d, p.r, present(p.shrink), present(p.expand), device);
  return resident.fits ? resident : plan_streamed(p.n, p.d, p.r, present(p.shrink), present(p.expand), device);
}

inline bool all_fp32(const Matrix2& matrix) {
  const auto is = [](const Weight& w) { return w.p == nullptr || w.type == DType::f32; };
  return is(matrix.w) && is(matrix.minus);
}

// The argument and the grid of a pass on tensor cores.
inline Fused fused_of(const Pass& p, const FusedPlan& plan) {
  Fused f;
  f.pass = p;
  f.shape = plan.shape;
  f.at = fused_layout(plan.shape);
  f.shrink = shrink_work(plan.shape);
  f.tiles = plan.tiles;
  f.clusters = plan.clusters;
  f.shrink_from = p.shrink[0].w.p == nullptr;
  f.expand_from = p.expand[0].w.p == nullptr;
  f.fp32 = all_fp32(p.shrink[0]) && all_fp32(p.shrink[1]) && all_fp32(p.expand[0]) && all_fp32(p.expand[1]);
  return f;
}
inline Grid fused_grid(const Pass& p, const FusedPlan& plan, const Device& device) {
  Grid grid;
  grid.cluster = plan.shape.cluster;
  grid.x = plan.clusters * grid.cluster + copy_blocks(p.total, p.copy_rows, grid.cluster);
  grid.threads = plan.shape.pieces > 1 ? kFusedThreads : kTeamThreads;
  grid.shared = plan.shared;
  grid.early = device.major >= 9 && plan.shape.pieces == 1;
  return grid;
}

struct Roads {
  decltype(&fused_forward) fused, held, streamed;
};

template <bool Backward>
int fused_pass(const Pass& p, DType type, const FusedPlan& plan, void* stream, const Device& device) {
  const auto roads = Backward ? Roads{fused_backward, held_backward, streamed_backward}
                              : Roads{fused_forward, held_forward, streamed_forward};
  const auto start = plan.shape.pieces > 1 ? roads.streamed : plan.shape.held ? roads.held : roads.fused;
  return start(fused_of(p, plan), type, fused_grid(p, plan, device), stream);
}

}  // namespace fastreft
