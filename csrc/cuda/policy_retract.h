// Launch policy of the retraction and the optimizer's step (retract.cu), as policy.h has it for all else.
#pragma once
#include "policy.h"

namespace fastreft {

constexpr int kRetractCluster = 8;  // CTAs at most
constexpr int kRetractThreads = 512;
constexpr int kBesideThreads = 128;                          // of the same CTA that step plain parameters meanwhile
constexpr int64_t kRetractHead = 192 + kRetractThreads * 8;  // bytes: what a CTA works with, and sums across warps

struct RetractPlan {
  int cluster = 1;
  int terms = 1024;            // columns of a chunk
  int64_t shared_entries = 0;  // retract_entries() of the largest matrix, or 0: its r x r matrices lie in scratch
  int64_t chunk_bytes = 0;     // of two chunks, [r, pitch] each
  int64_t room = 0;            // that chunk_bytes may grow to, for a CTA's columns to stay in shared memory
};

// Doubles of a CTA for its r x r matrices, rounded up to pairs: a sum over columns, the sum of those of a cluster, and,
// where there is one, what its other CTAs send of theirs.
FASTREFT_HOST_DEVICE constexpr int64_t retract_pairs(int64_t r) { return (r * r + 1) / 2; }
constexpr int64_t retract_entries(int64_t r, int cluster) {
  return 4 * retract_pairs(r) + (cluster > 1 ? 2 * (retract_pairs(r) + kRetractCluster) : 0);
}
constexpr int64_t retract_shared(int64_t entries, int64_t chunk_bytes) {
  return kRetractHead + chunk_bytes + entries * 8;
}

// Columns of each CTA of a cluster, the last one's fewer: whole quads of every type.
FASTREFT_HOST_DEVICE constexpr int64_t retract_columns(int64_t d, int cluster) {
  return cluster > 1 ? ((d + cluster - 1) / cluster + 7) / 8 * 8 : d;
}
// Elements of `size` bytes from one row of a chunk to the next: 16 bytes, and 16 more than a multiple of 128 where
// there are that many, so that the same 16 bytes of 8 neighbouring rows lie in different banks.
FASTREFT_HOST_DEVICE constexpr int64_t retract_pitch(int64_t columns, int size) {
  const int64_t bytes = (columns * size + 15) / 16 * 16;
  return (bytes < 128 ? bytes : (bytes + 127) / 128 * 128 + 16) / size;
}
FASTREFT_HOST_DEVICE constexpr int64_t retract_chunks(int64_t r, int64_t columns, int size) {
  return 2 * r * retract_pitch(columns, size) * size;
}

// For `matrices` matrices of which the largest have r rows and d columns; `wide`: they are fp64.
inline RetractPlan plan_retract(int64_t r, int64_t d, int64_t matrices, bool wide, const Device& device) {
  RetractPlan plan;
  const int size = wide ? 8 : 4;
  // Chunks of about 4096 elements: enough for every thread to have several loads on their way.
  while (plan.terms > 32 && r * plan.terms > (wide ? 2048 : 4096)) plan.terms /= 2;
  const auto room = [&](int cluster) { return device.shared - retract_shared(retract_entries(r, cluster), 0); };
  const int64_t least = retract_chunks(r, plan.terms, size);
  if (room(1) >= least) {
    // The largest of which all run at once: a second turn of a few clusters takes as long as the first. Where no
    // cluster does, the smallest whose columns stay in shared memory, turn after turn: chunks that come anew for every
    // pass take longer than two.
    const int most = kRetractCluster < device.largest_cluster ? kRetractCluster : device.largest_cluster;
    const auto stays = [&](int cluster) {
      return retract_chunks(r, retract_columns(d, cluster), size) <= room(cluster);
    };
    for (int cluster = 2; cluster <= most && 256 * cluster <= d && room(cluster) >= least; ++cluster) {
      const bool at_once = resident_clusters(device, cluster, 1) >= matrices;
      if (at_once || (!stays(plan.cluster) && stays(cluster))) plan.cluster = cluster;
    }
    plan.shared_entries = retract_entries(r, plan.cluster);
  } else {
    while (plan.terms > 16 / size && retract_shared(0, retract_chunks(r, plan.terms, size)) > device.shared)
      plan.terms /= 2;
  }
  plan.chunk_bytes = retract_chunks(r, plan.terms, size);
  plan.room = device.shared - retract_shared(plan.shared_entries, 0);
  return plan;
}

}  // namespace fastreft
