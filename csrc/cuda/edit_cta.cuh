// What a CTA of the three tensor-core kernels (edit_fused.cuh, edit_both.cuh, edit_streamed.cuh) knows of its place:
// what lies where in its shared memory, which columns are its warp's, which matrices are there; and the steps of a tile
// that are the same in all three.
#pragma once
#include "edit_tile.cuh"

namespace fastreft {

// Where only one of two matrices is there it comes first in shared memory.
__device__ __forceinline__ int only_second(const Matrix2 (&pair)[2]) { return pair[0].w.p != nullptr ? 0 : 1; }

// mma's steps of 16 over the coordinates of an expand: the backward's can be two matrices' (gp and gz).
template <int Rank, bool Backward>
constexpr int kExpandSteps = Backward ? (Rank > 8 ? Rank / 8 : 1) : (Rank > 16 ? Rank / 16 : 1);

// What a row's owner needs to know of coordinate k beside its sums.
struct Known {
  int live = 0;        // whether the row is there and is edited; a whole register: bytes are put together one by one
  float z = 0, a = 0;  // of the forward; 0 where they are not needed
};

template <typename T, int Rank>
struct Cta {
  static constexpr int Groups = Rank / 8;  // of 8 coordinates
  const Pass& p;
  const FusedShape& s;
  int pitch, coordinate_pitch;  // of a slice and a tile, of the coordinates
  T *shrink, *expand, *tiles;   // in shared memory, as FusedLayout says
  float* received;
  T* coordinates;
  Arrivals* arrivals;            // of the sums, of the coordinates
  int rank;                      // in the cluster
  int warp, lane, columns;       // this warp, and how many columns it has
  int tile_size;                 // elements
  int sums, depth;               // of a row: sums of all matrices, coordinates that expand (padded to mma's 16)
  int items, parts, shift;       // of a shrink, of its columns; of own_rows
  int owned;                     // rows of a tile whose coordinates this rank works out
  int shrink_from, expand_from;  // the first matrix that is there
  int k;                         // the coordinate that this lane adds up and works out, of every row it does

  __device__ __forceinline__ Cta(const Pass& p, const FusedShape& s, int rank) : p(p), s(s), rank(rank) {
    FusedShape shape = s;
    shape.rank = Rank;  // what is known when the kernel is compiled is not divided by when it runs
    const FusedLayout at = fused_layout(shape);
    char* shared = shared_memory();
    pitch = static_cast<int>(at.pitch);
    coordinate_pitch = static_cast<int>(at.coordinate_pitch);
    shrink = reinterpret_cast<T*>(shared + at.shrink);
    expand = reinterpret_cast<T*>(shared + at.expand);
    tiles = reinterpret_cast<T*>(shared + at.tiles);
    received = reinterpret_cast<float*>(shared + at.received);
    coordinates = reinterpret_cast<T*>(shared + at.coordinates);
    arrivals = reinterpret_cast<Arrivals*>(shared + at.arrivals);
    warp = threadIdx.x / 32;
    lane = threadIdx.x % 32;
    columns = s.width / kFusedWarps;
    tile_size = s.rows * pitch;
    sums = s.shrinks * Rank;
    depth = s.expands * Rank > 16 ? s.expands * Rank : 16;
    items = shrink_items(shape);
    parts = shrink_parts(shape);
    shift = own_shift(s);
    const int left = s.rows - (rank << shift);
    owned = left <= 0 ? 0 : left < 1 << shift ? left : 1 << shift;
    shrink_from = only_second(p.shrink);
    expand_from = only_second(p.expand);
    k = warp % Groups * 8 + lane % 8;
  }

  // The i-th tile in shared memory, and the warp's columns of it.
  __device__ __forceinline__ T* whole(int i) const { return tiles + i * tile_size; }
  __device__ __forceinline__ T* tile(int i) const { return whole(i) + warp * columns; }

  // Where they begin in global memory, of a slice that begins at `slice` there.
  __device__ __forceinline__ int64_t column(int64_t slice) const { return slice + warp * columns; }

  // The warp's columns of a tile, which begin at `column`, from `rows` in global memory (see tile_rows) and to
  // Pass::out.
  __device__ __forceinline__ void load(T* to, const Rows& rows, int64_t first, bool direct, int64_t column) const {
    load_tile(to, rows.p, tile_rows(p, rows, first, s.rows, direct), s.rows, pitch, columns, column, p.d);
  }
  __device__ __forceinline__ void store(const T* mine, const Rows& rows, int64_t first, bool direct,
                                        int64_t column) const {
    store_tile(rows.p, mine, tile_rows(p, rows, first, s.rows, direct), s.rows, pitch, columns, column, p.d);
  }

