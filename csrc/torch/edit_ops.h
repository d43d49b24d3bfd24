// The edit's ops as functions of tensors: they check the arguments, allocate results, fill the structs of edit.h and
// call the kernels. Compiled twice: for the dispatcher (edit.cpp), and for quick calls past it (quick/edit_rows.cpp).
#pragma once
#include <tuple>
#include <utility>

#include "tensors.h"

namespace fastreft {

struct Shape {
  int64_t r, d;
};

inline Shape check(const Tensor& h, const Tensor& U, const MaybeTensor& V, const MaybeTensor& P, const MaybeTensor& b,
                   const MaybeTensor& c, int64_t act, bool tied) {
  STD_TORCH_CHECK(h.dim() >= 1, "h must have at least one dimension");
  STD_TORCH_CHECK(U.dim() == 2, "U must be a matrix (r, d)");
  const Shape s{U.size(0), h.size(h.dim() - 1)};
  auto device = [&](const MaybeTensor& t, const char* name) {
    if (t)
      STD_TORCH_CHECK(t->is_cpu() == h.is_cpu() && device_index(*t) == device_index(h), name, " must be on h's device");
  };
  auto matrix = [&](const MaybeTensor& t, const char* name) {
    device(t, name);
    if (t)
      STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == s.r && t->size(1) == s.d, name, " must be (", s.r, ", ", s.d, ")");
  };
  auto vector = [&](const MaybeTensor& t, const char* name) {
    device(t, name);
    if (t) STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == s.r, name, " must be (", s.r, ",)");
  };
  matrix(U, "U");
  matrix(V, "V");
  matrix(P, "P");
  vector(b, "b");
  vector(c, "c");
  STD_TORCH_CHECK(act >= 0 && act < static_cast<int64_t>(Act::count), "act is ", act, ", no such activation");
  STD_TORCH_CHECK(!(tied && P), "tied says that P is U: P must be None");
  return s;
}

// Makes the weights contiguous where they are not; they must outlive the pointers.
inline Weights weights(Tensor& U, MaybeTensor& V, MaybeTensor& P, MaybeTensor& b, MaybeTensor& c, int64_t act,
                       bool tied) {
  Weights w;
  if (!U.is_contiguous()) U = as_contiguous(U);
  for (MaybeTensor* t : {&V, &P, &b, &c}) make_contiguous(*t);
  w.U = weight(U, "U");
  w.V = weight(V, "V");
  w.P = tied ? w.U : weight(P, "P");
  w.b = weight(b, "b");
  w.c = weight(c, "c");
  w.act = static_cast<Act>(act);
  w.tied = tied;
  return w;
}

inline const int64_t* index_of(const Tensor& rows, const Tensor& h) {
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && rows.dim() == 1 && rows.is_contiguous() &&
                      rows.is_cpu() == h.is_cpu() && device_index(rows) == device_index(h),
                  "rows must be a contiguous vector of int64 on h's device");
  return static_cast<const int64_t*>(rows.data_ptr());
}

// To the kernels of the tensors' device.
void run(EditArgs& args, const Tensor& on);
void run(EditGradArgs& args, const Tensor& on);

// ---- the ops -----------------------------------------------------------------------------------------------------

inline std::tuple<Tensor, Tensor> edit(Tensor h, Tensor U, MaybeTensor V, MaybeTensor P, MaybeTensor b, MaybeTensor c,
                                       int64_t act, bool tied, bool save) {
  const Shape s = check(h, U, V, P, b, c, act, tied);
  const Tensor source = readable(h);
  EditArgs args;
  args.n = args.total = rows_in(h);
  args.d = s.d;
  args.r = s.r;
  args.type = dtype_of(h, "h");
  args.w = weights(U, V, P, b, c, act, tied);
  Tensor out = result_like(h);
  Tensor z = empty_as(h, {save ? args.n : 0, kept_per_row(args.w.act, s.r)}, kept_type(h));
  args.h = *addressable(source);
  args.out = *addressable(out);
  args.z = save ? z.data_ptr() : nullptr;
  run(args, h);
  return {out, z};
}

// Edits the listed rows of `h` into `out`, h itself or what edited_apart gave; returns (saved, z), empty without
// `save`.
inline std::tuple<Tensor, Tensor> edit_listed(const Tensor& h, const Tensor& out, Tensor& rows, Tensor& U,
                                              MaybeTensor& V, MaybeTensor& P, MaybeTensor& b, MaybeTensor& c,
                                              int64_t act, bool tied, bool save) {
  const Shape s = check(h, U, V, P, b, c, act, tied);
  EditArgs args;
  args.n = rows.numel();
  args.total = rows_in(h);
  args.d = s.d;
  args.r = s.r;
  args.type = dtype_of(h, "h");
  args.index = index_of(rows, h);
  args.w = weights(U, V, P, b, c, act, tied);
  Tensor saved = empty_as(h, {save ? args.n : 0, s.d}, raw_dtype(h));
  Tensor z = empty_as(h, {save ? args.n : 0, kept_per_row(args.w.act, s.r)}, kept_type(h));
  args.h = *addressable(h);
  args.out = &out == &h ? args.h : *addressable(out);
  args.saved = save ? saved.data_ptr() : nullptr;
  args.z = save ? z.data_ptr() : nullptr;
  run(args, h);
  return {saved, z};
}

inline std::tuple<Tensor, Tensor> edit_rows_(Tensor h, Tensor rows, Tensor U, MaybeTensor V, MaybeTensor P,
                                             MaybeTensor b, MaybeTensor c, int64_t act, bool tied, bool save) {
  const Tensor target = readable(h);
  auto result = edit_listed(target, target, rows, U, V, P, b, c, act, tied, save);
  if (target.data_ptr() != h.data_ptr()) copy_into(h, target);
  return result;
}

