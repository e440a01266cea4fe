// Fuzzes what reads stored tensors (csrc/files/files.h) from a file of any bytes: trits, scales and streams,
// valid or with a fault. What comes of them is compared with the formats done plainly: digests, codes,
// scales, lanes and their scales.
#include "input.h"

#include <array>
#include <cstdio>
#include <string>

#include <unistd.h>

#include "entropy/rans.h"
#include "files/files.h"

using namespace fuzz;

namespace {

using Bytes = std::vector<uint8_t>;

// In one piece, where the reader hashes several.
std::array<uint8_t, 32> sha256_of(const Bytes& data) {
  Sha256 sha(sha256_blocks());
  sha.update(data.data(), static_cast<int64_t>(data.size()));
  std::array<uint8_t, 32> digest;
  sha.finish(digest.data());
  return digest;
}

// A stream of rows, with frequencies that are no more than allowed.
Bytes coded(const Bytes& rows, int64_t width, const Bytes& classes, int64_t chunk_rows) {
  const auto count = static_cast<int64_t>(rows.size()) / width;
  const int kinds = *std::max_element(classes.begin(), classes.end()) + 1;
  const Classed x{count, width, chunk_rows, classes.data(), kinds};
  std::vector<int64_t> counts(static_cast<size_t>(256 * kinds));
  rans_count(rows.data(), x, counts.data(), 1);
  std::vector<uint16_t> often(counts.size());
  Bytes out(4);
  for (size_t i = 0; i < 4; ++i) out[i] = static_cast<uint8_t>(chunk_rows >> 8 * i);
  for (int kind = 0; kind < kinds; ++kind) {
    const int64_t* of = counts.data() + 256 * kind;
    int64_t whole = 0, given = 0;
    int most = 0;
    for (int i = 0; i < 256; ++i) whole += of[i];
    for (int i = 0; i < 256; ++i) {
      const int64_t f = of[i] ? std::max<int64_t>(1, of[i] * 2048 / whole) : 0;
      often[static_cast<size_t>(256 * kind + i)] = static_cast<uint16_t>(f);
      given += f;
      if (of[i] > of[most]) most = i;
    }
    often[static_cast<size_t>(256 * kind + most)] += static_cast<uint16_t>(kRansTotal - given);
    for (int i = 0; i < 32; ++i) {
      int bits = 0;
      for (int k = 0; k < 8; ++k) bits |= (of[8 * i + k] > 0) << k;
      out.push_back(static_cast<uint8_t>(bits));
    }
    for (int i = 0; i < 256; ++i) {
      const uint16_t f = often[static_cast<size_t>(256 * kind + i)];
      if (!f) continue;
      out.push_back(static_cast<uint8_t>(f));
      out.push_back(static_cast<uint8_t>(f >> 8));
    }
  }
  const int64_t slot = kRansHead + 2 * std::min(chunk_rows, count) * width;
  Bytes chunks(static_cast<size_t>(slot * x.chunks()));
  std::vector<int32_t> sizes(static_cast<size_t>(x.chunks()));
  rans_encode(rows.data(), x, often.data(), chunks.data(), slot, sizes.data(), 1);
  for (const int32_t size : sizes)
    for (int i = 0; i < 4; ++i) out.push_back(static_cast<uint8_t>(size >> 8 * i));
  for (size_t i = 0; i < sizes.size(); ++i) {
    const uint8_t* at = chunks.data() + slot * static_cast<int64_t>(i);
    out.insert(out.end(), at, at + sizes[i]);
  }
  return out;
}

struct File {
  explicit File(const Bytes& bytes) : stream(std::tmpfile()) {
    if (!stream || std::fwrite(bytes.data(), 1, bytes.size(), stream) != bytes.size() ||
        std::fflush(stream) != 0)
      std::abort();
  }
  ~File() { std::fclose(stream); }
  File(const File&) = delete;
  std::FILE* stream;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Input in(data, size);
  if (!can_read_stored()) return 0;
  Shape shape = shape_of(in, 200, 700);
  shape.rows = std::max<int64_t>(1, shape.rows), shape.cols = std::max<int64_t>(1, shape.cols);
  use_one(in);
  const int threads = threads_of(in);
  const Layout x = layout_of(shape.rows, shape.cols, shape.group_size);
  const bool one_scale = shape.group_size == 0;
  const ScaleKind kind = in.pick({ScaleKind::F16, ScaleKind::BF16, ScaleKind::F32, ScaleKind::E});
  const int64_t scale_size = kind == ScaleKind::F32 ? 4 : kind == ScaleKind::E ? 1 : 2;
  const int64_t scale_count = one_scale ? 1 : x.rows * x.groups;

