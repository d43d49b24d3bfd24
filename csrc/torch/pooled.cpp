// The op that edits rows of many adapters at once; inference only.
#include "edit_ops.h"
#include "on_device.h"

namespace fastreft {
namespace {

// h's rows, each edited by the adapter of a pool that `adapters` says.
void edit_pooled_(Tensor h, Tensor rows, Tensor adapters, Tensor A, Tensor U, MaybeTensor b, MaybeTensor c,
                  Tensor table, int64_t most_r) {
  const int64_t d = h.dim() ? h.size(h.dim() - 1) : 0;
  auto on_device = [&](const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.is_cpu() == h.is_cpu() && device_index(t) == device_index(h) && t.is_contiguous(), name,
                    " must be contiguous and on h's device");
  };
  for (const auto& [t, name] : {std::pair<const Tensor&, const char*>{A, "A"}, {U, "U"}}) {
    on_device(t, name);
    STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == d && t.size(0) == A.size(0), name, " must be (vectors, ", d, ")");
  }
  for (const auto& [t, name] : {std::pair<const MaybeTensor&, const char*>{b, "b"}, {c, "c"}}) {
    if (!t) continue;
    on_device(*t, name);
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == A.size(0), name, " must be (", A.size(0), ",)");
  }
  on_device(table, "table");
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Int && table.dim() == 2 && table.size(1) == 4,
                  "table must be (adapters, 4), int32");
  STD_TORCH_CHECK(most_r >= 0, "most_r is ", most_r, "; it must be at least 0");
  const Tensor target = readable(h);
  PooledArgs args;
  args.n = rows.numel();
  args.total = rows_in(h);
  args.d = d;
  args.type = dtype_of(h, "h");
  args.h = *addressable(target);
  args.index = index_of(rows, h);
  args.adapter = index_of(adapters, h);
  STD_TORCH_CHECK(adapters.numel() == args.n, "adapters must name one for each of ", args.n, " rows");
  args.pool = {
      weight(A, "A"), weight(U, "U"), weight(b, "b"), weight(c, "c"), static_cast<const int32_t*>(table.data_ptr()),
      A.size(0),      table.size(0)};
  args.most_r = most_r;
  if (h.is_cpu()) {
    edit_pooled_cpu(args, &parallel_for);
  } else {
#ifdef FASTREFT_WITH_CUDA
    const OnDevice here(device_index(h));
    args.stream = here.stream;
    OnDevice::check(edit_pooled_cuda(args));
#endif
  }
  if (target.data_ptr() != h.data_ptr()) copy_into(h, target);
}

}  // namespace
}  // namespace fastreft

STABLE_TORCH_LIBRARY_FRAGMENT(fastreft, m) {
  m.def(
      "edit_pooled_(Tensor(a!) h, Tensor rows, Tensor adapters, Tensor A, Tensor U, Tensor? b, Tensor? c, Tensor "
      "table, int most_r) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fastreft, CPU, m) { m.impl("edit_pooled_", TORCH_BOX(&fastreft::edit_pooled_)); }
#ifdef FASTREFT_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(fastreft, CUDA, m) { m.impl("edit_pooled_", TORCH_BOX(&fastreft::edit_pooled_)); }
#endif
