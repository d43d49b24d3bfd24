// The CPU edit: rows and dense, forward and backward, in torch's own thread pool.
//
// Forward: each task takes a run of rows, block by block: project on A, finish the r coordinates, expand with U.
// Backward: the n rows are cut into a number of tasks that depends on n, r and d alone (never on the threads), each
// task sums its own dU and dA, and the parts are added in task order: the same bits on any number of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "forward.h"

namespace fastreft {

namespace {

// A result of this size is out of every cache before anyone reads it.
constexpr int64_t kPastCaches = int64_t{32} << 20;

template <typename C>
void forward(const EditArgs& args, ParallelFor run, const CpuKernels& k) {
  const Packed w(args.w, args.type, args.r, args.d, k, false);
  const int64_t e = size_of(args.type), kept = kept_per_row(args.w.act, args.r),
                width = std::max<int64_t>(w.projections, 1);
  std::vector<int64_t> slots;
  if (args.index) {
    slots = edited_slots(args.index, args.n, args.total);
    if (static_cast<int64_t>(slots.size()) < args.n) {  // what is skipped is still defined
      if (args.saved) std::memset(args.saved, 0, args.n * args.d * e);
      if (args.z) std::memset(args.z, 0, args.n * kept * sizeof(C));
    }
  }
  const int64_t n = args.index ? slots.size() : args.n;
  const bool past_caches = !args.index && n * args.d * e >= kPastCaches;
  const int64_t grain = kBlock * std::max<int64_t>(1, kGrainOperations / (args.d * (w.projections + args.r)) / kBlock);
  parallel(run, (n + kBlock - 1) / kBlock, std::max<int64_t>(1, grain / kBlock), [&](int64_t first, int64_t last) {
    Scratch memory = scratch(kBlock * (width + args.r) * sizeof(C));
    C* projected = reinterpret_cast<C*>(memory.get());
    C* z = projected + kBlock * width;
    const void* src[kBlock];
    void* dst[kBlock];
    for (int64_t block = first; block < last; ++block) {
      const int64_t from = block * kBlock;
      const int m = static_cast<int>(std::min<int64_t>(kBlock, n - from));
      for (int i = 0; i < m; ++i) {
        const int64_t slot = args.index ? slots[from + i] : from + i;
        const int64_t row = args.index ? args.index[slot] : slot;
        src[i] = row_address(args.h, row, e);
        dst[i] = row_address(args.out, row, e);
        if (args.saved) std::memcpy(static_cast<char*>(args.saved) + slot * args.d * e, src[i], args.d * e);
      }
      edit_block<C>(w, args.w.act, src, dst, m, past_caches, projected, z, [&](int i) -> C* {
        return args.z ? static_cast<C*>(args.z) + (args.index ? slots[from + i] : from + i) * kept : nullptr;
      });
    }
  });
}

// How many parts the sums over n rows are cut into.
int64_t parts_of(int64_t n, int64_t sums, int64_t padded_d, int64_t element) {
  const int64_t by_rows = std::max<int64_t>(1, n / 64);
  const int64_t by_memory = std::max<int64_t>(1, (int64_t{64} << 20) / std::max<int64_t>(1, sums * padded_d * element));
  return std::min<int64_t>({by_rows, by_memory, 32});
}

template <typename C>
void backward(const EditGradArgs& args, ParallelFor run, const CpuKernels& k) {
  const Packed w(args.w, args.type, args.r, args.d, k, true);
  const int64_t e = size_of(args.type), r = args.r, kept = kept_per_row(args.w.act, r);
  std::vector<int64_t> slots;
  if (args.index) slots = edited_slots(args.index, args.n, args.total);
  const int64_t n = args.index ? slots.size() : args.n;
  // Sums: dU, then dA (the rows of A), then db and dc. Coefficients of A: gp for V, gz for the rows holding -P.
  const int64_t matrix = w.padded_d, sums = r + w.projections;
  const int64_t part_size = sums * matrix + 2 * r;
  const int64_t parts = parts_of(n, sums, matrix, sizeof(C)), blocks = (n + kBlock - 1) / kBlock;
  Scratch own_memory;
  C* partial = reinterpret_cast<C*>(kept_scratch(parts * part_size * sizeof(C), own_memory));
  const bool past_caches = !args.index && n * args.d * e >= kPastCaches;

  parallel(run, parts, 1, [&](int64_t first, int64_t last) {
    Scratch own = scratch(kBlock * (2 * r + w.projections) * sizeof(C));
    C* gz = reinterpret_cast<C*>(own.get());
    C* z = gz + kBlock * r;
    C* coef = z + kBlock * r;
    const void *g[kBlock], *h[kBlock];
    void* dh[kBlock];
    for (int64_t part = first; part < last; ++part) {
      C* dU = partial + part * part_size;
      C *dA = dU + r * matrix, *db = dA + w.projections * matrix, *dc = db + r;
      std::memset(dU, 0, part_size * sizeof(C));
      std::vector<double> sum_b(r, 0.0), sum_c(r, 0.0);
      for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block) {
        const int64_t from = block * kBlock;
        const int m = static_cast<int>(std::min<int64_t>(kBlock, n - from));
        for (int i = 0; i < m; ++i) {
          const int64_t slot = args.index ? slots[from + i] : from + i;
          const int64_t row = args.index ? args.index[slot] : slot;
          g[i] = row_address(args.g, row, e);
          dh[i] = args.dh.p ? row_address(args.dh, row, e) : nullptr;
          h[i] = row_address(args.h, slot, e);
          std::memcpy(z + i * r, static_cast<const C*>(args.z) + slot * kept, r * sizeof(C));
        }
        w.project(g, m, gz, r);
        for (int i = 0; i < m; ++i) {
          const int64_t slot = args.index ? slots[from + i] : from + i;
          const C* a = static_cast<const C*>(args.z) + slot * kept + r;
          for (int64_t j = 0; j < r; ++j) {
            const C gzj = gz[i * r + j];
            const C gp = w.linear ? gzj : static_cast<C>(gzj * activation_slope(args.w.act, a[j]));
            sum_b[j] += gp;
            sum_c[j] -= gzj;
            C* to = coef + i * w.projections;
            if (w.linear) {
              if (w.projections) to[j] = gzj;
            } else {
              if (w.has_v) to[j] = gp;
              if (w.has_p) to[(w.has_v ? r : 0) + j] = gzj;
            }
          }
        }
        w.accumulate(g, m, z, r, r, dU);
        if (w.projections) w.accumulate(h, m, coef, w.projections, w.projections, dA);
        if (args.dh.p) w.expand(g, dh, m, coef, w.projections, past_caches);
      }
      for (int64_t j = 0; j < r; ++j) {
        db[j] = static_cast<C>(sum_b[j]);
        dc[j] = static_cast<C>(sum_c[j]);
      }
    }
  });

