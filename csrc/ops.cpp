// The only file that sees torch: checks arguments, allocates results, fills the structs of edit.h and calls the
// kernels. Built against the stable ABI of torch 2.10, so that one build serves every later torch.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "cpu.h"

namespace fastreft {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// ---- what torch gives, as edit.h wants it ------------------------------------------------------------------------

DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: STD_TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16");
  }
}

Weight weight(const MaybeTensor& t, const char* name) {
  if (!t) return {};
  STD_TORCH_CHECK(t->is_contiguous(), name, " must be contiguous");
  return {t->data_ptr(), dtype_of(*t, name)};
}

// The rows of t (..., d), if unit stride inside a row and two strides between rows can address them.
std::optional<Rows> addressable(const Tensor& t) {
  const int64_t leading = t.dim() - 1;
  if (t.size(leading) > 1 && t.stride(leading) != 1) return std::nullopt;
  int64_t sizes[2] = {1, 1}, strides[2] = {0, 0}, used = 0;  // innermost first, neighbours merged
  for (int64_t i = leading - 1; i >= 0; --i) {
    if (t.size(i) == 1) continue;
    if (used && t.stride(i) == strides[used - 1] * sizes[used - 1]) {
      sizes[used - 1] *= t.size(i);
      continue;
    }
    if (used == 2) return std::nullopt;
    sizes[used] = t.size(i);
    strides[used++] = t.stride(i);
  }
  Rows rows;
  rows.p = t.data_ptr();
  if (used < 2) {
    rows.outer_stride = strides[0];
  } else {
    rows.inner = sizes[0];
    rows.inner_stride = strides[0];
    rows.outer_stride = strides[1];
  }
  return rows;
}