  // The slices of the matrices that begin at column `slice`: of those that shrink, of those that expand, or of both.
  __device__ __forceinline__ void load_slices(bool shrinks, bool expands, int64_t slice) const {
    const bool fp32 =
        all_fp32(p.shrink + shrink_from, 2 - shrink_from) && all_fp32(p.expand + expand_from, 2 - expand_from);
    for (int which = shrinks ? 0 : 1; which < (expands ? 2 : 1); ++which) {
      T* to = which == 0 ? shrink : expand;
      const Matrix2* matrices = which == 0 ? p.shrink + shrink_from : p.expand + expand_from;
      const int count = which == 0 ? 2 - shrink_from : 2 - expand_from, rows = which == 0 ? sums : depth;
      if (fp32) {
        load_slice_as<T, Rank, true>(to, matrices, count, rows, s.width, pitch, p.r, p.d, slice);
      } else {
        load_slice_as<T, Rank, false>(to, matrices, count, rows, s.width, pitch, p.r, p.d, slice);
      }
    }
  }

  // What arrives in a tile, in bytes.
  __device__ __forceinline__ int sums_bytes() const { return owned * sums * parts * s.cluster * 4; }
  __device__ __forceinline__ int coordinates_bytes(int chunks) const { return s.rows * Rank * 2 * chunks; }

  // Before the first tile; a cluster_sync must follow. `chunks`: of Rank coordinates that a row is sent.
  __device__ __forceinline__ void begin(int chunks) const {
    // Padding is zeros for as long as the CTA lives.
    for (int e = threadIdx.x; e < s.rows * coordinate_pitch; e += kFusedThreads) coordinates[e] = rounded<T>(0.f);
    if (threadIdx.x != 0) return;
    arrivals_init(arrivals);
    arrivals_init(arrivals + 1);
    arrivals_expect(arrivals, sums_bytes());
    arrivals_expect(arrivals + 1, coordinates_bytes(chunks));
  }
  __device__ __forceinline__ void wait_for_sums(int parity) const {
    if (owned == 0) return;
    arrivals_wait(arrivals, parity);
    if (threadIdx.x == 0) arrivals_expect(arrivals, sums_bytes());
  }
  __device__ __forceinline__ void wait_for_coordinates(int parity, int chunks) const {
    arrivals_wait(arrivals + 1, parity);
    if (threadIdx.x == 0) arrivals_expect(arrivals + 1, coordinates_bytes(chunks));
  }

