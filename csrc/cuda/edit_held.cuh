// The matrices of a CTA's slice as its warps need them, in shared memory or held in registers (edit_fused.cuh).
//
// With 32 or 64 coordinates the two slices take 67 or 133 KB of shared memory, room in which further tiles could be on
// their way while one waits for its coordinates; and to load them anew for every tile takes as many of its cycles as
// the tile itself. What a warp needs of them is the same for every tile: 16 coordinates over half of the columns where
// it shrinks, all coordinates over 64 columns where it expands. That is 64 + 32 or 64 + 64 registers.
#pragma once
#include "edit_cta.cuh"

namespace fastreft {

template <typename T, int Rank>
struct InShared {
  __device__ __forceinline__ void begin(const Cta<T, Rank>& cta, bool, int64_t slice) { cta.load_shrink(slice); }
  // After the first tile's sums have been sent, and while they are added: what expands is not needed sooner.
  __device__ __forceinline__ void then(const Cta<T, Rank>& cta, bool writes, int64_t slice) {
    if (!writes) return;
    cta.load_expand(slice);
    barrier_of<kFusedThreads>();
  }
  __device__ __forceinline__ void shrink_and_send(const Cta<T, Rank>& cta, const T* whole, int set) const {
    cta.shrink_and_send(whole, set);
  }
  template <bool Backward>
  __device__ __forceinline__ void expand_tile(const Cta<T, Rank>& cta, T* mine, const T* coordinates) const {
    cta.template expand_tile<Backward>(mine, coordinates);
  }
};

template <typename T, int Rank>
struct InRegisters {
  static constexpr int Pitch = kHeldWidth + 8, CoordinatePitch = Rank + 8;
  static constexpr int Parts = 1 << kHeldLogParts, Quarters = 4 / Parts, Quarter = kHeldWidth / 4;
  // A shrink's items are 16 coordinates and a part of the columns; with 32 coordinates two warps share one's rows.
  static constexpr int Items = Rank / 16 * Parts, Rows = kHeldRows / (kFusedWarps / Items);
  static constexpr int Columns = kHeldWidth / kFusedWarps;
  uint32_t shrink[Quarters][Quarter / 16][4];
  uint32_t expand[Rank / 16][Columns / 16][4];

  // From the slices in shared memory, where tiles will be when all warps have them.
  __device__ __forceinline__ void begin(const Cta<T, Rank>& cta, bool writes, int64_t slice) {
    const int lane = cta.lane;
    cta.load_shrink(slice);
    if (writes) cta.load_expand(slice);
    barrier_of<kFusedThreads>();
    const T* mine = cta.shrink() + (cta.warp % Items / Parts * 16 + lane % 8 + lane / 16 * 8) * Pitch +
                    cta.warp % Parts * Quarters * Quarter + lane / 8 % 2 * 8;
#pragma unroll
    for (int q = 0; q < Quarters; ++q) {
#pragma unroll
      for (int j = 0; j < Quarter / 16; ++j) load_matrices(shrink[q][j], mine + q * Quarter + j * 16);
    }
    if (writes) {
      mine = cta.expand() + cta.warp * Columns + lane % 16 * Pitch + lane / 16 * 8;
#pragma unroll
      for (int s = 0; s < Rank / 16; ++s) {
#pragma unroll
        for (int j = 0; j < Columns / 16; ++j) load_matrices_transposed(expand[s][j], mine + s * 16 * Pitch + j * 16);
      }
    }
    async_fence();  // before tiles are copied there
  }
  __device__ __forceinline__ void then(const Cta<T, Rank>&, bool, int64_t) {}

  // As Cta's, in the same order, so that the bits are the same.
  __device__ __forceinline__ void shrink_and_send(const Cta<T, Rank>& cta, const T* whole, int set) const {
    const int part = cta.warp % Parts, group = cta.warp % Items / Parts;
    int first = cta.warp / Items * Rows;
    const T* a_row = whole + (first + cta.lane % 16) * Pitch + part * Quarters * Quarter + cta.lane / 16 * 8;
#pragma unroll 1
    for (const int end = first + Rows; first < end; first += 16, a_row += 16 * Pitch) {
      float sum[Quarters][1][2][4] = {};
#pragma unroll
      for (int j = 0; j < Quarter / 16; ++j) {
#pragma unroll
        for (int q = 0; q < Quarters; ++q) {
          const uint32_t (&b)[4] = shrink[q][j];
          uint32_t a[4];
          load_matrices(a, a_row + q * Quarter + j * 16);
          multiply(sum[q][0][0], a, b[0], b[1], T{});
          multiply(sum[q][0][1], a, b[2], b[3], T{});
        }
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) sum[0][0][e / 4][e % 4] += sum[1][0][e / 4][e % 4];
      cta.deliver_sums(sum[0], first, group, part, [&](int row, int coordinate, int from, const float (&four)[4]) {
        cta.send_sums(set, row, coordinate, from, four);
      });
    }
    cta.sent(cta.sums_arrivals(set));
  }

  template <bool Backward>
  __device__ __forceinline__ void expand_tile(const Cta<T, Rank>& cta, T* mine, const T* coordinates) const {
    constexpr int Wide = Rank > 32 ? 1 : 2;  // there are no registers for more
    const T* a_row = coordinates + cta.lane % 16 * CoordinatePitch + cta.lane / 16 * 8;
#pragma unroll(Rank > 32 ? 1 : 2)
    for (int m = 0; m < kHeldRows; m += 16, mine += 16 * Pitch, a_row += 16 * CoordinatePitch) {
      uint32_t a[Rank / 16][4];
#pragma unroll
      for (int s = 0; s < Rank / 16; ++s) load_matrices(a[s], a_row + s * 16);
#pragma unroll
      for (int j = 0; j < Columns / 16; j += Wide) {
        float sum[Wide][1][2][4];
        sums_of_tile(sum, mine + j * 16, Pitch);
#pragma unroll
        for (int s = 0; s < Rank / 16; ++s) {
#pragma unroll
          for (int w = 0; w < Wide; ++w) {
            const uint32_t (&b)[4] = expand[s][j + w];
            multiply(sum[w][0][0], a[s], b[0], b[1], T{});
            multiply(sum[w][0][1], a[s], b[2], b[3], T{});
          }
        }
        sums_to_tile(mine + j * 16, sum, Pitch);
      }
    }
  }
};

}  // namespace fastreft
