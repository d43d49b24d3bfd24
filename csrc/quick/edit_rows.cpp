// The edit of listed rows under autograd: what edit_rows_ and _EditRows of fastreft/ops/autograd.py do, in a fraction
// of the time, which for a few rows is most of an edit's.
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <mutex>

#include "quick.h"
//
#include "../cuda/policy.h"
#include "../torch/edit_ops.h"

namespace fastreft {

void run(EditArgs& args, const Tensor& on) { kernels->forward(args, on.is_cpu(), device_index(on)); }
void run(EditGradArgs& args, const Tensor& on) { kernels->backward(args, on.is_cpu(), device_index(on)); }

namespace {

using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Gradients that cannot be differentiated again, and say so.
struct Once : torch::autograd::Function<Once> {
  static variable_list forward(torch::autograd::AutogradContext*, at::TensorList grads, at::TensorList) {
    return grads.vec();
  }
  static variable_list backward(torch::autograd::AutogradContext*, variable_list) {
    TORCH_CHECK(
        false,
        "fastreft.functional.edit_rows_ has no second derivative: the rows that it edits are all it keeps of the "
        "hidden state; differentiate functional.edit (positions='all') twice, or set FASTREFT_BACKEND=reference");
  }
};

// grads, which are functions of what `of` holds.
void once(variable_list& grads, const variable_list& of) {
  const at::AutoGradMode on(true);
  variable_list defined;
  for (const Tensor& g : grads)
    if (g.defined()) defined.push_back(g);
  defined = Once::apply(at::TensorList(defined), at::TensorList(of));
  auto next = defined.begin();
  for (Tensor& g : grads)
    if (g.defined()) g = *next++;
}

// Does a gradient stand for many, as vmap makes them?
bool batched(const Tensor& g) {
  const c10::DispatchKeySet keys = g.unsafeGetTensorImpl()->key_set();
  return keys.has(c10::DispatchKey::Batched) || keys.has(c10::DispatchKey::FuncTorchBatched);
}

// rows, the rows before the edit, z, U, V, P, b, c.
using Saved = std::array<Tensor, 8>;

// The gradients of h, U, V, P, b and c. `mine` says that g may be changed.
variable_list gradients_of(const Tensor& g, const Saved& saved, int64_t act, bool tied, bool need_dh, bool mine) {
  const auto& [rows, before, z, U, V, P, b, c] = saved;
  Tensor dh, dU, dV, dP, db, dc;
  // The gradient of the whole state is passed on as it is, save the edited rows. Where it may be changed nothing of
  // size [B*S, d] is copied; else it is copied and edited in one go.
  if (!need_dh || (mine && g.is_contiguous())) {
    std::tie(dU, dV, dP, db, dc) =
        edit_rows_backward_(g, rows, before, z, U, maybe(V), maybe(P), maybe(b), maybe(c), act, tied, need_dh);
    if (need_dh) dh = g;
  } else {
    std::tie(dh, dU, dV, dP, db, dc) =
        edit_rows_backward(g, rows, before, z, U, maybe(V), maybe(P), maybe(b), maybe(c), act, tied);
  }
  const auto of = [](Tensor& gradient, const Tensor& weight) { return weight.defined() ? gradient : Tensor(); };
  return {dh, dU, of(dV, V), of(dP, P), of(db, b), of(dc, c)};
}

// The node of an edit in the graph. Its one input is the gradient of the edited state.
struct EditRows : torch::autograd::Node {
  std::array<SavedVariable, 8> saved;
  int64_t act = 0;
  bool tied = false;

  std::string name() const override { return "fastreft::EditRows"; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    Saved tensors;
    for (size_t i = 0; i < saved.size(); ++i) tensors[i] = saved[i].unpack();
    const Tensor g = std::move(grads[0]);
    if (!g.defined()) return variable_list(num_outputs());
    TORCH_CHECK(
        !batched(g),
        "fastreft.functional.edit_rows_ takes one gradient at a time, and many are given (is_grads_batched, vmap over "
        "a backward): set FASTREFT_QUICK=0 or FASTREFT_BACKEND=reference for that");
    const bool create_graph = at::GradMode::is_enabled();
    const bool mine = !create_graph && g.use_count() == 1 && g.storage().use_count() == 1;
    const at::NoGradGuard off;
    variable_list made = gradients_of(g, tensors, act, tied, task_should_compute_output(0), mine);
    if (create_graph) {
      variable_list of = {g};
      for (size_t i = 3; i < tensors.size(); ++i)
        if (tensors[i].defined()) of.push_back(tensors[i]);
      once(made, of);
    }
    return made;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& s : saved) s.reset_data();
  }

