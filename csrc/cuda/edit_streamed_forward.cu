// The forward on tensor cores, matrices streamed.
#include "edit_streamed.cuh"
#include "edit_units.h"
#include "launch.h"

namespace fastreft {

int streamed_forward(const Fused& f, DType type, const Grid& grid, void* stream) {
  return by_type_and_rank<8, 16, 32, 64>(type, f.shape.rank, [&](auto t, auto rank) {
    return launch<streamed_kernel<decltype(t), rank.value, false>>(grid, stream, f);
  });
}

}  // namespace fastreft
