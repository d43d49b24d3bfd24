// The rows that fN+lM means in a batch of prompts, as a plain struct: no torch here.
#pragma once
#include <cstdint>

namespace fastreft {

// A (B, S) matrix of integers or bools; entry (b, s) lies `b * row + s * column` elements after p. p == nullptr: none.
struct Entries {
  const void* p = nullptr;
  int64_t size = 0;  // bytes of an element: 1, 2, 4 or 8
  int64_t row = 0, column = 0;
};

// The prompt of a sample is what `mask` shows (non-zero; all without one) before its first label other than -100. Of
// its L tokens the first f and the last l are meant: f = min(first, L / 2) and l = min(last, L - L / 2), floored both
// for pyreft, and min(first, L) or min(last, L) where the other is 0.
struct PromptArgs {
  Entries mask, labels;
  int64_t batch = 0, length = 0, first = 0, last = 0;
  bool pyreft_compat = false;
  int64_t* rows = nullptr;  // (B, first + last): b * S + s, prefix first; -1 for the places that a short prompt leaves
};

void prompt_rows_cpu(const PromptArgs& args);

// The first sample of which a (B, S) mask shows no token; -1 where there is none.
int64_t hidden_sample(const Entries& mask, int64_t batch, int64_t length);

}  // namespace fastreft
