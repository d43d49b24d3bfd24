// The gradient of the hidden state on tensor cores, matrices in registers.
#include "edit_fused.cuh"
#include "edit_units.h"
#include "launch.h"

namespace fastreft {

int held_backward(const Fused& f, DType type, const Grid& grid, void* stream) {
  return by_type_and_rank<32, 64>(type, f.shape.rank, [&](auto t, auto rank) {
    return launch<fused_kernel<decltype(t), rank.value, true, true>>(grid, stream, f);
  });
}

}  // namespace fastreft
