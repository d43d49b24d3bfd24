// The forward of the edit, rows and dense: one launch of a tensor-core pass (edit_fused.cuh, edit_streamed.cuh) where
// the shapes allow it, else of the CUDA-core pass (edit_simple.cuh).
#include "../kernels.h"
#include "edit_host.h"

namespace fastreft {

int edit_forward_cuda(const EditArgs& args) {
  if (args.d <= 0) return 0;
  Device device;
  if (int error = current_device(device)) return error;
  Pass p = pass_between(args.h, args.out, args, device);
  p.saved = args.saved;
  p.z = args.z;
  p.b = args.w.b;
  p.c = args.w.c;
  set_both(p.shrink, args.w);
  p.expand[0].w = args.w.U;
  const FusedPlan plan = fused_plan_of(p, args.type, device);
  return plan.fits ? fused_pass<false>(p, args.type, plan, args.stream, device)
                   : simple_pass<false>(p, args.type, true, args.stream, device);
}

}  // namespace fastreft
