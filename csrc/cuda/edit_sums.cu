// The sums over rows of the weights' gradients on tensor cores.
#include "edit_sums.cuh"
#include "edit_units.h"
#include "launch.h"

namespace fastreft {

int sums_on_tensor_cores(const Gradient& s, int depth, DType type, const Grid& grid, void* stream) {
  const bool narrow = sums_columns(depth, s.three) == 128;
  return by_type_and_rank<16, 32, 64>(type, depth, [&](auto t, auto padded) {
    if constexpr (sums_columns(padded.value, true) == 128) {
      if (narrow) return launch<sums_kernel<decltype(t), padded.value, 1>>(grid, stream, s);
    }
    return launch<sums_kernel<decltype(t), padded.value, 2>>(grid, stream, s);
  });
}

}  // namespace fastreft