  // Add the parts in order, column strip by column strip, into the first.
  const int64_t strip = 1024;
  if (parts > 1)
    parallel(run, (part_size + strip - 1) / strip, std::max<int64_t>(1, kGrainOperations / (strip * parts)),
             [&](int64_t first, int64_t last) {
               const int64_t begin = first * strip, count = std::min(last * strip, part_size) - begin;
               for (int64_t part = 1; part < parts; ++part)
                 k.add(w.compute, partial + begin, partial + part * part_size + begin, count);
             });
  C *dU = partial, *dA = dU + r * matrix, *db = dA + w.projections * matrix, *dc = db + r;
  // A holds -P, so that dA there is the sum of gz h^T: dP = -dA. With D = V - P one sum serves both.
  const C* dP_sum = dA + (!w.linear && w.has_v ? r * matrix : 0);
  auto write = [&](void* to, const Weight& like, const C* from) {
    for (int64_t j = 0; to && j < r; ++j)
      k.narrow(w.compute, static_cast<char*>(to) + j * args.d * size_of(like.type), like.type, from + j * matrix,
               args.d);
  };
  write(args.dV, args.w.V, dA);
  if (w.has_p && (args.w.tied || args.dP)) {
    if (args.w.tied) {
      k.widen(w.compute, dU, dP_sum, w.compute, r * matrix, -1, true);
    } else {
      Scratch negative = scratch(r * matrix * sizeof(C));
      k.widen(w.compute, negative.get(), dP_sum, w.compute, r * matrix, -1, false);
      write(args.dP, args.w.P, reinterpret_cast<const C*>(negative.get()));
    }
  }
  write(args.dU, args.w.U, dU);
  if (args.db) k.narrow(w.compute, args.db, args.w.b.type, db, r);
  if (args.dc) k.narrow(w.compute, args.dc, args.w.c.type, dc, r);
}

}  // namespace

void edit_forward_cpu(const EditArgs& args, ParallelFor run) {
  if (compute_type(args.type) == DType::f64) forward<double>(args, run, cpu_kernels());
  else forward<float>(args, run, cpu_kernels());
}

void edit_backward_cpu(const EditGradArgs& args, ParallelFor run) {
  if (compute_type(args.type) == DType::f64) backward<double>(args, run, cpu_kernels());
  else backward<float>(args, run, cpu_kernels());
}

}  // namespace fastreft
