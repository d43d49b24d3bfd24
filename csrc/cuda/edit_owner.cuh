// The warps that work out coordinates: of each tile those of the rows that their CTA's rank owns, from the sums that
// all ranks sent, for all ranks (edit_fused.cuh). They do nothing else, so that the 8 warps with the products never
// wait for each other's additions: what arrives for one tile is added while those are at work on the next.
//
// The work is dealt in units of a row and 8 coordinates, to 8 lanes each.
#pragma once
#include "edit_cta.cuh"

namespace fastreft {

// What a row's owner needs to know of coordinate k beside its sums.
struct Known {
  int live = 0;        // whether the row is there and is edited; a whole register: bytes are put together one by one
  float z = 0, a = 0;  // of the forward; the backward's, where they are needed
};

// `Team`: how many warps share it; `member`: which of them this is.
template <typename T, int Rank, int Team>
struct Owner {
  static constexpr int Groups = Rank / 8;  // of 8 coordinates
  static constexpr int UnitLanes = 8, WarpUnits = 32 / UnitLanes, UnitsAtOnce = Team * WarpUnits;
  const Cta<T, Rank>& cta;
  const Pass& p;
  int member;
  // The forward's vectors of a lane's coordinate, and with 64 coordinates of its other one: a warp's units are half a
  // row.
  float b = 0, c = 0, other_b = 0, other_c = 0;

  __device__ __forceinline__ Owner(const Cta<T, Rank>& cta, int member) : cta(cta), p(cta.p), member(member) {}

  // After wait_for_launch_before.
  __device__ __forceinline__ void load_vectors() {
    load_vectors_of(0, b, c);
    if (Groups > WarpUnits) load_vectors_of(WarpUnits, other_b, other_c);
  }
  __device__ __forceinline__ void load_vectors_of(int base, float& b, float& c) const {
    const int k = coordinate(base);
    if (p.b.p != nullptr && k < p.r) b = load_weight<float>(p.b, k);
    if (p.c.p != nullptr && k < p.r) c = load_weight<float>(p.c, k);
  }

  // A warp's units are [base, base + 4), of which a lane has one, and in it one coordinate. Lanes without a unit
  // work on the last row's and keep it to themselves.
  __device__ __forceinline__ int first_unit() const { return member * WarpUnits; }
  __device__ __forceinline__ int units() const { return cta.owned * Groups; }
  __device__ __forceinline__ bool takes(int base) const { return base + cta.lane / UnitLanes < units(); }
  __device__ __forceinline__ int own_row(int base) const {
    return takes(base) ? (base + cta.lane / UnitLanes) / Groups : cta.owned - 1;
  }
  __device__ __forceinline__ int row_of(int own) const { return (cta.rank << cta.work.own_shift) + own; }
  __device__ __forceinline__ int coordinate(int base) const {
    return base % Groups * 8 + cta.lane % (8 * (Groups < WarpUnits ? Groups : WarpUnits));
  }
  // Warps of the team that have anything to do.
  __device__ __forceinline__ static int at_work(const Cta<T, Rank>& cta) {
    const int wanted = (cta.owned * Groups + WarpUnits - 1) / WarpUnits;
    return wanted < Team ? wanted : Team;
  }

  // What is known of a lane's coordinate before its sums have arrived.
  template <bool Backward>
  __device__ __forceinline__ Known known(int64_t first, int base, bool wants_z) const {
    Known it;
    if (!takes(base)) return it;
    const int k = coordinate(base);
    const int64_t i = first + row_of(own_row(base));
    it.live = listed_row(p.index, i, p.n, p.total) >= 0 ? 1 : 0;
    if (!Backward || it.live == 0 || k >= p.r) return it;
    const bool linear = p.act == Act::identity;
    const float* z = static_cast<const float*>(p.z) + i * (linear ? p.r : 2 * p.r) + k;
    if (wants_z) it.z = z[0];
    if (!linear) it.a = z[p.r];
    return it;
  }

