// Fuzzes what decodes chunks of streams (csrc/entropy/rans.h): rows of any bytes, classes and frequencies
// are coded, then perhaps damaged, and decoded by one variant and as the definition says
// (formats/rans.md, 5), symbol by symbol.
#include "input.h"

#include "entropy/rans.h"

using namespace fuzz;

namespace {

using Bytes = std::vector<uint8_t>;

// Frequencies of a class that add up to what they must, at least 1 where a byte occurs.
void draw_frequencies(Input& in, const int64_t* counts, uint16_t* frequencies) {
  int64_t left = kRansTotal, last = 0;
  for (int byte = 0; byte < 256; ++byte) {
    frequencies[byte] = counts[byte] > 0;
    left -= frequencies[byte];
    if (counts[byte] > 0) last = byte;
  }
  for (int64_t k = in.below(12); k > 0; --k) {
    const int64_t more = std::min(left, in.below(kRansTotal));
    frequencies[in.byte()] += static_cast<uint16_t>(more);
    left -= more;
  }
  frequencies[last] += static_cast<uint16_t>(left);
}

// Decodes a chunk of `count` rows; false where it breaks a rule.
bool decode_plainly(const Classed& x, int64_t count, const uint16_t* frequencies, const Bytes& chunk,
                    uint8_t* rows) {
  if (chunk.size() < static_cast<size_t>(kRansHead)) return false;
  size_t at = 0;
  const auto number = [&](int bytes) {
    uint64_t value = 0;
    for (int i = 0; i < bytes; ++i) value |= static_cast<uint64_t>(chunk[at++]) << 8 * i;
    return value;
  };
  uint64_t states[8];
  for (uint64_t& state : states)
    if ((state = number(4)) < 65536) return false;
  int64_t symbol = 0;
  for (int which = 0; which < x.count; ++which)
    for (int64_t row = 0; row < count; ++row)
      for (int64_t col = 0; col < x.width; ++col) {
        if (x.classes[col] != which) continue;
        uint64_t& state = states[symbol++ % 8];
        const uint64_t slot = state % 4096;
        const uint16_t* of = frequencies + 256 * which;
        uint64_t first = 0;
        int byte = 0;
        while (first + of[byte] <= slot) first += of[byte++];
        rows[row * x.width + col] = static_cast<uint8_t>(byte);
        state = of[byte] * (state / 4096) + slot - first;
        if (state >= 65536) continue;
        if (chunk.size() - at < 2) return false;
        state = 65536 * state + number(2);
      }
  bool good = at == chunk.size();
  for (const uint64_t state : states) good = good && state == 65536;
  return good;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  use_one(in);
  const int threads = threads_of(in);
  const int64_t width = 1 + in.below(in.below(4) ? 30 : 300);
  const int64_t rows = 1 + in.below(std::min<int64_t>(200, 4000 / width));
  const int64_t chunk_rows = 1 + in.below(in.below(4) ? 12 : 60);
  const int count = static_cast<int>(1 + in.below(3));
  Exact<uint8_t> classes(width);
  // those of trits in groups, of numbers of several bytes, or any
  const int64_t manner = in.below(3), period = 1 + in.below(40);
  for (int64_t i = 0; i < width; ++i) {
    const int64_t which = manner == 0   ? std::max<int64_t>(0, count - 1 - i % period)
                          : manner == 1 ? i % count
                                        : in.below(count);
    classes[i] = static_cast<uint8_t>(which);
  }
  const Classed x{rows, width, chunk_rows, classes.at, count};
  Exact<uint8_t> bytes(rows * width);
  const int64_t kinds = 1 + in.below(256), often = in.below(256);
  for (int64_t i = 0; i < bytes.size; ++i)
    bytes[i] = in.byte() < often ? 121 : static_cast<uint8_t>(in.below(kinds));

  Exact<int64_t> counts(256 * count);
  rans_count(bytes.at, x, counts.at, threads);
  Exact<uint16_t> frequencies(256 * count);
  Exact<uint32_t> table(kRansTotal * count);
  for (int which = 0; which < count; ++which) {
    draw_frequencies(in, counts.at + 256 * which, frequencies.at + 256 * which);
    rans_slots(frequencies.at + 256 * which, table.at + kRansTotal * which);
  }
  const int64_t slot = kRansHead + 2 * std::min(chunk_rows, rows) * width;
  Exact<uint8_t> slots(slot * x.chunks());
  Exact<int32_t> sizes(x.chunks());
  rans_encode(bytes.at, x, frequencies.at, slots.at, slot, sizes.at, threads);
  std::vector<Bytes> chunks;
  for (int64_t i = 0; i < x.chunks(); ++i) {
    FUZZ_CHECK(sizes[i] <= slot, "chunk %lld of %d bytes", ll(i), sizes[i]);
    chunks.emplace_back(slots.at + slot * i, slots.at + slot * i + sizes[i]);
  }

  const int64_t faults = in.below(2) * in.below(5);
  for (int64_t k = 0; k < faults; ++k) {
    Bytes& chunk = chunks[static_cast<size_t>(in.below(x.chunks()))];
    const auto held = static_cast<int64_t>(chunk.size());
    const int64_t what = in.below(4);
    if (what == 0) chunk.resize(static_cast<size_t>(held - std::min(held, in.below(40))));
    if (what == 1) chunk.push_back(in.byte());
    if (what > 1 && held) chunk[static_cast<size_t>(in.below(held))] ^= in.byte();
  }
  Bytes all;
  Exact<int64_t> ends(x.chunks() + 1);
  ends[0] = 0;
  for (int64_t i = 0; i < x.chunks(); ++i) {
    const Bytes& chunk = chunks[static_cast<size_t>(i)];
    all.insert(all.end(), chunk.begin(), chunk.end());
    ends[i + 1] = static_cast<int64_t>(all.size());
  }
  Exact<uint8_t> coded(static_cast<int64_t>(all.size())), found(bytes.size), expected(bytes.size);
  if (!all.empty()) std::memcpy(coded.at, all.data(), all.size());
  int64_t bad = kNone;
  for (int64_t i = 0; i < x.chunks() && bad == kNone; ++i)
    if (!decode_plainly(x, x.rows_of(i), frequencies.at, chunks[static_cast<size_t>(i)],
                        expected.at + i * chunk_rows * width))
      bad = i;
  FUZZ_CHECK(faults || bad == kNone, "chunk %lld of what is whole", ll(bad));
  const int64_t told = rans_decode(coded.at, ends.at, x, table.at, found.at, threads);
  FUZZ_CHECK(told == bad, "chunk %lld, not %lld", ll(told), ll(bad));
  if (bad != kNone) return 0;
  const auto n = static_cast<size_t>(bytes.size);
  FUZZ_CHECK(std::memcmp(found.at, expected.at, n) == 0, "bytes");
  FUZZ_CHECK(faults || std::memcmp(found.at, bytes.at, n) == 0, "bytes of what was coded");
  return 0;
}
