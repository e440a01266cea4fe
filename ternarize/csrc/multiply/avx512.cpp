// Products for x86-64 with AVX-512: many tokens by its registers.
#include "multiply/avx512.h"

namespace ternarize {
namespace {
namespace lanes {

constexpr int64_t kTile = 5, kSlice = 64;  // a panel fills less than half of the first cache

struct Session {
  ~Session() { _mm_sfence(); }  // after `stream`
};

template <int fields>
void open(const uint8_t* lanes, int64_t quads, uint8_t* panel) {
  open_for<fields, false>(lanes, quads, panel);
}

template <int fields, int n>
void tile_of(const uint8_t* panel, int64_t quads, const int8_t* q, int64_t stride, bool more,
             int32_t* sums, int64_t sums_stride) {
  __m512i s[n * fields];
  if (more)
    load_rows<Vectors, fields>(s, sums, sums_stride, Count<n>{});
  else
    clear(s, Count<n * fields>{});
  // the next rows
  for (int r = 0; r < n; ++r)
    for (int64_t i = 0; i < quads * 4; i += 64)
      Vectors::prefetch(q + (n + r) * stride + i);
  for (int64_t i = 0; i < quads; ++i, panel += fields * 64, q += 4) {
    __m512i digits[fields];
    load_all<Vectors>(digits, panel, 64, Count<fields>{});
    dot_rows<Vectors, fields>(s, digits, q, stride, Count<n>{});
  }
  store_rows<Vectors, fields>(s, sums, sums_stride, Count<n>{});
}

template <int fields>
void tile(int64_t n, const uint8_t* panel, int64_t quads, const int8_t* q, int64_t stride,
          bool more, int32_t* sums, int64_t sums_stride) {
  switch (n) {
    case 1: return tile_of<fields, 1>(panel, quads, q, stride, more, sums, sums_stride);
    case 2: return tile_of<fields, 2>(panel, quads, q, stride, more, sums, sums_stride);
    case 3: return tile_of<fields, 3>(panel, quads, q, stride, more, sums, sums_stride);
    case 4: return tile_of<fields, 4>(panel, quads, q, stride, more, sums, sums_stride);
    default: return tile_of<fields, 5>(panel, quads, q, stride, more, sums, sums_stride);
  }
}

}  // namespace lanes

namespace int8 {

constexpr int64_t kTileRows = 8;
constexpr int32_t kPanelOffset = 128;
struct Session {};

// Four weights of a row for all tokens of a panel, which is the side without a sign.
struct Four {
  TERNARIZE_INLINE __m512i operator()(const int8_t* w) const { return Vectors::four(w); }
};
struct Panels {
  static TERNARIZE_INLINE void dot(__m512i& sum, __m512i w, __m512i u) { Vectors::dot(sum, u, w); }
};

template <int n>
void tile(const int8_t* weights, int64_t weights_stride, int64_t cols, const uint8_t* panel,
          int64_t panel_stride, int32_t* sums) {
  __m512i s[n * kTileRows];
  clear(s, Count<n * kTileRows>{});
  for (int64_t c = 0; c < cols; c += 4, panel += 64) {
    __m512i u[n];
    load_all<Vectors>(u, panel, panel_stride, Count<n>{});
    dot_weights<Panels, n>(s, weights + c, weights_stride, Four{}, u, Count<kTileRows>{});
  }
  store_all<Vectors>(s, sums, 16, Count<n * kTileRows>{});
}

}  // namespace int8
}  // namespace
}  // namespace ternarize

#define TERNARIZE_PRODUCTS kAvx512Products
#include "multiply/table.h"
