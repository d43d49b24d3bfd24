// What a CTA of the three tensor-core kernels (edit_fused.cuh, edit_both.cuh, edit_streamed.cuh) knows of its place:
// what lies where in its shared memory, which columns are its warp's, which matrices are there; and the steps of a tile
// that are the same in all three.
#pragma once
#include "edit_tile.cuh"

namespace fastreft {

// mma's steps of 16 over the coordinates of an expand: the backward's can be two matrices' (gp and gz).
template <int Rank, bool Backward>
constexpr int kExpandSteps = Backward ? (Rank > 8 ? Rank / 8 : 1) : (Rank > 16 ? Rank / 16 : 1);

// Rows of an expand that a warp does at a time, in 16s: as many as registers allow, of which addresses take more before
// cc 9.0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <int Rank, bool Backward>
constexpr int kExpandBlocks = 1;
#else
template <int Rank, bool Backward>
constexpr int kExpandBlocks = Backward && Rank > 8 ? 1 : 2;
#endif

// Where a CTA stands among its tiles (edit_fused.cuh).
struct Turn {
  int stage = 0, filled = 0;  // of the tile, and the phase in which it is filled
  int second = 0, second_filled = 0;
  int set = 0, phase = 0;  // of what is received, likewise
  __device__ __forceinline__ void step(const FusedShape& s, const FusedLayout& at) {
    go_on(stage, filled, s.stages);
    go_on(second, second_filled, at.second_stages);
    go_on(set, phase, at.sets);
  }
  static __device__ __forceinline__ void go_on(int& i, int& phase, int count) {
    if (++i < count) return;
    i = 0;
    phase ^= 1;
  }
};

template <typename T, int Rank>
struct Cta {
  static constexpr int Groups = Rank / 8;  // of 8 coordinates
  const Pass& p;
  const FusedShape& s;
  const FusedLayout& at;
  const ShrinkWork& work;
  int rank;                      // in the cluster
  int warp, lane, columns;       // this warp, and how many columns it has
  int pitch, coordinate_pitch;   // of a slice and a tile, of the coordinates
  int tile_size;                 // elements
  int sums, depth;               // of a row: sums of all matrices, coordinates that expand
  int owned;                     // rows of a tile whose coordinates this rank works out
  int shrink_from, expand_from;  // the first matrix that is there, which comes first in shared memory
  bool fp32;                     // all matrices are

  __device__ __forceinline__ Cta(const Fused& f, int rank)
      : p(f.pass), s(f.shape), at(f.at), work(f.shrink), rank(rank) {
    warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0);  // known to be the same for the warp
    lane = threadIdx.x % 32;
    columns = s.width / kFusedWarps;
    pitch = static_cast<int>(at.pitch);
    coordinate_pitch = static_cast<int>(at.coordinate_pitch);
    tile_size = s.rows * pitch;
    sums = s.shrinks * Rank;
    depth = at.depth;
    const int own = 1 << work.own_shift, left = s.rows - rank * own;
    owned = left <= 0 ? 0 : left < own ? left : own;
    shrink_from = f.shrink_from;
    expand_from = f.expand_from;
    fp32 = f.fp32;
  }

  // The parts of shared memory, as FusedLayout says.
  __device__ __forceinline__ T* shrink() const { return reinterpret_cast<T*>(shared_memory() + at.shrink); }
  __device__ __forceinline__ T* expand() const { return reinterpret_cast<T*>(shared_memory() + at.expand); }
  __device__ __forceinline__ T* tiles() const { return reinterpret_cast<T*>(shared_memory() + at.tiles); }
  __device__ __forceinline__ float* received(int set) const {
    return reinterpret_cast<float*>(shared_memory() + at.received + set * at.received_set);
  }
  __device__ __forceinline__ T* coordinates(int set) const {
    return reinterpret_cast<T*>(shared_memory() + at.coordinates + set * at.coordinates_set);
  }
  __device__ __forceinline__ Arrivals* sums_arrivals(int set) const {
    return reinterpret_cast<Arrivals*>(shared_memory() + at.arrivals) + set;
  }
  __device__ __forceinline__ Arrivals* coordinates_arrivals(int set) const { return sums_arrivals(at.sets + set); }
  // Of a stage: its tile is there; every warp is through with it.
  __device__ __forceinline__ Arrivals* filled(int stage) const { return sums_arrivals(2 * at.sets + stage); }
  __device__ __forceinline__ Arrivals* edited(int stage) const { return filled(s.stages + stage); }
  __device__ __forceinline__ Arrivals* second_filled(int stage) const { return edited(s.stages + stage); }

  // The i-th tile in shared memory, and the warp's columns of it. Those of the second input come behind the stages.
  __device__ __forceinline__ T* whole(int i) const { return tiles() + i * tile_size; }
  __device__ __forceinline__ T* tile(int i) const { return whole(i) + warp * columns; }

  // Where they begin in global memory, of a slice that begins at `slice` there.
  __device__ __forceinline__ int64_t column(int64_t slice) const { return slice + warp * columns; }