  // The sum of this lane's coordinate of matrix q for an owned row: ((r0 + r4) + (r1 + r5)) + ((r2 + r6) + (r3 + r7))
  // of the ranks', each of ((p0 + p1) + (p2 + p3)) of its parts. A lane adds up four neighbours, of every fourth rank,
  // and has its own of them when the lanes with the other ranks have added theirs.
  template <int LogParts>
  __device__ __forceinline__ float add_parts(const float* four, int next) const {
    constexpr int Parts = 1 << LogParts, Ranks = LogParts > 1 ? 1 : 2;  // on their way together
    float total[4] = {};
    for (int other = cta.lane % 4; other < cta.s.cluster; other += 4 * Ranks) {
      float4 x[Ranks][Parts] = {};
#pragma unroll
      for (int i = 0; i < Ranks; ++i) {
        if (other + 4 * i >= cta.s.cluster) continue;
#pragma unroll
        for (int q = 0; q < Parts; ++q)
          x[i][q] = *reinterpret_cast<const float4*>(four + (((other + 4 * i) << LogParts) + q) * next);
      }
#pragma unroll
      for (int i = 0; i < Ranks; ++i) {
        float4 sum = x[i][0];
        if constexpr (LogParts > 0) sum = plus(sum, x[i][1]);
        if constexpr (LogParts > 1) sum = plus(sum, plus(x[i][2], x[i][3]));
        total[0] += sum.x;
        total[1] += sum.y;
        total[2] += sum.z;
        total[3] += sum.w;
      }
    }
#pragma unroll
    for (int lane = 1; lane < 4; lane *= 2) {
#pragma unroll
      for (int i = 0; i < 4; ++i) total[i] += __shfl_xor_sync(0xffffffffu, total[i], lane);
    }
    const float low = cta.lane % 2 == 0 ? total[0] : total[1], high = cta.lane % 2 == 0 ? total[2] : total[3];
    return cta.lane % 4 < 2 ? low : high;
  }
  static __device__ __forceinline__ float4 plus(const float4& x, const float4& y) {
    return make_float4(x.x + y.x, x.y + y.y, x.z + y.z, x.w + y.w);
  }
  __device__ __forceinline__ float add_ranks(int set, int own, int q, int k) const {
    const float* four = cta.received(set) + own * cta.sums + q * Rank + k / 4 * 4;
    const int next = cta.sums << cta.work.own_shift;  // to the next part
    switch (cta.work.log_parts) {
      case 0: return add_parts<0>(four, next);
      case 1: return add_parts<1>(four, next);
      default: return add_parts<2>(four, next);
    }
  }

  // Eight neighbouring coordinates, one of each of a unit's 8 lanes, in all of them.
  __device__ __forceinline__ uint4 together(float x) const {
    const float y = __shfl_xor_sync(0xffffffffu, x, 1);
    const uint32_t two = cta.lane % 2 == 0 ? pack<T>(x, y) : pack<T>(y, x);
    const int unit = cta.lane / 8 * 8;
    return make_uint4(__shfl_sync(0xffffffffu, two, unit), __shfl_sync(0xffffffffu, two, unit + 2),
                      __shfl_sync(0xffffffffu, two, unit + 4), __shfl_sync(0xffffffffu, two, unit + 6));
  }
  // They to every rank, `offset` coordinates into row m's.
  __device__ __forceinline__ void give(int set, bool takes, int m, int offset, float x) const {
    const uint4 eight = together(x);
    if (!takes) return;
    T* to = cta.coordinates(set) + m * cta.coordinate_pitch + offset / 8 * 8;
    for (int other = cta.lane % UnitLanes; other < cta.s.cluster; other += UnitLanes)
      cta.send_to(to, eight, cta.coordinates_arrivals(set), other);
  }

