#include "steps/steps.h"

#include <algorithm>
#include <vector>

#include "shared/parallel.h"

namespace ternarize {

namespace {

constexpr int64_t kChunk = 1 << 16;    // values that one thread works on at a time
constexpr int64_t kTouched = 1 << 16;  // non-zeros of a step that are added up before they act
constexpr int kQuads = 16;             // counters whose words are worked out beside each other, at most

// Philox 4x32-10 of some counters in a row: words[4 i + j] is word j of counter i.
template <int kCount>
void philox(uint64_t quad, uint32_t perturbation, uint32_t number, uint32_t purpose, uint64_t seed,
            uint32_t* words) {
  uint32_t c0[kCount], c1[kCount], c2[kCount], c3[kCount];
  for (int i = 0; i < kCount; ++i) {
    const uint64_t q = quad + static_cast<uint64_t>(i);
    c0[i] = static_cast<uint32_t>(q);
    c1[i] = perturbation;
    c2[i] = number;
    c3[i] = (purpose << 24) + static_cast<uint32_t>(q >> 32);
  }
  auto k0 = static_cast<uint32_t>(seed);
  auto k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kCount; ++i) {
      const uint64_t a = static_cast<uint64_t>(0xD2511F53u) * c0[i];
      const uint64_t b = static_cast<uint64_t>(0xCD9E8D57u) * c2[i];
      c0[i] = static_cast<uint32_t>(b >> 32) ^ c1[i] ^ k0;
      c2[i] = static_cast<uint32_t>(a >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(b);
      c3[i] = static_cast<uint32_t>(a);
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kCount; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

// Calls found(index, sign) for the non-zeros of a perturbation in the cells [cell, end) that lie in
// the range of n values from `first` on.
template <class Found>
void each_nonzero(uint64_t cell, uint64_t end, uint64_t first, uint64_t n, uint32_t perturbation,
                  uint32_t number, uint32_t purpose, uint64_t seed, int bits, Found found) {
  uint32_t words[4 * kQuads];
  const uint32_t mask = (uint32_t{1} << bits) - 1;
  for (uint64_t quad = cell >> 2; 4 * quad < end;) {
    const uint64_t left = (end + 3) / 4 - quad;
    const uint64_t count = left >= kQuads ? kQuads : left >= 4 ? 4 : 1;
    const auto draw = count == kQuads ? philox<kQuads> : count == 4 ? philox<4> : philox<1>;
    draw(quad, perturbation, number, purpose, seed, words);
    const uint64_t stop = std::min(end, 4 * (quad + count));
    for (uint64_t c = std::max(cell, 4 * quad); c < stop; ++c) {
      const uint32_t word = words[c - 4 * quad];
      const uint64_t index = (c << bits) + (word & mask) - first;  // below `first` it is huge
      if (index < n) found(static_cast<int64_t>(index), 1 - 2 * static_cast<int>(word >> 31));
    }
    quad += count;
  }
}

// What all steps do to one chunk of values. Sums are all zero before and after.
void apply_to_chunk(int8_t* values, uint64_t n, uint64_t first, int limit, uint32_t purpose,
                    const Steps& steps, std::vector<int32_t>& sums, std::vector<int32_t>& touched) {
  for (int64_t i = 0; i < steps.count; ++i) {
    const auto seed = static_cast<uint64_t>(steps.seeds[i]) + (uint64_t{1} << 63);
    const auto number = static_cast<uint32_t>(steps.fields[3 * i]);
    const auto bits = static_cast<int>(steps.fields[3 * i + 1]);
    const auto amount = static_cast<int>(steps.fields[3 * i + 2]);
    const int64_t taken = steps.bounds[i], until = steps.bounds[i + 1];
    if (taken == until) continue;
    const uint64_t end = ((first + n - 1) >> bits) + 1;
    const auto several = static_cast<uint64_t>(std::max<int64_t>(4, kTouched / (until - taken)));
    for (uint64_t cell = first >> bits; cell < end;) {
      const uint64_t last = std::min(end, (cell + several) & ~uint64_t{3});
      touched.clear();
      for (int64_t p = taken; p < until; ++p) {
        const int way = steps.signs[p];
        each_nonzero(cell, last, first, n, static_cast<uint32_t>(steps.chosen[p]), number, purpose,
                     seed, bits, [&](int64_t index, int sign) {
                       sums[static_cast<size_t>(index)] += way * sign;
                       touched.push_back(static_cast<int32_t>(index));
                     });
      }
      for (const int32_t index : touched) {
        int32_t& sum = sums[static_cast<size_t>(index)];
        if (sum == 0) continue;
        const int moved = values[index] + (sum > 0 ? amount : -amount);
        values[index] = static_cast<int8_t>(std::clamp(moved, -limit, limit));
        sum = 0;
      }
      cell = last;
    }
  }
}

}  // namespace

void apply_steps(int8_t* values, int64_t n, uint64_t first, int limit, uint32_t purpose,
                 const Steps& steps, int threads) {
  if (n <= 0 || steps.count <= 0) return;
  parallel_for(ceil_div(n, kChunk), kChunk, threads, [&](int, int64_t from, int64_t to) {
    std::vector<int32_t> sums(kChunk, 0), touched;
    touched.reserve(kTouched);
    for (int64_t chunk = from; chunk < to; ++chunk) {
      const int64_t at = chunk * kChunk;
      apply_to_chunk(values + at, static_cast<uint64_t>(std::min(kChunk, n - at)),
                     first + static_cast<uint64_t>(at), limit, purpose, steps, sums, touched);
    }
  });
}

void align(const float* up, const float* down, int64_t n, uint64_t first, uint64_t seed,
           uint32_t number, int bits, uint32_t purpose, int64_t k, double* out, int threads) {
  if (n <= 0) {
    std::fill(out, out + 2 * k, 0.0);
    return;
  }
  parallel_for(k, (n >> bits) + 1, threads, [&](int, int64_t from, int64_t to) {
    const uint64_t last = first + static_cast<uint64_t>(n) - 1;
    for (int64_t i = from; i < to; ++i) {
      double along = 0, against = 0;
      each_nonzero(first >> bits, (last >> bits) + 1, first, static_cast<uint64_t>(n),
                   static_cast<uint32_t>(i), number, purpose, seed, bits,
                   [&](int64_t index, int sign) {
                     const double more = up[index], less = -double{down[index]};
                     along += sign > 0 ? more : less;
                     against += sign > 0 ? less : more;
                   });
      out[2 * i] = along;
      out[2 * i + 1] = against;
    }
  });
}

}  // namespace ternarize
