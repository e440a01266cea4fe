// Products for the baseline of the machine that the compiler was told to build for.
#include <cstdint>
#include <cstring>

namespace ternarize {
namespace {

constexpr bool kLanes3 = false;
constexpr int64_t kDirect = 4, kTile = 0;
struct Session {};

// A lane's four bytes as one integer: digit j of field f lies at bit 8 j + 2 f.
template <int fields, int n>
void dots(const uint8_t* lanes, int64_t quads, const int8_t* q, int64_t stride, int32_t* sums,
          int64_t sums_stride) {
  static_assert(fields == 4, "Lanes2");
  std::memset(sums, 0, sizeof(int32_t) * static_cast<size_t>((n - 1) * sums_stride + 64));
  for (int64_t quad = 0; quad < quads; ++quad, lanes += 64, q += 4) {
    uint32_t words[16];
    std::memcpy(words, lanes, 64);
    for (int r = 0; r < n; ++r) {
      const int8_t* x = q + r * stride;
      const int32_t x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
      for (int f = 0; f < 4; ++f) {
        int32_t* sum = sums + r * sums_stride + 16 * f;
        for (int i = 0; i < 16; ++i) {
          const uint32_t w = words[i] >> (2 * f);
          sum[i] += static_cast<int32_t>(w & 3) * x0 + static_cast<int32_t>(w >> 8 & 3) * x1 +
                    static_cast<int32_t>(w >> 16 & 3) * x2 + static_cast<int32_t>(w >> 24 & 3) * x3;
        }
      }
    }
  }
}

}  // namespace
}  // namespace ternarize

#define TERNARIZE_PRODUCTS kPortableProducts
#include "products.inc"