  // The warp's columns of a tile, which begin at `column`, from `rows` in global memory (see tile_rows) and to
  // Pass::out.
  __device__ __forceinline__ void load(T* to, const Rows& rows, int64_t first, bool direct, int64_t column) const {
    load_tile(to, rows.p, tile_rows({p.index, p.n, p.total}, rows, first, s.rows, direct), s.rows, pitch, columns,
              column, p.d);
  }
  __device__ __forceinline__ void store(const T* mine, const Rows& rows, int64_t first, bool direct,
                                        int64_t column) const {
    store_tile(rows.p, mine, tile_rows({p.index, p.n, p.total}, rows, first, s.rows, direct), s.rows, pitch, columns,
               column, p.d);
  }

  // The slice that begins at column `slice` of the matrices that shrink, or of those that expand.
  __device__ __forceinline__ void load_shrink(int64_t slice) const {
    load_slice(shrink(), p.shrink + shrink_from, 2 - shrink_from, sums, slice);
  }
  __device__ __forceinline__ void load_expand(int64_t slice) const {
    load_slice(expand(), p.expand + expand_from, 2 - expand_from, depth, slice);
  }
  __device__ __forceinline__ void load_slice(T* to, const Matrix2* matrices, int count, int rows, int64_t slice) const {
    if (fp32) {
      load_slice_as<T, Rank, true>(to, matrices, count, rows, s.width, pitch, p.r, p.d, slice);
    } else {
      load_slice_as<T, Rank, false>(to, matrices, count, rows, s.width, pitch, p.r, p.d, slice);
    }
  }

  // What is sent to a rank in a tile, in bytes.
  __device__ __forceinline__ int sums_bytes() const { return (owned * sums * s.cluster * 4) << work.log_parts; }
  __device__ __forceinline__ int coordinates_bytes(int chunks) const { return s.rows * Rank * 2 * chunks; }

  // Padding is zeros for as long as the CTA lives. By the 8 warps that work.
  __device__ __forceinline__ void clear_coordinates() const {
    const int padded = at.sets * s.rows * coordinate_pitch;
    for (int e = threadIdx.x; e < padded; e += kFusedThreads) coordinates(0)[e] = rounded<T>(0.f);
  }
  // Before the first tile; all_started must follow. `chunks`: of Rank coordinates that a row is sent; `owners`:
  // warps that send coordinates.
  __device__ __forceinline__ void begin(int chunks, int owners) const {
    clear_coordinates();
    if (threadIdx.x != 0) return;
    for (int set = 0; set < at.sets; ++set) {
      arrivals_init(sums_arrivals(set), s.cluster > 1 ? 1 : kFusedWarps);
      arrivals_init(coordinates_arrivals(set), s.cluster > 1 ? 1 : owners);
      arrivals_init_fence();
      if (s.cluster == 1) continue;
      arrivals_expect(sums_arrivals(set), sums_bytes());
      arrivals_expect(coordinates_arrivals(set), coordinates_bytes(chunks));
    }
  }
  // 16 bytes to the same place in the shared memory of a rank, which counts them. A launch without clusters has no
  // sends (st.async is an illegal instruction in it): one CTA's warps store, and say when they have (sent).
  __device__ __forceinline__ void send_to(void* to, const uint4& x, Arrivals* a, int other) const {
    if (s.cluster > 1) {
      send(to, x, a, other);
    } else {
      *static_cast<uint4*>(to) = x;
    }
  }
  __device__ __forceinline__ void sent(Arrivals* a) const {
    if (s.cluster > 1) return;
    __syncwarp();
    if (lane == 0) arrive(a);
  }
  // `phase`: how often the set was waited for before, its last bit.
  __device__ __forceinline__ void wait_for_coordinates(int set, int phase, int chunks) const {
    arrivals_wait(coordinates_arrivals(set), phase);
    if (s.cluster > 1 && threadIdx.x == 0) arrivals_expect(coordinates_arrivals(set), coordinates_bytes(chunks));
  }
  // Until all warps are through with the tile that this turn was about: what was received for it may be overwritten.
  __device__ __forceinline__ void wait_for_others(const Turn& turn) const {
    arrivals_wait(edited(turn.stage), turn.filled);
  }
  // This warp is through with a stage, which it has edited or not.
  __device__ __forceinline__ void give_back(int stage) const {
    async_fence();
    __syncwarp();
    if (lane == 0) arrive(edited(stage));
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
    const int quarter = s.width / 4, parts = 1 << work.log_parts, quarters = 4 >> work.log_parts;
    for (int mine = warp; mine < work.items * parts; mine += kFusedWarps) {
      const int part = mine & (parts - 1), item = mine >> work.log_parts;
      const int group = s.shrinks > 1 ? item % (2 * PerMatrix) : item % PerMatrix;
      const int first = (s.shrinks > 1 ? item / (2 * PerMatrix) : item / PerMatrix) * 16 * Blocks;
      const T* a = whole + first * pitch + part * quarters * quarter;
      const T* b = shrink() + group * 8 * Eights * pitch + part * quarters * quarter;
      float sum[Blocks][Eights][4] = {}, half[Blocks][Eights][4] = {};
      for (int q = 0; q < quarters; ++q, a += quarter, b += quarter) {
        float own[Blocks][Eights][4] = {};
        shrink_rows<Rank == 16 ? 2 : 4>(own, a, b, pitch, quarter);
#pragma unroll
        for (int e = 0; e < Blocks * Eights * 4; ++e) {
          float &x = sum[e / (Eights * 4)][e / 4 % Eights][e % 4], &y = half[e / (Eights * 4)][e / 4 % Eights][e % 4];
          const float z = own[e / (Eights * 4)][e / 4 % Eights][e % 4];
          x = q % 2 == 0 ? x + y : x;
          y = q % 2 == 0 ? z : y + z;
        }
      }
#pragma unroll
      for (int e = 0; e < Blocks * Eights * 4; ++e)
        sum[e / (Eights * 4)][e / 4 % Eights][e % 4] += half[e / (Eights * 4)][e / 4 % Eights][e % 4];
      deliver_sums(sum, first, group, part, deliver);
    }
  }
  // A warp's sums of rows from `first` on and of the group-th 8 Eights coordinates, as shrink_tile says.
  template <int Blocks, int Eights, typename F>
  __device__ __forceinline__ void deliver_sums(const float (&sum)[Blocks][Eights][4], int first, int group, int part,
                                               const F& deliver) const {
    // A lane has two neighbours of row g and two of row g + 8; it gives one pair for the other lane's. All exchanges
    // are on their way before one is waited for.
    const bool odd = lane % 2 != 0;
    float x[Blocks][Eights], y[Blocks][Eights];
#pragma unroll
    for (int m = 0; m < Blocks; ++m) {
#pragma unroll
      for (int e = 0; e < Eights; ++e) {
        x[m][e] = __shfl_xor_sync(0xffffffffu, odd ? sum[m][e][0] : sum[m][e][2], 1);
        y[m][e] = __shfl_xor_sync(0xffffffffu, odd ? sum[m][e][1] : sum[m][e][3], 1);
      }
    }
#pragma unroll
    for (int m = 0; m < Blocks; ++m) {
#pragma unroll
      for (int e = 0; e < Eights; ++e) {
        const float (&c)[4] = sum[m][e];
        const float four[4] = {odd ? x[m][e] : c[0], odd ? y[m][e] : c[1], odd ? c[2] : x[m][e], odd ? c[3] : y[m][e]};
        deliver(first + m * 16 + lane / 4 + (odd ? 8 : 0), (group * Eights + e) * 8 + lane % 4 / 2 * 4, part, four);
      }
    }
  }