  // The products of a tile with the matrices, 4 neighbouring coordinates of a row at a time: deliver(row, coordinate,
  // part, the four). All columns have arrived.
  //
  // A row's sum is ((q0 + q1) + (q2 + q3)) of the slice's quarters, whoever adds up which of them: its bits do not
  // depend on how many rows a tile has.
  template <typename F>
  __device__ __forceinline__ void shrink_tile(const T* whole, const F& deliver) const {
    constexpr bool Tall = Rank > 16;
    if (Tall && s.rows > 16) {
      shrink_items_of<Tall ? 2 : 1>(whole, deliver);
    } else {
      shrink_items_of<1>(whole, deliver);
    }
  }
  template <int Blocks, typename F>
  __device__ __forceinline__ void shrink_items_of(const T* whole, const F& deliver) const {
    constexpr int Eights = Rank > 8 ? 2 : 1, PerMatrix = Groups / Eights;
    const int quarter = s.width / 4;
    const int log_parts = parts >> 1, quarters = 4 >> log_parts;  // parts is 1, 2 or 4
    for (int work = warp; work < items * parts; work += kFusedWarps) {
      const int part = work & (parts - 1), item = work >> log_parts;
      const int group = s.shrinks > 1 ? item % (2 * PerMatrix) : item % PerMatrix;
      const int first = (s.shrinks > 1 ? item / (2 * PerMatrix) : item / PerMatrix) * 16 * Blocks;
      const T* a = whole + first * pitch + part * quarters * quarter;
      const T* b = shrink + group * 8 * Eights * pitch + part * quarters * quarter;
      float sum[Blocks][Eights][4] = {}, half[Blocks][Eights][4] = {};
      for (int q = 0; q < quarters; ++q, a += quarter, b += quarter) {
        float own[Blocks][Eights][4] = {};
        shrink_rows(own, a, b, pitch, quarter);
#pragma unroll
        for (int e = 0; e < Blocks * Eights * 4; ++e) {
          float &x = sum[e / (Eights * 4)][e / 4 % Eights][e % 4], &y = half[e / (Eights * 4)][e / 4 % Eights][e % 4];
          const float z = own[e / (Eights * 4)][e / 4 % Eights][e % 4];
          x = q % 2 == 0 ? x + y : x;
          y = q % 2 == 0 ? z : y + z;
        }
      }
#pragma unroll
      for (int m = 0; m < Blocks; ++m) {
#pragma unroll
        for (int e = 0; e < Eights; ++e) {
          float c[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) c[i] = sum[m][e][i] + half[m][e][i];
          // A lane has two neighbours of row g and two of row g + 8; it gives one pair for the other lane's.
          const bool odd = lane % 2 != 0;
          const float x = __shfl_xor_sync(0xffffffffu, odd ? c[0] : c[2], 1);
          const float y = __shfl_xor_sync(0xffffffffu, odd ? c[1] : c[3], 1);
          const float four[4] = {odd ? x : c[0], odd ? y : c[1], odd ? c[2] : x, odd ? c[3] : y};
          deliver(first + m * 16 + lane / 4 + (odd ? 8 : 0), (group * Eights + e) * 8 + lane % 4 / 2 * 4, part, four);
        }
      }
    }
  }

  // A row's four sums to the rank that owns it.
  __device__ __forceinline__ void send_sums(int row, int coordinate, int part, const float (&four)[4]) const {
    const int own = row & ((1 << shift) - 1);
    float* to = received + ((((rank * parts + part) << shift) + own) * sums + coordinate);
    send(to, make_uint4(as_bits(four[0]), as_bits(four[1]), as_bits(four[2]), as_bits(four[3])), arrivals,
         row >> shift);
  }

  // The sum of coordinate k of matrix q for an owned row: a lane of 4 adds up every 4th rank's, and they meet.
  __device__ __forceinline__ float add_ranks(int own, int q) const {
    const int next = sums << shift;  // to the next part
    const float* from = received + own * sums + q * Rank + k;
    float total = 0;
#pragma unroll 2
    for (int other = lane / 8; other < s.cluster; other += 4) {
      const float* x = from + other * parts * next;
      float sum = x[0];
      if (parts > 1) sum += x[next];
      if (parts > 2) sum += x[2 * next] + x[3 * next];
      total += sum;
    }
    total += __shfl_xor_sync(0xffffffffu, total, 8);
    return total + __shfl_xor_sync(0xffffffffu, total, 16);
  }

  // The rows whose coordinates this rank works out are dealt to the warps in units of a row and 8 coordinates.
  __device__ __forceinline__ int units() const { return owned * Groups; }
  __device__ __forceinline__ int row_of(int unit) const { return (rank << shift) + unit / Groups; }

  // What is known of a unit's coordinate before its sums have arrived.
  template <bool Backward>
  __device__ __forceinline__ Known known(int64_t first, int unit, bool wants_z) const {
    Known it;
    if (unit >= units()) return it;
    const int64_t i = first + row_of(unit);
    it.live = listed_row(p.index, i, p.n, p.total) >= 0 ? 1 : 0;
    if (!Backward || it.live == 0 || k >= p.r) return it;
    const bool linear = p.act == Act::identity;
    const float* z = static_cast<const float*>(p.z) + i * (linear ? p.r : 2 * p.r) + k;
    if (wants_z) it.z = z[0];
    if (!linear) it.a = z[p.r];
    return it;
  }

  // Eight neighbouring coordinates, one of each of 8 lanes, in every lane.
  __device__ __forceinline__ uint4 together(float x) const {
    const float y = __shfl_xor_sync(0xffffffffu, x, 1);
    const uint32_t two = lane % 2 == 0 ? pack<T>(x, y) : pack<T>(y, x);
    return make_uint4(__shfl_sync(0xffffffffu, two, 0), __shfl_sync(0xffffffffu, two, 2),
                      __shfl_sync(0xffffffffu, two, 4), __shfl_sync(0xffffffffu, two, 6));
  }
  // They to every rank, `offset` coordinates into row m's.
  __device__ __forceinline__ void give(int m, int offset, float x) const {
    const uint4 eight = together(x);
    if (lane < s.cluster) send(coordinates + m * coordinate_pitch + offset + k / 8 * 8, eight, arrivals + 1, lane);
  }

