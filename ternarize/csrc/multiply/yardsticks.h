// Yardsticks for benchmarks. Internal linkage, see shared/formats.h.
#pragma once

#include "multiply/registers.h"

namespace ternarize {
namespace {

uint64_t read(const uint8_t* bytes, int64_t n) {
  constexpr int kWords = 64;
  uint64_t all[kWords] = {};
  for (int64_t at = 0; at + kWords * 8 <= n; at += kWords * 8) {
    uint64_t words[kWords];
    std::memcpy(words, bytes + at, sizeof words);
    for (int i = 0; i < kWords; ++i) all[i] ^= words[i];
  }
  uint64_t one = 0;
  for (int i = 0; i < kWords; ++i) one ^= all[i];
  return one;
}

// The compiler must not know what is multiplied, or that it is the same again: V::hide is nothing that
// it knows.
template <class V, int... i>
TERNARIZE_INLINE void hide_all(typename V::Vector* values, Indices<i...>) {
  (V::hide(values[i]), ...);
}

template <class V>
int64_t dot_peak([[maybe_unused]] int64_t rounds) {
  if constexpr (V::kPeak == 0) {
    return 0;
  } else {
    using All = Count<V::kPeak>;
    typename V::Vector sums[V::kPeak], u[V::kPeak], x{};
    clear(sums, All{});
    clear(u, All{});
    for (int64_t i = 0; i < rounds; ++i) {
      hide_all<V>(u, All{});
      V::hide(x);
      dot_all<V>(sums, u, x, All{});
    }
    hide_all<V>(sums, All{});
    return rounds * V::kPeak * static_cast<int64_t>(sizeof x);
  }
}

}  // namespace
}  // namespace ternarize
