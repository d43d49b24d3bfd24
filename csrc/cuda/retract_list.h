// What a launch of retract.cu is given, and how a call's items are shared out over launches.
#pragma once
#include "../edit.h"
#include "policy_retract.h"

namespace fastreft {

constexpr int kItems = 256;       // a launch's list: 23 KB of kernel parameters, of 32 there are from CUDA 12.1 on
constexpr int64_t kPiece = 2048;  // elements of a plain parameter that are shared out together
constexpr int kPlainPieces = 4;   // of a CTA that has nothing else to do
constexpr int64_t kAlign = 256;

// Parameters that one launch steps.
struct StepList {
  StepItem item[kItems];    // orthonormal ones before plain ones
  int first[kItems + 1];    // first piece of each plain item
  int place[kItems];        // of each item among the caller's
  int64_t scratch[kItems];  // bytes into `scratch`, or -1
  int matrices = 0, plain = 0;
  int share = kPlainPieces;  // plain pieces of a CTA
  int cluster = 1, terms = 32;
  int64_t shared_entries = 0;  // doubles that shared memory has room for beside the chunks
  int64_t chunk_bytes = 0;
  char* scratch_base = nullptr;
  int* status = nullptr;  // of all the caller's items
  StepArgs step;
};
static_assert(sizeof(StepList) <= 32764);

FASTREFT_HOST_DEVICE inline bool is_narrow(DType type) { return type == DType::bf16 || type == DType::f16; }

// Where each plain item begins among the pieces; one of no elements has one, too, for its status.
inline void plan_pieces(StepList& list) {
  int64_t pieces = 0;
  for (int i = 0; i < list.plain; ++i) {
    const Matrix& of = list.item[list.matrices + i].param;
    list.first[i] = static_cast<int>(pieces);
    pieces += of.r * of.d > 0 ? ceil_div(of.r * of.d, kPiece) : 1;
  }
  list.first[list.plain] = static_cast<int>(pieces);
}

// How far the caller's items have been launched: those whose sums run in fp64, or the others.
struct Turns {
  bool wide;
  int matrix = 0, plain = 0;  // the next that may be
};

// Takes items of a sort from `next` on into the list, while it has room; returns their elements.
inline int64_t take(StepList& list, int& taken, const StepItem* items, int count, bool wide, bool orthonormal,
                    int& next) {
  int64_t elements = 0;
  for (; next < count && list.matrices + list.plain < kItems; ++next) {
    const StepItem& item = items[next];
    if ((item.param.type == DType::f64) != wide || item.orthonormal != orthonormal) continue;
    list.place[list.matrices + list.plain] = next;
    list.item[list.matrices + list.plain] = item;
    ++taken;
    elements += item.param.r * item.param.d;
  }
  return elements;
}

// One launch's list, of what has not been launched yet; empty where all has. Returns the scratch bytes that the list
// needs, statuses aside.
inline int64_t plan(StepList& list, const StepItem* items, int count, Turns& turns, const Device& device) {
  const bool wide = turns.wide;
  list.matrices = list.plain = 0;
  const int64_t elements = take(list, list.matrices, items, count, wide, true, turns.matrix);
  int next = turns.plain;
  const int64_t beside = take(list, list.plain, items, count, wide, false, next);
  if (list.matrices > 0 && (wide || 2 * beside > 3 * elements)) {  // as much again and half would take longer
    list.plain = 0;
  } else {
    turns.plain = next;
  }
  plan_pieces(list);
  list.share = kPlainPieces;
  if (list.matrices == 0) return 0;
  int64_t r = 1, d = 1;
  for (int i = 0; i < list.matrices; ++i) {
    const Matrix& matrix = list.item[i].param;
    r = matrix.r > r ? matrix.r : r;
    d = matrix.d > d ? matrix.d : d;
  }
  const RetractPlan policy = plan_retract(r, d, list.matrices, wide, device);
  list.cluster = policy.cluster;
  list.share = static_cast<int>(ceil_div(list.first[list.plain], list.matrices * list.cluster));
  list.terms = policy.terms;
  list.shared_entries = policy.shared_entries;
  list.chunk_bytes = policy.chunk_bytes;
  int64_t bytes = 0;
  for (int i = 0; i < list.matrices; ++i) {
    const Matrix& matrix = list.item[i].param;
    // The largest of those whose columns may stay in shared memory.
    const int64_t stays = retract_chunks(matrix.r, retract_columns(matrix.d, list.cluster), wide ? 8 : 4);
    if (stays <= policy.room && stays > list.chunk_bytes) list.chunk_bytes = stays;
    list.scratch[i] = -1;
    int64_t need = 0;
    if (list.shared_entries == 0) need += 4 * retract_pairs(matrix.r) * 8;
    if (is_narrow(matrix.type)) need += matrix.r * matrix.d * 4;
    if (need == 0) continue;
    list.scratch[i] = bytes;
    bytes += round_up(need, kAlign);
  }
  return bytes;
}

}  // namespace fastreft