  // The forward's coordinates of the rows that this rank owns, from what the ranks sent, to every rank. `b`, `c`: of
  // coordinate k; `next`: known of this warp's first unit.
  __device__ __forceinline__ void forward_coordinates(int64_t first, Known next, float b, float c) const {
    for (int unit = warp; unit < units(); unit += kFusedWarps) {
      const Known it = next;
      next = known<false>(first, unit + kFusedWarps, false);
      const int m = row_of(unit), own = unit / Groups;
      const int64_t i = first + m;
      float s0 = add_ranks(own, 0), s1 = s.shrinks > 1 ? add_ranks(own, 1) : 0.f;
      if (shrink_from > 0) {
        s1 = s0;
        s0 = 0;
      }
      const bool there = k < p.r && it.live != 0;
      const float a = there ? s0 + b : 0.f, z = there ? act_value(p.act, a) - s1 - c : 0.f;
      if (p.z != nullptr && lane < 8 && k < p.r && i < p.n) {
        const bool linear = p.act == Act::identity;
        float* to = static_cast<float*>(p.z) + i * (linear ? p.r : 2 * p.r) + k;
        to[0] = z;
        if (!linear) to[p.r] = a;
      }
      give(m, 0, z);
    }
  }

  // The backward's likewise. `Extra`: z and gp behind those of the expand, as add_products takes them.
  template <bool Extra>
  __device__ __forceinline__ void backward_coordinates(int64_t first, Known next) const {
    const bool wants_z = Extra || p.packed != nullptr;
    for (int unit = warp; unit < units(); unit += kFusedWarps) {
      const Known it = next;
      next = known<true>(first, unit + kFusedWarps, wants_z);
      const int m = row_of(unit);
      const int64_t i = first + m;
      const float sum = add_ranks(unit / Groups, 0);
      const float gz = it.live != 0 && k < p.r ? sum : 0.f;
      const float gp = p.act == Act::identity ? gz : gz * act_slope(p.act, it.a);
      for (int q = 0; q < s.expands; ++q) give(m, q * Rank, q + expand_from == 1 ? -gz : gp);
      if constexpr (Extra) {
        give(m, depth, it.z);
        give(m, depth + both_depth(Rank), gp);
      } else if (p.packed != nullptr) {
        keep_packed(i, it.z, gp, gz);
      }
    }
  }

  // Eight coordinates of row i for sums_kernel, whose depth is 16 at least: zeros follow where Rank is less.
  __device__ __forceinline__ void keep_packed(int64_t i, float z, float gp, float gz) const {
    const uint4 eights[3] = {together(z), together(gp), together(gz)};
    if (i >= p.n || lane >= 3) return;
    T* to = static_cast<T*>(p.packed) + (i * 3 + lane) * p.packed_depth + k / 8 * 8;
    *reinterpret_cast<uint4*>(to) = lane == 0 ? eights[0] : lane == 1 ? eights[1] : eights[2];
    if (p.packed_depth > Rank) *reinterpret_cast<uint4*>(to + 8) = make_uint4(0, 0, 0, 0);
  }

  // The coordinates times the matrices' slices, added to the warp's columns of the tile.
  template <bool Backward>
  __device__ __forceinline__ void expand_tile(T* mine) const {
    constexpr int Steps = kExpandSteps<Rank, Backward>;
    constexpr bool One = Backward && Rank > 16;  // block of 16 rows at a time: registers
    const T* slice = expand + warp * columns;
    if (One || s.rows == 16) {
      for (int m = 0; m < s.rows; m += 16)
        expand_rows<T, Steps, 1>(mine + m * pitch, coordinates + m * coordinate_pitch, coordinate_pitch, slice, pitch,
                                 columns, depth / 16);
      return;
    }
    for (int m = 0; m < s.rows; m += 32)
      expand_rows<T, Steps, 2>(mine + m * pitch, coordinates + m * coordinate_pitch, coordinate_pitch, slice, pitch,
                               columns, depth / 16);
  }
};

}  // namespace fastreft