  // Trits that are valid, and scales that fit them.
  Bytes packed(static_cast<size_t>(x.rows * x.width)), scales;
  Exact<int8_t> trits(x.rows * x.cols);
  const int64_t zeros = 1 + in.below(250);
  for (int64_t i = 0; i < trits.size; ++i) {
    const uint8_t byte = in.byte();
    trits[i] = static_cast<int8_t>(byte < zeros ? 0 : byte % 2 ? 1 : -1);
  }
  pack(x, trits.at, packed.data(), 1);
  Bytes used(static_cast<size_t>(x.rows * x.groups));
  check(x, packed.data(), used.data(), 1);
  bool any = false;
  for (const uint8_t one : used) any = any || one;
  for (int64_t i = 0; i < scale_count; ++i) {
    uint32_t bits = 0;
    if (one_scale ? any : used[static_cast<size_t>(i)])
      bits = kind == ScaleKind::F32 ? 1 + in.bits<uint32_t>() % 0x7f7fffff
             : kind == ScaleKind::E ? 8 + in.byte() % 240u
             : kind == ScaleKind::BF16 ? 1 + in.bits<uint16_t>() % 0x7f7fu
                                       : 1 + in.bits<uint16_t>() % 0x7bffu;
    for (int64_t k = 0; k < scale_size; ++k) scales.push_back(static_cast<uint8_t>(bits >> 8 * k));
  }

  // In the file, either as a stream or not; then perhaps a fault.
  const bool is_coded = in.below(2), scales_are = in.below(2);
  Bytes classes, of_scales;
  for (int64_t at = 0; at < x.cols; at += x.group)
    for (int64_t n = std::min(x.group, x.cols - at); n > 0; n -= 5)
      classes.push_back(static_cast<uint8_t>(std::min<int64_t>(n, 5)));
  {
    bool there[6] = {};
    for (const uint8_t held : classes) there[held] = true;
    for (uint8_t& held : classes) {
      int above = 0;
      for (int other = held + 1; other < 6; ++other) above += there[other];
      held = static_cast<uint8_t>(above);
    }
  }
  for (int64_t i = 0; i < x.groups * scale_size; ++i)
    of_scales.push_back(static_cast<uint8_t>(i % scale_size));
  // rows of a chunk; where there is one chunk, as many as may be
  const auto height = [&](int64_t rows, int64_t width) {
    const int64_t most = 65536 / width, drawn = 1 + in.below(std::min<int64_t>(40, most));
    return drawn < rows ? drawn : most;
  };
  const int64_t chunk = height(x.rows, x.width);
  const int64_t scale_chunk = height(one_scale ? 1 : x.rows, x.groups * scale_size);
  const Bytes first = is_coded ? coded(packed, x.width, classes, chunk) : packed;
  const Bytes second =
      scales_are ? coded(scales, x.groups * scale_size, of_scales, scale_chunk) : scales;
  Bytes content(static_cast<size_t>(in.below(70)), 0x33);
  const auto start = static_cast<int64_t>(content.size());
  content.insert(content.end(), first.begin(), first.end());
  content.insert(content.end(), second.begin(), second.end());
  const int64_t manner = in.below(4);
  for (int64_t k = manner == 1 ? 1 : manner == 2 ? in.below(8) : 0; k > 0; --k)
    content[static_cast<size_t>(start + in.below(static_cast<int64_t>(content.size()) - start))] =
        in.byte();
  if (manner == 3) content.resize(content.size() - std::min<size_t>(content.size(), in.byte()));
  const bool whole = manner == 0;

