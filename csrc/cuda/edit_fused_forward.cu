// The forward on tensor cores, weights stationary.
#include "edit_fused.cuh"
#include "edit_units.h"
#include "launch.h"

namespace fastreft {

int fused_forward(const Fused& f, DType type, const Grid& grid, void* stream) {
  return by_type_and_rank<8, 16, 32, 64>(type, f.shape.rank, [&](auto t, auto rank) {
    return launch<fused_kernel<decltype(t), rank.value, false, false>>(grid, stream, f);
  });
}

}  // namespace fastreft
