// Products for the baseline of the machine that the compiler was told to build for.
#include "multiply/int8_plain.h"

namespace ternarize {
namespace {
namespace lanes {

constexpr bool kLanes3 = false;
constexpr int64_t kDirect = 4, kFew = 4, kTile = 0, kSlice = 0;
struct Session {};
struct Vectors {
  static constexpr int kPeak = 0;
};

// Numbers of 16 bits, two columns of a lane side by side, because that is what the vectors of every
// machine multiply. A field's digits of columns 0 and 2 of a lane lie in the low bits of its halves.
template <int fields, int n>
void dots(const uint8_t* lanes, int64_t quads, const int8_t* q, int64_t stride, int32_t* sums,
          int64_t sums_stride) {
  static_assert(fields == 4, "Lanes2");
  for (int r = 0; r < n; ++r)
    std::memset(sums + r * sums_stride, 0, 64 * sizeof(int32_t));
  // A product is at most 2 * 128 and a run adds up to 2 of them for each quad: below 2^15.
  constexpr int64_t kRun = 63;
  for (int64_t done = 0; done < quads; done += kRun) {
    const int64_t end = quads - done < kRun ? quads : done + kRun;
    for (int r = 0; r < n; ++r) {
      int16_t run[4][32] = {};
      for (int64_t quad = done; quad < end; ++quad) {
        const int8_t* x = q + r * stride + quad * 4;
        uint16_t halves[32];
        std::memcpy(halves, lanes + quad * 64, 64);
        int16_t even[32], odd[32];
        for (int i = 0; i < 32; ++i) even[i] = x[i % 2 * 2];
        for (int i = 0; i < 32; ++i) odd[i] = x[i % 2 * 2 + 1];
        for (int f = 0; f < 4; ++f)
          for (int i = 0; i < 32; ++i) {
            const int16_t first = halves[i] >> (2 * f) & 3, second = halves[i] >> (2 * f + 8) & 3;
            run[f][i] = static_cast<int16_t>(run[f][i] + first * even[i] + second * odd[i]);
          }
      }
      for (int f = 0; f < 4; ++f)
        for (int i = 0; i < 16; ++i)
          sums[r * sums_stride + 16 * f + i] += run[f][2 * i] + run[f][2 * i + 1];
    }
  }
}

}  // namespace lanes
}  // namespace
}  // namespace ternarize

#define TERNARIZE_PRODUCTS kPortableProducts
#include "multiply/table.h"