  const File file(content);
  const auto form = in.pick({Stored::Form::Trits, Stored::Form::Lanes, Stored::Form::Raw});
  Stored stored{};
  stored.form = form;
  stored.file = stored.scale_file = 0;
  stored.start = start;
  stored.nbytes = static_cast<int64_t>(first.size());
  stored.coded = is_coded && form != Stored::Form::Raw;
  stored.lanes.stored = x;
  if (form == Stored::Form::Lanes) stored.lanes = lanes_of(in.pick({Form::Lanes2, Form::Lanes3}), x);
  const Lanes& lanes = stored.lanes;
  stored.scale_start = start + stored.nbytes;
  stored.scale_bytes = static_cast<int64_t>(second.size());
  stored.scale_kind = kind;
  stored.one_scale = one_scale;
  stored.scales_coded = scales_are;
  const bool half = kind == ScaleKind::F16 || kind == ScaleKind::E;
  const bool in_lanes = form == Stored::Form::Lanes, raw = form == Stored::Form::Raw;
  Exact<uint8_t> out(in_lanes ? lanes.size() : raw ? stored.nbytes : x.rows * x.width);
  Exact<uint8_t> laid(in_lanes ? lanes.blocks * lanes.block * x.groups * (half ? 2 : 4)
                               : scale_count * scale_size);
  stored.out = form == Stored::Form::Trits && in.below(2) ? nullptr : out.at;
  stored.scale_out = laid.at;

  const bool checked = in.below(4) != 0;
  const Stored both[2] = {stored, stored};  // the second time over what the first has left
  uint8_t states[2] = {}, stop = 0;
  Exact<uint8_t> digests(64);
  const std::string path = "/dev/fd/" + std::to_string(fileno(file.stream));
  const char* const files[1] = {path.c_str()};
  FUZZ_CHECK(read_stored(files, both, 2, checked, states, digests.at, &stop, threads), "nothing was read");
  FUZZ_CHECK(states[0] != 0 && states[0] == states[1], "states %d, %d", states[0], states[1]);
  const bool done = states[0] == static_cast<uint8_t>(Read::Done);
  if (!done) {
    FUZZ_CHECK(!whole, "state %d of what is whole", states[0]);
    return 0;
  }
  if (raw) {
    FUZZ_CHECK(std::memcmp(out.at, content.data() + start, first.size()) == 0, "bytes");
    if (checked) {
      const auto digest = sha256_of(Bytes(content.begin() + start, content.begin() + start +
                                                                       static_cast<int64_t>(first.size())));
      FUZZ_CHECK(std::memcmp(digests.at, digest.data(), 32) == 0, "digest");
    }
    return 0;
  }
  Bytes both_of = packed;
  both_of.insert(both_of.end(), scales.begin(), scales.end());
  const auto digest = sha256_of(both_of);
  const bool same_digest = std::memcmp(digests.at, digest.data(), 32) == 0;
  FUZZ_CHECK(!whole || !checked || same_digest, "digest");
  if (!whole && !(checked && same_digest)) return 0;
  if (!in_lanes) {
    FUZZ_CHECK(!stored.out || std::memcmp(out.at, packed.data(), packed.size()) == 0, "bytes");
    FUZZ_CHECK(std::memcmp(laid.at, scales.data(), scales.size()) == 0, "scales");
    return 0;
  }
  Exact<uint8_t> run(lanes.size());
  FUZZ_CHECK(to_lanes(lanes, packed.data(), run.at, 1) == kNone, "lanes of what is whole");
  FUZZ_CHECK(std::memcmp(out.at, run.at, static_cast<size_t>(run.size)) == 0, "lanes");
  for (int64_t block = 0; block < lanes.blocks; ++block)
    for (int64_t g = 0; g < x.groups; ++g)
      for (int64_t i = 0; i < lanes.block; ++i) {
        const int64_t row = block * lanes.block + i;
        const int64_t place = (block * x.groups + g) * lanes.block + i;
        uint32_t expected = 0, found = 0;
        if (row < x.rows)
          std::memcpy(&expected, scales.data() + (one_scale ? 0 : row * x.groups + g) * scale_size,
                      static_cast<size_t>(scale_size));
        if (kind == ScaleKind::E) expected <<= 7;
        if (kind == ScaleKind::BF16) expected <<= 16;
        std::memcpy(&found, laid.at + place * (half ? 2 : 4), half ? 2 : 4);
        FUZZ_CHECK(found == expected, "scale of row %lld, group %lld: %x, not %x", ll(row), ll(g),
                   found, expected);
      }
  return 0;
}
