// The forward of a block of rows that one edit has, and which rows of a list are edited: for edit.cpp and slots.cpp.
#pragma once
#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "activations.h"
#include "support.h"

namespace fastreft {

// The places of `index` that are edited: negative entries are left out, of repeated ones the first stays.
inline std::vector<int64_t> edited_slots(const int64_t* index, int64_t n, int64_t total) {
  std::vector<int64_t> slots;
  slots.reserve(n);
  int64_t last = -1;
  bool ascending = true;
  for (int64_t i = 0; i < n; ++i) {
    if (index[i] < 0) continue;
    if (index[i] >= total)
      throw std::out_of_range("rows: " + std::to_string(index[i]) + " is past the last of " + std::to_string(total) +
                              " rows");
    ascending = ascending && index[i] > last;
    last = index[i];
    slots.push_back(i);
  }
  if (ascending) return slots;
  std::stable_sort(slots.begin(), slots.end(), [&](int64_t a, int64_t b) { return index[a] < index[b]; });
  slots.erase(std::unique(slots.begin(), slots.end(), [&](int64_t a, int64_t b) { return index[a] == index[b]; }),
              slots.end());
  return slots;
}

// z = act(a) - p - c for one row, from its projections (A already holds -P).
template <typename C>
void coordinates(const Packed& w, Act act, const C* projected, C* z, C* a) {
  const C *b = reinterpret_cast<const C*>(w.b.get()), *c = reinterpret_cast<const C*>(w.c.get());
  for (int64_t j = 0; j < w.r; ++j) {
    C value;
    if (w.linear) {
      value = (w.projections ? projected[j] : C(0)) + (b ? b[j] : C(0));
    } else {
      const C before = (w.has_v ? projected[j] : C(0)) + (b ? b[j] : C(0));
      if (a) a[j] = before;
      value = static_cast<C>(activate(act, before)) + (w.has_p ? projected[(w.has_v ? w.r : 0) + j] : C(0));
    }
    z[j] = c ? value - c[j] : value;
  }
}

// The edit of m <= kBlock rows. `projected` and `z` have room for kBlock rows; keep(i) is where row i's z (and a) are
// kept for a backward, or nullptr.
template <typename C, typename Keep>
void edit_block(const Packed& w, Act act, const void* const* src, void* const* dst, int m, bool past_caches,
                C* projected, C* z, const Keep& keep) {
  const int64_t width = std::max<int64_t>(w.projections, 1);
  // Four rows at a time, so that they are still in the nearest cache when they are expanded.
  for (int i = 0; i < m; i += 4) {
    const int some = std::min(4, m - i);
    if (w.projections) w.project(src + i, some, projected, width);
    for (int q = 0; q < some; ++q) {
      C* kept = keep(i + q);
      coordinates<C>(w, act, projected + q * width, z + q * w.r, kept && !w.linear ? kept + w.r : nullptr);
      if (kept) std::memcpy(kept, z + q * w.r, w.r * sizeof(C));
    }
    w.expand(src + i, dst + i, some, z, w.r, past_caches);
  }
}

}  // namespace fastreft
