// Instructions of cuda_host.h that compute: 16-bit conversions, and the matrix instructions lane by lane.
#include <cstdio>
#include <cstdlib>

#include "cuda_host.h"

namespace simt {

uint16_t to_bf16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
uint16_t to_f16(float x) {
  const _Float16 half = static_cast<_Float16>(x);
  uint16_t bits;
  memcpy(&bits, &half, 2);
  return bits;
}
float from_f16(uint16_t x) {
  _Float16 half;
  memcpy(&half, &x, 2);
  return static_cast<float>(half);
}

// mma.m16n8k16: lane l holds, with g = l / 4 and t = l % 4, A's rows g and g + 8 at columns 2t, 2t+1 and 2t+8, 2t+9,
// B's rows 2t, 2t+1 and 2t+8, 2t+9 of column g, and C's rows g and g + 8 at columns 2t, 2t+1.
void multiply(float (&c)[4], const Fragments& mine, float (*value)(uint16_t)) {
  const char* all = meet("mma", &mine, sizeof(mine));
  for (int i = 0; i < 4; ++i) {
    const int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      const auto left = of_lane<Fragments>(all, row % 8 * 4 + k % 8 / 2).a[row / 8 + k / 8 * 2];
      const auto right = of_lane<Fragments>(all, column * 4 + k % 8 / 2).b[k / 8];
      sum += value(static_cast<uint16_t>(left >> k % 2 * 16)) * value(static_cast<uint16_t>(right >> k % 2 * 16));
    }
    c[i] += sum;
  }
}

void load_matrices(uint32_t (&r)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    fprintf(stderr, "simt: a misaligned ldmatrix row\n");
    _Exit(3);
  }
  struct Row {
    uint16_t x[8];
  } mine;
  memcpy(&mine, row, 16);
  const char* all = meet(transposed ? "ldmatrix.trans" : "ldmatrix", &mine, sizeof(mine));
  const int g = lane() / 4, t = lane() % 4;
  for (int m = 0; m < 4; ++m) {
    uint32_t low, high;
    if (transposed) {
      low = of_lane<Row>(all, m * 8 + 2 * t).x[g];
      high = of_lane<Row>(all, m * 8 + 2 * t + 1).x[g];
    } else {
      low = of_lane<Row>(all, m * 8 + g).x[2 * t];
      high = of_lane<Row>(all, m * 8 + g).x[2 * t + 1];
    }
    r[m] = low | high << 16;
  }
}

// stmatrix: lane l gives the address of row l % 8 of matrix l / 8; of each matrix it holds row l / 4 at columns 2 (l %
// 4) and the next.
void store_matrices(void* row, const uint32_t (&r)[4]) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
    fprintf(stderr, "simt: a misaligned stmatrix row\n");
    _Exit(3);
  }
  struct Registers {
    uint32_t r[4];
  } mine;
  memcpy(mine.r, r, sizeof(mine));
  const char* all = meet("stmatrix", &mine, sizeof(mine));
  uint32_t words[4];
  for (int t = 0; t < 4; ++t) words[t] = of_lane<Registers>(all, lane() % 8 * 4 + t).r[lane() / 8];
  memcpy(row, words, 16);
}

}  // namespace simt
