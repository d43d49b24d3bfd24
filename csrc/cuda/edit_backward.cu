// The backward of the edit, rows and dense. Three roads, chosen by the shapes:
//     one pass   (edit_both.cuh, tensor cores) coordinates, dh and the sums over rows together; then finish
//     two passes (edit_sums.cuh, tensor cores) coordinates and dh; sums; finish
//     CUDA cores (edit_simple.cuh)             the same steps for every dtype, width and rank
// finish adds the partial sums in order and rounds to each weight's dtype. Where dh takes g's own memory, the roads
// with a separate sums kernel write dh last, when g has been read; where it takes other memory, the launch that writes
// it copies the rows that are not listed. What is not asked for is not launched.
#include "../kernels.h"
#include "edit_host.h"

namespace fastreft {
namespace {

enum class Road { no_gradients, one_pass, two_passes, cuda_cores };

// Everything decided before the first launch; the scratch's parts as bytes from its start.
struct Plan {
  Road road = Road::no_gradients;
  bool in_place = false;  // dh overwrites g
  FusedPlan fused;
  GradPlan grad;
  int splits = 0, vector_splits = 0;  // partial sums
  int slot[3] = {-1, -1, -1};
  int slots = 0;
  bool three = false;  // gz is asked for apart from gp
  int64_t gz = 0, gp = 0, packed = 0, partial = 0, vectors = 0, bytes = 0;
};

bool linear(const EditGradArgs& args) { return args.w.act == Act::identity; }

// The pass that turns g into dh.
Pass make_pass(const EditGradArgs& args, const Device& device) {
  Pass p = pass_between(args.g, args.dh, args, device);
  p.z = const_cast<void*>(args.z);
  p.shrink[0].w = args.w.U;
  set_both(p.expand, args.w);
  return p;
}

Plan make_plan(const EditGradArgs& args, const Pass& p, const Device& device) {
  Plan plan;
  const Weights& w = args.w;
  plan.in_place = args.dh.p != nullptr && args.dh.p == args.g.p;
  plan.fused = fused_plan_of(p, args.type, device);
  if (args.r == 0 || args.d == 0 || !(args.dU || args.dV || args.dP || args.db || args.dc)) return plan;

  const bool third = args.dP != nullptr || (w.tied && args.dU != nullptr && w.P.p != nullptr);
  if (args.dU != nullptr) plan.slot[0] = plan.slots++;
  if (args.dV != nullptr || (linear(args) && third)) plan.slot[1] = plan.slots++;
  if (!linear(args) && third) plan.slot[2] = plan.slots++;

  const int depth = both_depth(padded_rank(args.r));
  plan.three = plan.slot[2] >= 0 || (!linear(args) && args.dc != nullptr);
  const bool needs_h = plan.slot[1] >= 0 || plan.slot[2] >= 0;
  const bool tensor_cores = plan.fused.fits && (!needs_h || vector_rows(args.h, args.type));
  plan.road = tensor_cores ? Road::two_passes : Road::cuda_cores;
  // gp and gz are one, or gz is not asked for; and the sums of a slice fit in registers.
  if (tensor_cores && !plan.three) {
    const FusedPlan both = plan_both(p.n, p.d, p.r, present(p.expand), device);
    if (both.fits) {
      plan.fused = both;
      plan.road = Road::one_pass;
    }
  }

  const int64_t size = sum_size(args.type), coordinates = round_up(args.n * args.r * size, 256);
  switch (plan.road) {
    case Road::one_pass: plan.splits = static_cast<int>(plan.fused.clusters); break;
    case Road::two_passes:
      plan.grad = plan_grad(args.n, args.d, args.r, sums_columns(depth, plan.three), args.r, 1, device);
      plan.partial = round_up(args.n * packed_pitch(depth, packed_parts(depth, plan.three)) * 2, 256);
      break;
    default:
      plan.grad = plan_grad(args.n, args.d, args.r, kGradThreads, kGradChunk, kGradPerSm, device);
      plan.gp = coordinates;
      plan.partial = plan.gp + (linear(args) ? 0 : coordinates);
  }
  if (plan.road != Road::one_pass) plan.splits = plan.grad.splits;
  plan.vector_splits = plan.road == Road::one_pass ? plan.splits * plan.fused.shape.cluster : plan.splits;
  plan.vectors = plan.partial + round_up(plan.splits * plan.slots * args.r * args.d * size, 256);
  plan.bytes = plan.vectors + round_up(plan.vector_splits * 2 * args.r * size, 256);
  return plan;
}

int run_pass(const Pass& p, const EditGradArgs& args, const Plan& plan, bool shrinks, const Device& device) {
  if (plan.fused.fits && plan.road != Road::cuda_cores)
    return fused_pass<true>(p, args.type, plan.fused, args.stream, device);
  return simple_pass<true>(p, args.type, shrinks, args.stream, device);
}

int one_pass(const Pass& p, const EditGradArgs& args, const Plan& plan, const Device& device) {
  Both both;
  both.f = fused_of(p, plan.fused);
  if (plan.slot[1] >= 0) both.h = args.h;
  both.wants_first = plan.slot[0] >= 0;
  both.partial = reinterpret_cast<float*>(static_cast<char*>(args.scratch) + plan.partial);
  both.vectors = reinterpret_cast<float*>(static_cast<char*>(args.scratch) + plan.vectors);
  return both_at_once(both, args.type, fused_grid(p, plan.fused, device), args.stream);
}

int run_sums(const Pass& p, const EditGradArgs& args, const Plan& plan, const Device& device) {
  Gradient s;
  s.n = args.n;
  s.total = args.total;
  s.d = p.d;
  s.r = p.r;
  s.range = plan.grad.range;
  s.splits = plan.grad.splits;
  s.g = args.g;
  s.h = args.h;
  s.index = args.index;
  s.z = args.z;
  s.kept = static_cast<int>(kept_per_row(args.w.act, args.r));
  s.gp = p.gp;
  s.gz = p.gz;
  s.coordinates = p.packed;
  for (int i = 0; i < 3; ++i) s.slot[i] = plan.slot[i];
  s.slots = plan.slots;
  s.partial = static_cast<char*>(args.scratch) + plan.partial;
  s.vectors = static_cast<char*>(args.scratch) + plan.vectors;
  Grid grid;
  grid.x = plan.grad.column_blocks;
  grid.y = plan.grad.splits;
  grid.z = plan.grad.chunks;
  if (plan.road == Road::two_passes) {
    s.three = plan.three;
    s.stages = sums_stages(p.packed_depth, plan.three, device);
    grid.threads = kSumsThreads;
    grid.early = device.major >= 9;
    grid.shared = sums_shared(p.packed_depth, plan.three, s.stages);
    return sums_on_tensor_cores(s, p.packed_depth, args.type, grid, args.stream);
  }
  grid.threads = kGradThreads;
  grid.shared = grad_shared(sum_size(args.type));
  return sums_on_cuda_cores(s, args.type, grid, args.stream);
}

int finish(const EditGradArgs& args, const Plan& plan, const Device& device) {
  const Weights& w = args.w;
  Finish f;
  f.elements = args.r * args.d;
  f.r = static_cast<int>(args.r);
  f.splits = plan.splits;
  f.vector_splits = plan.vector_splits;
  f.slots = plan.slots;
  f.u = plan.slot[0];
  f.v = plan.slot[1];
  f.p = linear(args) ? plan.slot[1] : plan.slot[2];
  f.tied = w.tied && w.P.p != nullptr ? f.p : -1;
  f.partial = static_cast<char*>(args.scratch) + plan.partial;
  f.vectors = static_cast<char*>(args.scratch) + plan.vectors;
  f.dU = args.dU;
  f.dV = args.dV;
  f.dP = args.dP;
  f.db = args.db;
  f.dc = args.dc;
  f.U = w.U.type;
  f.V = w.V.type;
  f.P = w.P.type;
  f.b = w.b.type;
  f.c = w.c.type;
  Grid grid;
  f.element_blocks = ceil_div(f.elements, 256);
  grid.x = f.element_blocks + ceil_div(args.r, 8);
  grid.early = device.major >= 9;
  return finish_sums(f, args.type, grid, args.stream);
}

}  // namespace

int64_t edit_backward_scratch_bytes(const EditGradArgs& args) {
  Device device;
  if (current_device(device)) return -1;
  return make_plan(args, make_pass(args, device), device).bytes;
}

int edit_backward_cuda(const EditGradArgs& args) {
  if (args.d <= 0) return args.r > 0 ? finish(args, Plan{}, Device{}) : 0;  // vectors alone: sums of nothing
  Device device;
  if (int error = current_device(device)) return error;
  Pass p = make_pass(args, device);
  const Plan plan = make_plan(args, p, device);
  if (args.n <= 0 || plan.road == Road::no_gradients) {  // one pass, if any, and sums of nothing, if any
    const int error = p.out.p != nullptr ? run_pass(p, args, plan, true, device) : 0;
    return error || plan.road == Road::no_gradients ? error : finish(args, plan, device);
  }
  if (plan.road == Road::one_pass) {
    if (int error = one_pass(p, args, plan, device)) return error;
    return finish(args, plan, device);
  }

  Pass first = p;
  char* scratch = static_cast<char*>(args.scratch);
  if (plan.road == Road::two_passes) {
    first.packed = scratch + plan.packed;
    first.packed_depth = both_depth(plan.fused.shape.rank);
    first.packed_parts = packed_parts(first.packed_depth, plan.three);
  } else {
    p.gz = first.gz = scratch + plan.gz;
    p.gp = first.gp = linear(args) ? nullptr : scratch + plan.gp;
  }
  if (plan.in_place) first.out.p = nullptr;
  if (int error = run_pass(first, args, plan, true, device)) return error;
  if (int error = run_sums(first, args, plan, device)) return error;
  if (int error = finish(args, plan, device)) return error;
  return plan.in_place ? run_pass(p, args, plan, plan.road == Road::two_passes, device) : 0;
}

}  // namespace fastreft
