// Both ways on CUDA cores, and what adds the partial sums of any road.
#include "edit_simple.cuh"
#include "edit_units.h"
#include "launch.h"

namespace fastreft {

int simple_forward(const Pass& p, bool vector, DType type, const Grid& grid, void* stream) {
  return by_type(type, [&](auto t) {
    using T = decltype(t);
    return vector ? launch<pass_kernel<T, kVector<T>, false>>(grid, stream, p, true)
                  : launch<pass_kernel<T, 1, false>>(grid, stream, p, true);
  });
}

int simple_backward(const Pass& p, bool vector, bool shrinks, DType type, const Grid& grid, void* stream) {
  return by_type(type, [&](auto t) {
    using T = decltype(t);
    return vector ? launch<pass_kernel<T, kVector<T>, true>>(grid, stream, p, shrinks)
                  : launch<pass_kernel<T, 1, true>>(grid, stream, p, shrinks);
  });
}

int sums_on_cuda_cores(const Gradient& s, DType type, const Grid& grid, void* stream) {
  return by_type(type, [&](auto t) { return launch<gradient_kernel<decltype(t)>>(grid, stream, s); });
}

int finish_sums(const Finish& f, DType type, const Grid& grid, void* stream) {
  return type == DType::f64 ? launch<finish_kernel<double>>(grid, stream, f)
                            : launch<finish_kernel<float>>(grid, stream, f);
}

}  // namespace fastreft