  // The forward's coordinates of a tile, from what the ranks sent, to every rank. `next`: known of the first unit.
  __device__ __forceinline__ void forward_coordinates(int set, int64_t first, Known next) const {
    const bool linear = p.act == Act::identity;
    for (int base = first_unit(); base < units(); base += UnitsAtOnce) {
      const Known it = next;
      next = known<false>(first, base + UnitsAtOnce, false);
      const int own_one = own_row(base), m = row_of(own_one), k = coordinate(base);
      const int64_t i = first + m;
      float s0 = add_ranks(set, own_one, 0, k), s1 = cta.s.shrinks > 1 ? add_ranks(set, own_one, 1, k) : 0.f;
      if (cta.shrink_from > 0) {
        s1 = s0;
        s0 = 0;
      }
      const bool there = k < p.r && it.live != 0, other = Groups > WarpUnits && base / WarpUnits % 2 != 0;
      const float a = there ? s0 + (other ? other_b : b) : 0.f;
      float z = a;
      if (!linear) z = act_value(p.act, a);
      z = there ? z - s1 - (other ? other_c : c) : 0.f;
      if (p.z != nullptr && takes(base) && k < p.r && i < p.n) {
        float* to = static_cast<float*>(p.z) + i * (linear ? p.r : 2 * p.r) + k;
        to[0] = z;
        if (!linear) to[p.r] = a;
      }
      give(set, takes(base), m, k, z);
    }
  }

  // The backward's likewise. `Extra`: z and gp behind those of the expand, as add_products takes them, and the sum of
  // gp.
  template <bool Extra>
  __device__ __forceinline__ void backward_coordinates(int set, int64_t first, Known next, float& vector) const {
    const bool wants_z = Extra || p.packed != nullptr;
    for (int base = first_unit(); base < units(); base += UnitsAtOnce) {
      const Known it = next;
      next = known<true>(first, base + UnitsAtOnce, wants_z);
      const int own_one = own_row(base), m = row_of(own_one), k = coordinate(base);
      const float sum = add_ranks(set, own_one, 0, k);
      const float gz = it.live != 0 && k < p.r ? sum : 0.f;
      float gp = gz;
      if (p.act != Act::identity) gp = gz * act_slope(p.act, it.a);
      for (int q = 0; q < cta.s.expands; ++q)
        give(set, takes(base), m, q * Rank + k, q + cta.expand_from == 1 ? -gz : gp);
      if constexpr (Extra) {
        vector += takes(base) ? gp : 0.f;
        give(set, takes(base), m, cta.depth + k, it.z);
        give(set, takes(base), m, cta.depth + both_depth(Rank) + k, gp);
      } else if (p.packed != nullptr) {
        keep_packed(takes(base), first + m, k, it.z, gp, gz);
      }
    }
  }

  // Eight coordinates of row i for sums_kernel, whose depth is 16 at least: zeros follow where Rank is less.
  __device__ __forceinline__ void keep_packed(bool takes, int64_t i, int k, float z, float gp, float gz) const {
    const uint4 eights[3] = {together(z), together(gp), together(gz)};
    const int which = cta.lane % UnitLanes;
    if (!takes || i >= p.n || which >= p.packed_parts) return;
    T* to = static_cast<T*>(p.packed) + i * packed_pitch(p.packed_depth, p.packed_parts) + which * p.packed_depth +
            k / 8 * 8;
    *reinterpret_cast<uint4*>(to) = which == 0 ? eights[0] : which == 1 ? eights[1] : eights[2];
    if (p.packed_depth > Rank) *reinterpret_cast<uint4*>(to + 8) = make_uint4(0, 0, 0, 0);
  }

  // The coordinates of all tiles of the CTA's cluster. A member without units never waits: it could miss a phase.
  template <bool Backward, bool Extra>
  __device__ __forceinline__ void run(int64_t cluster, int64_t clusters, int64_t tiles, float& vector) const {
    if (first_unit() >= units()) return;
    const bool wants_z = Extra || (Backward && p.packed != nullptr);
    Turn at;
    Known next = known<Backward>(cluster * cta.s.rows, first_unit(), wants_z);
    for (int64_t tile = cluster; tile < tiles; tile += clusters) {
      const int64_t first = tile * cta.s.rows;
      arrivals_wait(cta.sums_arrivals(at.set), at.phase);
      if (cta.s.cluster > 1 && member == 0 && cta.lane == 0)
        arrivals_expect(cta.sums_arrivals(at.set), cta.sums_bytes());
      if constexpr (Backward) {
        backward_coordinates<Extra>(at.set, first, next, vector);
      } else {
        forward_coordinates(at.set, first, next);
      }
      cta.sent(cta.coordinates_arrivals(at.set));
      next = known<Backward>(first + clusters * cta.s.rows, first_unit(), wants_z);
      at.step(cta.s, cta.at);
    }
  }
};

}  // namespace fastreft
