// The loops of int8_loops.h for any CPU, by the compiler. Internal linkage, see shared/formats.h.
#pragma once

#include "shared/formats.h"

namespace ternarize {
namespace {
namespace int8 {

constexpr int64_t kSums = 4, kFew = 0, kTileRows = 0;
constexpr int32_t kSumOffset = 0, kPanelOffset = 0;
struct Session {};

template <int rows, int n>
void dots(const int8_t* weights, int64_t weights_stride, int64_t cols, const int8_t* q,
          int64_t stride, int64_t, int32_t* sums) {
  for (int r = 0; r < n; ++r)
    for (int i = 0; i < rows; ++i) {
      const int8_t* w = weights + i * weights_stride;
      const int8_t* x = q + r * stride;
      int32_t sum = 0;
      for (int64_t c = 0; c < cols; ++c)
        sum += static_cast<int16_t>(w[c]) * static_cast<int16_t>(x[c]);
      sums[r * rows + i] = sum;
    }
}

}  // namespace int8
}  // namespace
}  // namespace ternarize