int64_t rows_in(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

// t, or a copy of it whose rows can be addressed.
Tensor readable(const Tensor& t) { return addressable(t) ? t : torch::stable::contiguous(t); }

Tensor empty_as(const Tensor& like, const std::vector<int64_t>& sizes, ScalarType type) {
  return torch::stable::new_empty(like, sizes, type);
}

// A large result will be written once, front to back: in huge pages its first touch costs a fraction.
Tensor result_like(const Tensor& t) {
  const auto sizes = t.sizes();
  Tensor out = empty_as(t, std::vector<int64_t>(sizes.begin(), sizes.end()), t.scalar_type());
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(out.data_ptr()), end = begin + out.numel() * out.element_size();
  const uintptr_t first = (begin + page - 1) / page * page, last = end / page * page;
  if (t.is_cpu() && last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return out;
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, void (*f)(int64_t, int64_t, void*), void* context) {
  if (begin < end)
    torch::stable::parallel_for(begin, end, grain, [=](int64_t from, int64_t to) { f(from, to, context); });
}

struct Shape {
  int64_t r, d;
};

Shape check(const Tensor& h, const Tensor& U, const MaybeTensor& V, const MaybeTensor& P, const MaybeTensor& b,
            const MaybeTensor& c, int64_t act, bool tied) {
  STD_TORCH_CHECK(h.dim() >= 1, "h must have at least one dimension");
  STD_TORCH_CHECK(U.dim() == 2, "U must be a matrix (r, d)");
  const Shape s{U.size(0), h.size(h.dim() - 1)};
  auto matrix = [&](const MaybeTensor& t, const char* name) {
    if (t)
      STD_TORCH_CHECK(t->dim() == 2 && t->size(0) == s.r && t->size(1) == s.d, name, " must be (", s.r, ", ", s.d, ")");
  };
  auto vector = [&](const MaybeTensor& t, const char* name) {
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

Weights weights(const Tensor& U, const MaybeTensor& V, const MaybeTensor& P, const MaybeTensor& b, const MaybeTensor& c,
                int64_t act, bool tied) {
  Weights w;
  w.U = weight(U, "U");
  w.V = weight(V, "V");
  w.P = tied ? w.U : weight(P, "P");
  w.b = weight(b, "b");
  w.c = weight(c, "c");
  w.act = static_cast<Act>(act);
  w.tied = tied;
  return w;
}

ScalarType kept_type(const Tensor& h) {
  return h.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

const int64_t* index_of(const Tensor& rows) {
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && rows.dim() == 1 && rows.is_contiguous(),
                  "rows must be a contiguous vector of int64");
  return static_cast<const int64_t*>(rows.data_ptr());
}

void run(const EditArgs& args, const Tensor&) { edit_forward_cpu(args, &parallel_for); }
void run(const EditGradArgs& args, const Tensor&) { edit_backward_cpu(args, &parallel_for); }

// ---- the ops -----------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor> edit(Tensor h, Tensor U, MaybeTensor V, MaybeTensor P, MaybeTensor b, MaybeTensor c,
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

// Edits the listed rows of `h`; returns (saved, z), empty without `save`.
std::tuple<Tensor, Tensor> edit_rows_(Tensor h, Tensor rows, Tensor U, MaybeTensor V, MaybeTensor P, MaybeTensor b,
                                      MaybeTensor c, int64_t act, bool tied, bool save) {
  const Shape s = check(h, U, V, P, b, c, act, tied);
  const auto in_place = addressable(h);
  const Tensor target = in_place ? h : torch::stable::contiguous(h);
  EditArgs args;
  args.n = rows.numel();
  args.total = rows_in(h);
  args.d = s.d;
  args.r = s.r;
  args.type = dtype_of(h, "h");
  args.index = index_of(rows);
  args.w = weights(U, V, P, b, c, act, tied);
  Tensor saved = empty_as(h, {save ? args.n : 0, s.d}, h.scalar_type());
  Tensor z = empty_as(h, {save ? args.n : 0, kept_per_row(args.w.act, s.r)}, kept_type(h));
  args.h = args.out = *addressable(target);
  args.saved = save ? saved.data_ptr() : nullptr;
  args.z = save ? z.data_ptr() : nullptr;
  run(args, h);
  if (!in_place) torch::stable::copy_(h, target);
  return {saved, z};
}

std::tuple<Tensor, Tensor, Tensor> edit_rows(Tensor h, Tensor rows, Tensor U, MaybeTensor V, MaybeTensor P,
                                             MaybeTensor b, MaybeTensor c, int64_t act, bool tied, bool save) {
  Tensor out = result_like(h);
  torch::stable::copy_(out, h);
  auto [saved, z] = edit_rows_(out, rows, U, V, P, b, c, act, tied, save);
  return {out, saved, z};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // dU, dV, dP, db, dc; empty where there is none

Gradients gradients(EditGradArgs& args, const Tensor& z, const Tensor& U, const MaybeTensor& V, const MaybeTensor& P,
                    const MaybeTensor& b, const MaybeTensor& c, int64_t act, bool tied) {
  args.w = weights(U, V, P, b, c, act, tied);
  STD_TORCH_CHECK(
      z.is_contiguous() && z.dim() == 2 && z.size(0) == args.n && z.size(1) == kept_per_row(args.w.act, args.r),
      "z must be what the forward saved");
  auto like = [&](const MaybeTensor& t, void** to) {
    if (!t) return empty_as(U, {0}, U.scalar_type());
    const auto sizes = t->sizes();
    Tensor out = empty_as(*t, std::vector<int64_t>(sizes.begin(), sizes.end()), t->scalar_type());
    *to = out.data_ptr();
    return out;
  };
  Tensor dU = like(U, &args.dU), dV = like(V, &args.dV), dP = like(P, &args.dP);
  Tensor db = like(b, &args.db), dc = like(c, &args.dc);
  args.z = z.data_ptr();
  run(args, z);
  return {dU, dV, dP, db, dc};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> edit_backward(Tensor g, Tensor h, Tensor z, Tensor U,
                                                                         MaybeTensor V, MaybeTensor P, MaybeTensor b,
                                                                         MaybeTensor c, int64_t act, bool tied,
                                                                         bool need_dh) {
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
  Tensor dh = need_dh ? result_like(h) : empty_as(h, {0}, h.scalar_type());
  if (need_dh) args.dh = *addressable(dh);
  auto [dU, dV, dP, db, dc] = gradients(args, z, U, V, P, b, c, act, tied);
  return {dh, dU, dV, dP, db, dc};
}

// Turns the listed rows of g from d loss / d out into d loss / d h, in place; with need_dh false g is only read.
Gradients edit_rows_backward_(Tensor g, Tensor rows, Tensor saved, Tensor z, Tensor U, MaybeTensor V, MaybeTensor P,
                              MaybeTensor b, MaybeTensor c, int64_t act, bool tied, bool need_dh) {
  const Shape s = check(g, U, V, P, b, c, act, tied);
  EditGradArgs args;
  args.n = rows.numel();
  args.total = rows_in(g);
  args.d = s.d;
  args.r = s.r;
  args.type = dtype_of(g, "g");
  args.index = index_of(rows);
  STD_TORCH_CHECK(saved.scalar_type() == g.scalar_type() && saved.is_contiguous() && saved.dim() == 2 &&
                      saved.size(0) == args.n && saved.size(1) == s.d,
                  "saved must be what the forward saved");
  const auto in_place = addressable(g);
  const Tensor target = in_place ? g : torch::stable::contiguous(g);
  args.g = *addressable(target);
  if (need_dh) args.dh = args.g;
  args.h = *addressable(saved);
  Gradients out = gradients(args, z, U, V, P, b, c, act, tied);
  if (!in_place && need_dh) torch::stable::copy_(g, target);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> edit_rows_backward(Tensor g, Tensor rows, Tensor saved,
                                                                              Tensor z, Tensor U, MaybeTensor V,
                                                                              MaybeTensor P, MaybeTensor b,
                                                                              MaybeTensor c, int64_t act, bool tied) {
  Tensor dh = result_like(g);
  torch::stable::copy_(dh, g);
  auto [dU, dV, dP, db, dc] = edit_rows_backward_(dh, rows, saved, z, U, V, P, b, c, act, tied, true);
  return {dh, dU, dV, dP, db, dc};
}

Matrix matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
  const int64_t rows = t.dim() == 2 ? t.size(0) : 1;
  return {t.data_ptr(), rows, rows ? t.numel() / rows : 0, dtype_of(t, name)};
}

// Each matrix gets orthonormal rows. Fails, with nothing changed, on a value that is not finite.
void retract_(std::vector<Tensor> matrices) {
  std::vector<Matrix> all;
  for (const Tensor& t : matrices) {
    STD_TORCH_CHECK(t.dim() == 2 && t.size(0) <= t.size(1), "matrices must be (r, d) with r <= d");
    all.push_back(matrix(t, "matrices"));
  }
  const int64_t bad = retract_cpu(all.data(), all.size(), &parallel_for);
  STD_TORCH_CHECK(bad < 0, "matrices[", bad, "] holds a value that is not finite");
}

// One AdamW step of every parameter; with `orthonormal` each is an R: projected gradient, no decay, retraction.
void step_(std::vector<Tensor> params, std::vector<Tensor> grads, std::vector<Tensor> m, std::vector<Tensor> v,
           bool orthonormal, double lr, double beta1, double beta2, double eps, double weight_decay, double correction1,
           double correction2) {
  STD_TORCH_CHECK(params.size() == grads.size() && params.size() == m.size() && params.size() == v.size(),
                  "params, grads, m and v must be lists of one length");
  std::vector<StepItem> items;
  for (size_t i = 0; i < params.size(); ++i) {
    STD_TORCH_CHECK(grads[i].scalar_type() == params[i].scalar_type() && grads[i].numel() == params[i].numel() &&
                        grads[i].is_contiguous(),
                    "grads[", i, "] must be contiguous, of its parameter's shape and dtype");
    for (const Tensor& state : {m[i], v[i]})
      STD_TORCH_CHECK(
          state.scalar_type() == kept_type(params[i]) && state.numel() == params[i].numel() && state.is_contiguous(),
          "m and v must be contiguous, of the parameter's shape, fp32 (fp64 for fp64)");
    StepItem item;
    item.param = matrix(params[i], "params");
    STD_TORCH_CHECK(!orthonormal || (params[i].dim() == 2 && item.param.r <= item.param.d),
                    "an orthonormal parameter must be (r, d) with r <= d");
    item.g = grads[i].data_ptr();
    item.m = m[i].data_ptr();
    item.v = v[i].data_ptr();
    item.orthonormal = orthonormal;
    items.push_back(item);
  }
  const StepArgs step{lr, beta1, beta2, eps, weight_decay, correction1, correction2};
  const int64_t bad = step_cpu(items.data(), items.size(), step, &parallel_for);
  STD_TORCH_CHECK(bad < 0, "params[", bad, "] has a gradient, or would get a value, that is not finite");
}

}  // namespace
}  // namespace fastreft

#define FASTREFT_WEIGHTS "Tensor U, Tensor? V, Tensor? P, Tensor? b, Tensor? c, int act, bool tied"

STABLE_TORCH_LIBRARY(fastreft, m) {
  m.def("edit(Tensor h, " FASTREFT_WEIGHTS ", bool save) -> (Tensor, Tensor)");
  m.def("edit_rows_(Tensor(a!) h, Tensor rows, " FASTREFT_WEIGHTS ", bool save) -> (Tensor, Tensor)");
  m.def("edit_rows(Tensor h, Tensor rows, " FASTREFT_WEIGHTS ", bool save) -> (Tensor, Tensor, Tensor)");
  m.def("edit_backward(Tensor g, Tensor h, Tensor z, " FASTREFT_WEIGHTS
        ", bool need_dh) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("edit_rows_backward_(Tensor(a!) g, Tensor rows, Tensor saved, Tensor z, " FASTREFT_WEIGHTS
        ", bool need_dh) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("edit_rows_backward(Tensor g, Tensor rows, Tensor saved, Tensor z, " FASTREFT_WEIGHTS
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("retract_(Tensor(a!)[] matrices) -> ()");
  m.def(
      "step_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] m, Tensor(c!)[] v, bool orthonormal, float lr, float "
      "beta1, float beta2, float eps, float weight_decay, float correction1, float correction2) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastreft, CPU, m) {
  m.impl("edit", TORCH_BOX(&fastreft::edit));
  m.impl("edit_rows_", TORCH_BOX(&fastreft::edit_rows_));
  m.impl("edit_rows", TORCH_BOX(&fastreft::edit_rows));
  m.impl("edit_backward", TORCH_BOX(&fastreft::edit_backward));
  m.impl("edit_rows_backward_", TORCH_BOX(&fastreft::edit_rows_backward_));
  m.impl("edit_rows_backward", TORCH_BOX(&fastreft::edit_rows_backward));
  m.impl("retract_", TORCH_BOX(&fastreft::retract_));
  m.impl("step_", TORCH_BOX(&fastreft::step_));
}
