// fN+lM on a CPU: one pass over each sample's mask and labels, where torch would run some twenty small ops.
#include "../positions.h"

#include <algorithm>

namespace fastreft {

namespace {

int64_t at(const Entries& entries, int64_t b, int64_t s) {
  const int64_t i = b * entries.row + s * entries.column;
  switch (entries.size) {
    case 1: return static_cast<const int8_t*>(entries.p)[i];
    case 2: return static_cast<const int16_t*>(entries.p)[i];
    case 4: return static_cast<const int32_t*>(entries.p)[i];
    default: return static_cast<const int64_t*>(entries.p)[i];
  }
}

}  // namespace

void prompt_rows_cpu(const PromptArgs& args) {
  const int64_t places = args.first + args.last;
  for (int64_t b = 0; b < args.batch; ++b) {
    const auto shown = [&](int64_t s) { return !args.mask.p || at(args.mask, b, s) != 0; };
    int64_t end = 0, tokens = 0;
    for (; end < args.length && !(args.labels.p && at(args.labels, b, end) != -100); ++end) tokens += shown(end);
    const int64_t half = tokens / 2;
    const bool both = args.first && args.last;
    const int64_t from_start = args.pyreft_compat || both ? half : tokens;
    const int64_t from_end = args.pyreft_compat ? half : both ? tokens - half : tokens;
    const int64_t f = std::min(args.first, from_start), l = std::min(args.last, from_end);
    int64_t* rows = args.rows + b * places;
    std::fill(rows, rows + places, -1);
    for (int64_t k = 0, s = 0; k < f; ++s)
      if (shown(s)) rows[k++] = b * args.length + s;
    for (int64_t k = 0, s = end - 1; k < l; --s)
      if (shown(s)) rows[places - 1 - k++] = b * args.length + s;
  }
}

int64_t hidden_sample(const Entries& mask, int64_t batch, int64_t length) {
  for (int64_t b = 0; b < batch; ++b) {
    int64_t s = 0;
    while (s < length && at(mask, b, s) == 0) ++s;
    if (s == length) return b;
  }
  return -1;
}

}  // namespace fastreft