// Where an op that leaves `t` alone reads, and where it writes. A GPU's kernels copy the rows they do not edit; on a
// CPU, and where t's rows cannot be addressed, a copy is edited in place.
inline std::pair<Tensor, Tensor> edited_apart(const Tensor& t) {
  Tensor out = result_like(t);
  if (!t.is_cpu() && addressable(t)) return {t, out};
  copy_into(out, t);
  return {out, out};
}

inline std::tuple<Tensor, Tensor, Tensor> edit_rows(Tensor h, Tensor rows, Tensor U, MaybeTensor V, MaybeTensor P,
                                                    MaybeTensor b, MaybeTensor c, int64_t act, bool tied, bool save) {
  const auto [from, out] = edited_apart(h);
  const auto [saved, z] = edit_listed(from, out, rows, U, V, P, b, c, act, tied, save);
  return {out, saved, z};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // dU, dV, dP, db, dc; empty where there is none

inline Gradients gradients(EditGradArgs& args, const Tensor& z, Tensor& U, MaybeTensor& V, MaybeTensor& P,
                           MaybeTensor& b, MaybeTensor& c, int64_t act, bool tied) {
  args.w = weights(U, V, P, b, c, act, tied);
  STD_TORCH_CHECK(
      z.is_contiguous() && z.dim() == 2 && z.size(0) == args.n && z.size(1) == kept_per_row(args.w.act, args.r),
      "z must be what the forward saved");
  auto like = [&](const MaybeTensor& t, void** to) {
    if (!t) return empty_as(U, {0}, raw_dtype(U));
    const auto sizes = t->sizes();
    Tensor out = empty_as(*t, {sizes.begin(), sizes.end()}, raw_dtype(*t));
    *to = out.data_ptr();
    return out;
  };
  Tensor dU = like(U, &args.dU), dV = like(V, &args.dV), dP = like(P, &args.dP);
  Tensor db = like(b, &args.db), dc = like(c, &args.dc);
  args.z = z.data_ptr();
  run(args, z);
  return {dU, dV, dP, db, dc};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> edit_backward(Tensor g, Tensor h, Tensor z, Tensor U,
                                                                                MaybeTensor V, MaybeTensor P,
                                                                                MaybeTensor b, MaybeTensor c,
                                                                                int64_t act, bool tied, bool need_dh) {
  const Shape s = check(g, U, V, P, b, c, act, tied);
  EditGradArgs args;
  args.n = args.total = rows_in(g);
  args.d = s.d;
  args.r = s.r;
  args.type = dtype_of(h, "h");
  STD_TORCH_CHECK(g.scalar_type() == h.scalar_type(), "g must have h's dtype");
  STD_TORCH_CHECK(rows_in(h) == args.n && h.size(h.dim() - 1) == s.d, "g must have h's shape");
  const Tensor from = readable(g), before = readable(h);
  args.g = *addressable(from);
  args.h = *addressable(before);
  Tensor dh = need_dh ? result_like(h) : empty_as(h, {0}, raw_dtype(h));
  if (need_dh) args.dh = *addressable(dh);
  auto [dU, dV, dP, db, dc] = gradients(args, z, U, V, P, b, c, act, tied);
  return {dh, dU, dV, dP, db, dc};
}

// Turns the listed rows of g from d loss / d out into d loss / d h, in dh: g itself or what edited_apart gave. Without
// dh g is only read.
inline Gradients edit_listed_backward(const Tensor& g, const Tensor* dh, Tensor& rows, Tensor& saved, Tensor& z,
                                      Tensor& U, MaybeTensor& V, MaybeTensor& P, MaybeTensor& b, MaybeTensor& c,
                                      int64_t act, bool tied) {
  const Shape s = check(g, U, V, P, b, c, act, tied);
  EditGradArgs args;
  args.n = rows.numel();
  args.total = rows_in(g);
  args.d = s.d;
  args.r = s.r;
  args.type = dtype_of(g, "g");
  args.index = index_of(rows, g);
  STD_TORCH_CHECK(saved.scalar_type() == g.scalar_type() && saved.is_contiguous() && saved.dim() == 2 &&
                      saved.size(0) == args.n && saved.size(1) == s.d,
                  "saved must be what the forward saved");
  args.g = *addressable(g);
  if (dh) args.dh = dh == &g ? args.g : *addressable(*dh);
  args.h = *addressable(saved);
  return gradients(args, z, U, V, P, b, c, act, tied);
}

inline Gradients edit_rows_backward_(Tensor g, Tensor rows, Tensor saved, Tensor z, Tensor U, MaybeTensor V,
                                     MaybeTensor P, MaybeTensor b, MaybeTensor c, int64_t act, bool tied,
                                     bool need_dh) {
  const Tensor target = readable(g);
  Gradients out = edit_listed_backward(target, need_dh ? &target : nullptr, rows, saved, z, U, V, P, b, c, act, tied);
  if (need_dh && target.data_ptr() != g.data_ptr()) copy_into(g, target);
  return out;
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> edit_rows_backward(Tensor g, Tensor rows,
                                                                                     Tensor saved, Tensor z, Tensor U,
                                                                                     MaybeTensor V, MaybeTensor P,
                                                                                     MaybeTensor b, MaybeTensor c,
                                                                                     int64_t act, bool tied) {
  const auto [from, dh] = edited_apart(g);
  auto [dU, dV, dP, db, dc] = edit_listed_backward(from, &dh, rows, saved, z, U, V, P, b, c, act, tied);
  return {dh, dU, dV, dP, db, dc};
}

}  // namespace fastreft
