// The one-pass backward on tensor cores.
#include "edit_both.cuh"
#include "edit_units.h"
#include "launch.h"

namespace fastreft {

int both_at_once(const Both& both, DType type, const Grid& grid, void* stream) {
  return by_type_and_rank<8, 16, 32>(type, both.f.shape.rank, [&](auto t, auto rank) {
    return launch<both_kernel<decltype(t), rank.value>>(grid, stream, both);
  });
}

}  // namespace fastreft