  // A row's four sums to the rank that owns it.
  __device__ __forceinline__ void send_sums(int set, int row, int coordinate, int part, const float (&four)[4]) const {
    const int own = row & ((1 << work.own_shift) - 1), from = (rank << work.log_parts) + part;
    send_to(received(set) + ((from << work.own_shift) + own) * sums + coordinate,
            make_uint4(as_bits(four[0]), as_bits(four[1]), as_bits(four[2]), as_bits(four[3])), sums_arrivals(set),
            row >> work.own_shift);
  }
  // The shrink of the tile in a stage, its sums to their owners.
  __device__ __forceinline__ void shrink_and_send(const T* whole, int set) const {
    shrink_tile(whole, [&](int row, int coordinate, int part, const float (&four)[4]) {
      send_sums(set, row, coordinate, part, four);
    });
    sent(sums_arrivals(set));
  }

  // The coordinates times the matrices' slices, added to the warp's columns of the tile.
  template <bool Backward>
  __device__ __forceinline__ void expand_tile(T* mine, const T* coordinates) const {
    constexpr int Blocks = kExpandBlocks<Rank, Backward>;
    if (s.rows >= 16 * Blocks) {
      for (int m = 0; m < s.rows; m += 16 * Blocks) expand_blocks<Backward, Blocks>(mine, coordinates, m);
    } else {
      expand_blocks<Backward, 1>(mine, coordinates, 0);
    }
  }
  template <bool Backward, int Blocks>
  __device__ __forceinline__ void expand_blocks(T* mine, const T* coordinates, int m) const {
    const T* matrices = expand() + warp * columns;
    mine += m * pitch;
    coordinates += m * coordinate_pitch;
    if (Rank == 8 && depth == 8) {
      expand_rows<T, 1, Blocks, true>(mine, coordinates, coordinate_pitch, matrices, pitch, columns, 1);
    } else {
      expand_rows<T, kExpandSteps<Rank, Backward>, Blocks, false>(mine, coordinates, coordinate_pitch, matrices, pitch,
                                                                  columns, depth / 16);
    }
  }
};

}  // namespace fastreft
