// Sums in the fixed order, which every implementation of the methods shares: blocks of 128, the last
// one padded with zeros; in a block the upper half is added to the lower one until one number is left;
// the blocks' sums are summed in the same way. Internal linkage, see shared/formats.h.
#pragma once

#include "shared/formats.h"

namespace ternarize {
namespace {

constexpr int kBlock = 128;

// Adds the upper half of 2 half numbers to the lower one until one is left. Uses x up.
template <int half, class Float>
TERNARIZE_INLINE Float sum_halves(Float* x) {
  for (int i = 0; i < half; ++i) x[i] += x[i + half];
  if constexpr (half > 4) return sum_halves<half / 2>(x);
  return (x[0] + x[2]) + (x[1] + x[3]);
}

double sum_block(double* x) { return sum_halves<kBlock / 2>(x); }

// Sums of blocks on their way up: level 0 collects the sums of blocks of numbers, level 1 the sums
// of 128 of those, and so on. Nine levels hold more than 2^63 numbers.
struct Tree {
  double sums[9][kBlock];
  int used[9] = {};

  void add(double sum) {
    int level = 0;
    while (true) {
      sums[level][used[level]++] = sum;
      if (used[level] < kBlock) return;
      sum = sum_block(sums[level]);
      used[level++] = 0;
    }
  }

  double finish() {
    int top = 8;
    while (top > 0 && used[top] == 0) --top;
    for (int level = 0;; ++level) {
      if (level == top && used[level] <= 1) return used[level] ? sums[level][0] : 0.0;
      if (used[level] == 0) continue;
      for (int i = used[level]; i < kBlock; ++i) sums[level][i] = 0.0;
      const double sum = sum_block(sums[level]);
      used[level] = 0;
      if (level == top) return sum;
      sums[level + 1][used[level + 1]++] = sum;
    }
  }
};

// Of n values that are `stride` doubles apart.
inline double fixed_sum(const double* values, int64_t n, int64_t stride) {
  Tree tree;
  for (int64_t at = 0; at < n; at += kBlock) {
    double block[kBlock] = {};
    const int64_t count = smaller(kBlock, n - at);
    for (int64_t i = 0; i < count; ++i) block[i] = values[(at + i) * stride];
    tree.add(sum_block(block));
  }
  return tree.finish();
}

}  // namespace
}  // namespace ternarize
