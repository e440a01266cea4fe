// Fuzzes what reads and writes packed bytes: unpack, check, dequantize, pack, to_lanes, from_lanes. Any
// bytes are an input; the result is compared with formats/base3.md done one trit at
// a time.
#include "input.h"

using namespace fuzz;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  const Shape shape = shape_of(in, 200, 700);
  use_one(in);
  const int threads = threads_of(in);
  const Kind kind = kind_of(in);
  const Layout x = layout_of(shape.rows, shape.cols, shape.group_size);
  const int64_t group = group_of(shape), rows = shape.rows, cols = shape.cols;

  // Where each byte of a row has its trits: the definition.
  struct Place {
    int64_t first, n, group;
  };
  std::vector<Place> places;
  for (int64_t at = 0, g = 0; at < cols; at += group, ++g)
    for (int64_t c = at; c < std::min(at + group, cols); c += 5)
      places.push_back({c, std::min<int64_t>(5, std::min(at + group, cols) - c), g});
  const auto width = static_cast<int64_t>(places.size());
  const int64_t groups = cols ? (cols + group - 1) / group : 0;
  FUZZ_CHECK(x.width == width && x.groups == groups, "%lld x %lld, group %lld", ll(rows), ll(cols),
             ll(shape.group_size));

  // Bytes: valid but for what an invalid manner allows.
  const int64_t manner = in.below(4);
  Exact<uint8_t> packed(rows * width);
  for (int64_t i = 0; i < packed.size; ++i) {
    packed[i] = in.byte();
    if (manner == 0) continue;
    int code = packed[i] % 243, power = 1, padded = 0;
    for (int k = 0; k < 5; ++k, code /= 3, power *= 3)
      padded += (k < places[static_cast<size_t>(i % width)].n ? code % 3 : 1) * power;
    packed[i] = static_cast<uint8_t>(padded);
  }
  if (manner == 1 && packed.size)  // one fault
    packed[in.below(packed.size)] = in.byte();

  int64_t bad = kNone;
  Exact<int8_t> trits(rows * cols);
  Exact<uint8_t> used(rows * groups);
  std::memset(used.at, 0, static_cast<size_t>(used.size));
  for (int64_t i = 0; i < packed.size; ++i) {
    const Place place = places[static_cast<size_t>(i % width)];
    int code = packed[i];
    bool good = code <= 242;
    for (int64_t k = 0; k < 5; ++k, code /= 3) {
      const auto trit = static_cast<int8_t>(code % 3 - 1);
      if (k < place.n) {
        trits[i / width * cols + place.first + k] = trit;
        if (trit) used[i / width * groups + place.group] = 1;
      } else {
        good = good && trit == 0;
      }
    }
    if (!good && bad == kNone) bad = i;
  }

  Exact<float> scales(rows * groups);
  for (int64_t i = 0; i < scales.size; ++i) {
    const uint32_t bits = in.bits<uint32_t>() & 0x7fffffff;
    std::memcpy(&scales[i], &bits, 4);
    if (!std::isfinite(scales[i])) scales[i] = 1.0f;
  }

  {
    Exact<int8_t> out(rows * cols);
    FUZZ_CHECK(unpack(x, packed.at, out.at, threads) == bad, "unpack, not %lld", ll(bad));
    Exact<uint8_t> flags(rows * groups);
    if (flags.size) std::memset(flags.at, 0, static_cast<size_t>(flags.size));
    FUZZ_CHECK(check(x, packed.at, flags.at, threads) == bad, "check, not %lld", ll(bad));
    Exact<uint8_t> dense(rows * cols * size_of(kind));
    dequantize(x, packed.at, scales.at, std::max<int64_t>(1, rows), kind, dense.at, threads);
    {
      const Form form = in.pick({Form::Lanes2, Form::Lanes3});
      const Lanes lanes = lanes_of(form, x);
      Exact<uint8_t> run(lanes.size()), again(rows * width);
      FUZZ_CHECK(to_lanes(lanes, packed.at, run.at, threads) == bad, "not %lld", ll(bad));
      if (bad != kNone) {  // any bytes at all: some answer, and no access beside them
        for (int64_t i = 0; i < run.size; ++i) run[i] = in.byte();
        from_lanes(lanes, run.at, again.at, threads);
        return 0;
      }
      // The definition of the layout in lanes.h, one trit at a time.
      const int powers[2][5] = {{1, 4, 16, 64, 0}, {1, 3, 9, 28, 84}};
      const int64_t fields = form == Form::Lanes2 ? 4 : 5;
      const int64_t quads_of_group = group ? (std::min(group, cols) + 3) / 4 : 0;
      int64_t quads = 0;
      for (int64_t at = 0; at < cols; at += group) quads += (std::min(group, cols - at) + 3) / 4;
      const int64_t blocks = (rows + 16 * fields - 1) / (16 * fields);
      FUZZ_CHECK(lanes.size() == blocks * quads * 64, "size %lld", ll(lanes.size()));
      const int* const power = powers[form == Form::Lanes3];
      const uint8_t* byte = run.at;
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t quad = 0; quad < quads; ++quad)
          for (int64_t i = 0; i < 64; ++i, ++byte) {
            const int64_t g = quad / quads_of_group, lane = i / 4;
            const int64_t col = g * group + quad % quads_of_group * 4 + i % 4;
            const bool inside = col < std::min(cols, (g + 1) * group);
            int expected = 0;
            for (int64_t f = 0; f < fields; ++f) {
              const int64_t row = 16 * (fields * block + f) + lane;
              const int trit = inside && row < rows ? trits[row * cols + col] : 0;
              expected += (trit + 1) * power[f];
            }
            FUZZ_CHECK(*byte == expected, "lanes at %lld: %d, not %d", ll(byte - run.at), *byte,
                       expected);
          }
      FUZZ_CHECK(from_lanes(lanes, run.at, again.at, threads) == kNone, "a digit is none");
      FUZZ_CHECK(std::memcmp(again.at, packed.at, static_cast<size_t>(packed.size)) == 0, "again");
    }
    FUZZ_CHECK(std::memcmp(out.at, trits.at, static_cast<size_t>(trits.size)) == 0, "trits");
    FUZZ_CHECK(std::memcmp(flags.at, used.at, static_cast<size_t>(used.size)) == 0, "used");
    for (int64_t i = 0; i < trits.size; ++i) {
      const float scale = scales[i / cols * groups + i % cols / group];
      const double expected =
          trits[i] == 0 ? 0.0 : rounded_to(kind, static_cast<double>(scale) * trits[i]);
      const double found = value_of(kind, dense.at, i);
      FUZZ_CHECK(found == expected, "dense at %lld: %g, not %g", ll(i), found, expected);
    }
    Exact<uint8_t> again(rows * width);
    FUZZ_CHECK(pack(x, trits.at, again.at, threads) == kNone, "a trit is none");
    FUZZ_CHECK(std::memcmp(again.at, packed.at, static_cast<size_t>(packed.size)) == 0, "again");
    // Of values that are no trits, the first is found.
    if (trits.size) {
      Exact<int8_t> wrong(trits.size);
      std::memcpy(wrong.at, trits.at, static_cast<size_t>(trits.size));
      const int64_t where = in.below(trits.size);
      wrong[where] = static_cast<int8_t>(in.byte());
      const bool good = wrong[where] >= -1 && wrong[where] <= 1;
      const int64_t found = pack(x, wrong.at, again.at, threads);
      FUZZ_CHECK(found == (good ? kNone : where), "pack found %lld", ll(found));
    }
  }
  return 0;
}
