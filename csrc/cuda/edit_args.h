// What the edit's kernels are handed: plain structs that the host fills in, see edit_forward.cu and edit_backward.cu.
#pragma once
#include "../edit.h"
#include "policy.h"

namespace fastreft {

// A matrix (r, d) as the kernels use it: w, or w - minus where `minus` is there (D = V - P, formed from the masters).
struct Matrix2 {
  Weight w;
  Weight minus;
};

// One pass over rows: shrink (products with up to two matrices), coordinates, expand (a sum over up to two matrices).
// The forward and the gradient of the hidden state are the same pass with other matrices:
//     forward    s0 = V x or (V - P) x,  s1 = P x;  z = act(s0 + b) - s1 - c;            out = x + U^T z
//     backward   s0 = U x = gz;  gp = gz act'(a);                                        out = x + V^T gp - P^T gz
struct Pass {
  int64_t n = 0, total = 0;
  int d = 0, r = 0;
  Rows in;                         // [total, d]
  Rows out;                        // [total, d], or p == nullptr where only the coordinates are wanted
  const int64_t* index = nullptr;  // [n] or none
  Matrix2 shrink[2];               // (r, d)
  Matrix2 expand[2];               // (r, d)
  Weight b, c;                     // (r), forward
  Act act = Act::identity;
  void* saved = nullptr;   // [n, d] the rows as read, or none; forward
  void* z = nullptr;       // [n, k] forward: written; backward: read
  void* gp = nullptr;      // [n, r] backward: written, or read where nothing is shrunk; none where act is the identity
  void* gz = nullptr;      // [n, r] likewise
  void* packed = nullptr;  // [n, packed_pitch] of the rows' type: z, gp, gz; backward on tensor cores, or none
  int packed_depth = 0, packed_parts = 3;
  int copy_rows = 0;  // rows a copying CTA owns (edit_copy.cuh); 0: none, all rows are edited or `out` is `in`
};

// A pass on tensor cores, edit_fused.cuh and edit_streamed.cuh.
struct Fused {
  Pass pass;
  FusedShape shape;
  FusedLayout at;     // of the shape
  ShrinkWork shrink;  // likewise
  int64_t tiles = 0;
  int64_t clusters = 0;                  // that edit; CTAs behind them copy
  int shrink_from = 0, expand_from = 0;  // the first matrix of the pass that is there
  bool fp32 = false;                     // all of them are
};

// The one-pass backward, edit_both.cuh.
struct Both {
  Fused f;
  Rows h;  // [n, d]; p == nullptr where no gradient needs it
  bool wants_first = false;
  float* partial = nullptr;  // [clusters, slots, r, d], first before second
  float* vectors = nullptr;  // [CTAs, 2, r]: sum gx of the rows a CTA owns, twice
};

// The sums over rows that the weights' gradients are made of:
//     sums[0] = sum z g^T      sums[1] = sum gp h^T      sums[2] = sum gz h^T     (each (r, d); absent ones have slot
//     -1)
struct Gradient {
  int64_t n = 0, total = 0;
  int d = 0, r = 0;
  int64_t range = 0;               // rows a partial sum covers
  int splits = 0;                  // partial sums there are
  int stages = 0;                  // of tiles in shared memory; tensor cores only
  Rows g;                          // [total, d]
  Rows h;                          // [n, d]
  const int64_t* index = nullptr;  // [n] or none
  const void* z = nullptr;         // [n, kept]
  int kept = 0;
  const void* gp = nullptr;           // [n, r]; none where act is the identity (gp = gz)
  const void* gz = nullptr;           // [n, r]
  const void* coordinates = nullptr;  // [n, packed_pitch] T: z, gp, gz padded with zeros; tensor cores only
  bool three = false;                 // whether gz is asked for apart from gp; likewise
  int slot[3] = {-1, -1, -1};
  int slots = 0;
  void* partial = nullptr;  // [splits, slots, r, d] accumulation type
  void* vectors = nullptr;  // [splits, 2, r]: sum gp, sum gz
};

// Partial sums -> gradients. dU = S0 - (tied ? S2 : 0), dV = S1, dP = -S2; where act is the identity S2 is S1's slot.
struct Finish {
  int64_t elements = 0;        // r d
  int64_t element_blocks = 0;  // CTAs for them
  int r = 0, splits = 0, slots = 0, vector_splits = 0;
  int u = -1, tied = -1, v = -1, p = -1;  // slots to read, -1 = none
  const void* partial = nullptr;          // [splits, slots, r, d]
  const void* vectors = nullptr;          // [vector_splits, 2, r]
  void *dU = nullptr, *dV = nullptr, *dP = nullptr, *db = nullptr, *dc = nullptr;
  DType U = DType::f32, V = DType::f32, P = DType::f32, b = DType::f32, c = DType::f32;
};

}  // namespace fastreft
