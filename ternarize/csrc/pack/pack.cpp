// The threads of packing and unpacking.
#include "pack/pack.h"

#include "cpus/cpus.h"
#include "shared/parallel.h"

namespace ternarize {

Layout layout_of(int64_t rows, int64_t cols, int64_t group_size) {
  const int64_t group = group_size > 0 && group_size < cols ? group_size : cols;
  const int64_t groups = group ? (cols + group - 1) / group : 0;
  const int64_t whole = group ? cols / group : 0, rest = cols - whole * group;
  return {rows, cols, group, groups, whole * ((group + 4) / 5) + (rest + 4) / 5};
}

int64_t pack(const Layout& x, const int8_t* trits, uint8_t* packed, int threads) {
  return first_of(x.rows, x.cols, threads, [&](int64_t first, int64_t last) {
    return kernels().packing.pack(x, first, last, trits, packed);
  });
}

int64_t unpack(const Layout& x, const uint8_t* packed, int8_t* trits, int threads) {
  return first_of(x.rows, x.cols, threads, [&](int64_t first, int64_t last) {
    return kernels().packing.unpack(x, first, last, packed, trits);
  });
}

int64_t check(const Layout& x, const uint8_t* packed, uint8_t* nonzero, int threads) {
  return first_of(x.rows, x.cols, threads, [&](int64_t first, int64_t last) {
    return kernels().packing.check(x, first, last, packed, nonzero);
  });
}

void dequantize(const Layout& x, const uint8_t* packed, const float* scales, int64_t scale_rows,
                Kind kind, void* out, int threads) {
  if (x.rows == 0) return;
  const auto rows = kernels().packing.dequantize[static_cast<int>(kind)];
  parallel_for(x.rows, x.cols, threads, [&](int, int64_t first, int64_t last) {
    rows(x, first, last, packed, scales, x.rows / scale_rows, out);
  });
}

}  // namespace ternarize
