// The forward of the edit, rows and dense: one launch of a tensor-core pass (edit_fused.cuh, edit_streamed.cuh) where
// the shapes allow it, else of the CUDA-core pass (edit_simple.cuh).
#include "../kernels.h"
#include "edit_host.h"

namespace fastreft {

int edit_forward_cuda(const EditArgs& args) {
  if (args.d <= 0) return 0;
  Device device;
  if (int error = current_device(device)) return error;
  const Weights& w = args.w;
  Pass p;
  p.n = args.n;
  p.total = args.total;
  p.d = static_cast<int>(args.d);
  p.r = static_cast<int>(args.r);
  p.in = args.h;
  p.out = args.out;
  p.index = args.index;
  if (args.index != nullptr && args.out.p != args.h.p) p.copy_rows = plan_copy(args.total, device);
  p.act = w.act;
  p.b = w.b;
  p.c = w.c;
  p.saved = args.saved;
  p.z = args.z;
  p.expand[0].w = w.U;
  p.shrink[0].w = w.V;
  if (w.V.p != nullptr && w.P.p != nullptr && w.act == Act::identity) {
    p.shrink[0].minus = w.P;
  } else {
    p.shrink[1].w = w.P;
  }
  const FusedPlan plan = fused_plan_of(p, args.type, device);
  return plan.fits ? fused_pass<false>(p, args.type, plan, args.stream)
                   : simple_pass<false>(p, args.type, true, args.stream, device);
}

}  // namespace fastreft