  // ---- for torch's compiled autograd, which calls gradients_of from its graph

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable& s : saved) args.collect(s, false);
    args.collect(act);
    args.collect(tied);
  }

  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    using namespace torch::dynamo::autograd;
    for (SavedVariable& s : saved) swap.before(s);
    PackedArgs packed;
    variable_list tensors;
    for (const SavedVariable& s : saved) tensors.push_back(s.unpack());
    packed.pack(tensors);
    packed.pack(act);
    packed.pack(tied);
    packed.pack(task_should_compute_output(0));
    auto args = std::move(packed).vec();
    std::vector<at::TypePtr> schema;
    for (const at::IValue& arg : args) schema.push_back(arg.isTensor() ? at::TensorType::get() : arg.type());
    const auto outputs = IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
        get_input_metadata(next_edges()));
    const auto& python = getPyCompilerInterface();
    const std::string function =
        python->bind_function(swap.get_py_compiler(), name(), &apply_packed, schema, true, false);
    variable_list made =
        python->call_function(swap.get_py_compiler(), "apply_functional", function, grads, args, outputs);
    for (SavedVariable& s : saved) swap.after(s);
    return made;
  }

  static variable_list apply_packed(const variable_list& grads, const std::vector<at::IValue>& args) {
    torch::dynamo::autograd::PackedArgs packed(args);
    const variable_list tensors = packed.unpack<variable_list>();
    Saved saved;
    std::copy(tensors.begin(), tensors.end(), saved.begin());
    const int64_t act = packed.unpack<int64_t>();
    const bool tied = packed.unpack<bool>(), need_dh = packed.unpack<bool>();
    if (!grads[0].defined()) return variable_list(6);
    return gradients_of(grads[0], saved, act, tied, need_dh, false);
  }
};

// What a graph's edges hold their nodes by: a shared_ptr, or torch's own pointer from torch 2.13 on.
template <typename T, typename Pointer = decltype(torch::autograd::Edge::function)>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>) return std::make_shared<T>();
  else return c10::make_intrusive<T>();
}

void edit_differentiably(const Tensor& h, const Tensor& rows, const Tensor& U, const Tensor& V, const Tensor& P,
                         const Tensor& b, const Tensor& c, int64_t act, bool tied) {
  auto node = make_node<EditRows>();
  node->set_next_edges(torch::autograd::collect_next_edges(h, U, V, P, b, c));
  Tensor before, z;
  {
    const at::NoGradGuard off;
    std::tie(before, z) = edit_rows_(h, rows, U, maybe(V), maybe(P), maybe(b), maybe(c), act, tied, true);
  }
  size_t i = 0;
  for (const Tensor& t : Saved{rows, before, z, U, V, P, b, c}) node->saved[i++] = SavedVariable(t, false);
  node->act = act;
  node->tied = tied;
  torch::autograd::rebase_history(h, node);
}

}  // namespace

PyObject* quick_edit_rows_(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 9, "edit_rows_ takes 9 arguments, not ", count);
  const bool tied = args[4] == args[2];
  std::array<Tensor, 7> t;
  if (!plain_tensors(args, t)) Py_RETURN_NOTIMPLEMENTED;
  if (tied) t[4].reset();
  const auto& [h, rows, U, V, P, b, c] = t;
  if (!h.defined() || !rows.defined() || !U.defined()) Py_RETURN_NOTIMPLEMENTED;
  const bool as_the_op_wants = rows.scalar_type() == at::kLong && rows.dim() == 1 && rows.is_contiguous();
  const bool for_a_gpu =
      args[8] == Py_True && (U.dim() != 2 || U.size(0) <= kMaxFusedRank);  // unique, and not ops/gemms.py's
  if (!as_the_op_wants || (h.is_cuda() && !for_a_gpu)) Py_RETURN_NOTIMPLEMENTED;
  const int64_t act = PyLong_AsLongLong(args[7]);
  const auto wants = [](const Tensor& w) { return w.defined() && w.requires_grad(); };
  const bool differentiable =
      at::GradMode::is_enabled() && (wants(h) || wants(U) || wants(V) || wants(P) || wants(b) || wants(c));
  using torch::autograd::can_mutate_inplace;
  if (can_mutate_inplace(h, differentiable) != torch::autograd::can_mutate_inplace_result::success)
    Py_RETURN_NOTIMPLEMENTED;
  {
    const pybind11::gil_scoped_release others_may_run;
    RECORD_FUNCTION("fastreft::edit_rows_", std::vector<c10::IValue>{});
    if (differentiable) edit_differentiably(h, rows, U, V, P, b, c, act, tied);
    else edit_rows_(h, rows, U, maybe(V), maybe(P), maybe(b), maybe(c), act, tied, false);
    if (!h.is_inference()) torch::autograd::increment_version(h);
  }
  Py_INCREF(args[0]);
  return args[0];
  END_HANDLE_TH_ERRORS
}

}  // namespace fastreft
