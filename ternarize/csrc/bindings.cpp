// The Python module ternarize._native: checks every shape and dtype, then calls the core without the
// interpreter's lock. ternarize/_native.pyi documents the functions.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <cstdlib>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "cpus/cpus.h"
#include "entropy/rans.h"
#include "files/files.h"
#include "shared/pool.h"
#include "steps/steps.h"
#include "unfold/unfold.h"

namespace nb = nanobind;
using namespace ternarize;

namespace {

template <class... Options>
using Dense = nb::ndarray<nb::device::cpu, nb::c_contig, nb::ndim<2>, Options...>;
template <class T>
using In = Dense<const T>;
template <class T>
using Out = Dense<T>;

[[noreturn]] void fail(const std::string& what) { throw nb::value_error(what.c_str()); }

std::string shape_text(int64_t rows, int64_t cols) {
  return "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]";
}

template <class Array>
void expect(const char* name, const Array& array, int64_t rows, int64_t cols) {
  const auto has_rows = static_cast<int64_t>(array.shape(0));
  const auto has_cols = static_cast<int64_t>(array.shape(1));
  if (has_rows != rows || has_cols != cols)
    fail(std::string(name) + ": shape is " + shape_text(has_rows, has_cols) + "; expected " +
         shape_text(rows, cols) + ".");
}

Kind kind_of(const std::string& name) {
  if (name == "F32") return Kind::F32;
  if (name == "BF16") return Kind::BF16;
  if (name == "F16") return Kind::F16;
  fail("kind is '" + name + "'; expected 'F32', 'BF16' or 'F16'.");
}

// A kind's own dtype, or for the 16-bit ones integers that hold its bits.
template <class Array>
void expect_kind(const char* name, const Array& array, Kind kind) {
  const nb::dlpack::dtype has = array.dtype();
  const auto is = [&](nb::dlpack::dtype_code code) { return has.code == static_cast<uint8_t>(code); };
  const bool fits =
      has.lanes == 1 &&
      (kind == Kind::F32
           ? has.bits == 32 && is(nb::dlpack::dtype_code::Float)
           : has.bits == 16 &&
                 (is(nb::dlpack::dtype_code::UInt) || is(nb::dlpack::dtype_code::Int) ||
                  is(kind == Kind::BF16 ? nb::dlpack::dtype_code::Bfloat
                                        : nb::dlpack::dtype_code::Float)));
  if (!fits) fail(std::string(name) + ": dtype does not hold the kind that was given.");
}

Layout checked_layout(int64_t rows, int64_t cols, int64_t group_size) {
  if (group_size < -1)
    fail("group_size is " + std::to_string(group_size) + "; expected -1, 0 or more.");
  if (cols < 0 || cols > std::numeric_limits<int64_t>::max() / 2)
    fail("cols is " + std::to_string(cols) + "; expected 0 or more.");
  return layout_of(rows, cols, group_size);
}

template <class Array>
Layout layout_of_matrix(const Array& array, int64_t group_size) {
  return checked_layout(static_cast<int64_t>(array.shape(0)), static_cast<int64_t>(array.shape(1)),
                        group_size);
}

template <class T>
using Line = nb::ndarray<T, nb::device::cpu, nb::c_contig, nb::ndim<1>>;

void bind_apply_steps(Line<int8_t> values, uint64_t first, int limit, uint32_t purpose,
                      Line<const int64_t> seeds, In<int64_t> fields, Line<const int64_t> bounds,
                      Line<const int32_t> chosen, Line<const int8_t> signs, int threads) {
  const auto count = static_cast<int64_t>(seeds.shape(0));
  const auto taken = static_cast<int64_t>(chosen.shape(0));
  expect("fields", fields, count, 3);
  if (static_cast<int64_t>(bounds.shape(0)) != count + 1 || bounds.data()[0] != 0 ||
      bounds.data()[count] != taken || static_cast<int64_t>(signs.shape(0)) != taken)
    fail("bounds: expected those of as many steps, chosen and signs.");
  for (int64_t i = 0; i < count; ++i) {
    const int64_t bits = fields.data()[3 * i + 1], amount = fields.data()[3 * i + 2];
    if (bounds.data()[i] > bounds.data()[i + 1] || bits < 0 || bits > 30 || amount < 1 ||
        amount > 127)
      fail("step " + std::to_string(i) + ": its fields or bounds are beyond what a step has.");
  }
  if (limit < 1 || limit > 127) fail("limit is " + std::to_string(limit) + "; expected 1 to 127.");
  const Steps steps{count,          seeds.data(),  fields.data(),
                    bounds.data(), chosen.data(), signs.data()};
  nb::gil_scoped_release unlocked;
  apply_steps(values.data(), static_cast<int64_t>(values.shape(0)), first, limit, purpose, steps,
              threads);
}

void bind_align(Line<const float> up, Line<const float> down, uint64_t first, uint64_t seed,
                uint32_t number, int bits, uint32_t purpose, Out<double> out, int threads) {
  const auto n = static_cast<int64_t>(up.shape(0));
  if (static_cast<int64_t>(down.shape(0)) != n) fail("down: expected as many values as in up.");
  if (bits < 0 || bits > 30) fail("bits is " + std::to_string(bits) + "; expected 0 to 30.");
  const auto k = static_cast<int64_t>(out.shape(0));
  expect("out", out, k, 2);
  nb::gil_scoped_release unlocked;
  align(up.data(), down.data(), n, first, seed, number, bits, purpose, k, out.data(), threads);
}

// What the three functions below have in common, checked.
Classed classed_of(int64_t rows, int64_t width, int64_t chunk_rows, Line<const uint8_t> classes,
                   int64_t count) {
  if (width < 1 || static_cast<int64_t>(classes.shape(0)) != width)
    fail("classes: expected one for each of " + std::to_string(width) + " columns, at least one.");
  if (count < 1 || count > 256)
    fail("there are " + std::to_string(count) + " classes; expected 1 to 256.");
  for (int64_t col = 0; col < width; ++col)
    if (classes.data()[col] >= count)
      fail("classes: column " + std::to_string(col) + " is of one beyond the tables.");
  if (chunk_rows < 1 || chunk_rows > (int64_t{1} << 30) / width + 1)
    fail("chunk_rows is " + std::to_string(chunk_rows) + "; expected at least 1, of 1 GiB at most.");
  return {rows, width, chunk_rows, classes.data(), static_cast<int>(count)};
}

void bind_rans_count(In<uint8_t> bytes, Line<const uint8_t> classes, Out<int64_t> counts,
                     int threads) {
  const auto rows = static_cast<int64_t>(bytes.shape(0));
  const auto width = static_cast<int64_t>(bytes.shape(1));
  const auto count = static_cast<int64_t>(counts.shape(0));
  expect("counts", counts, count, 256);
  const Classed x = classed_of(rows, width, 1, classes, count);
  nb::gil_scoped_release unlocked;
  rans_count(bytes.data(), x, counts.data(), threads);
}

void bind_rans_encode(In<uint8_t> bytes, Line<const uint8_t> classes, In<uint16_t> frequencies,
                      int64_t chunk_rows, Out<uint8_t> out, Line<int32_t> sizes, int threads) {
  const auto rows = static_cast<int64_t>(bytes.shape(0));
  const auto width = static_cast<int64_t>(bytes.shape(1));
  const auto count = static_cast<int64_t>(frequencies.shape(0));
  expect("frequencies", frequencies, count, 256);
  const Classed x = classed_of(rows, width, chunk_rows, classes, count);
  for (int64_t which = 0; which < count; ++which) {
    int64_t total = 0;
    for (int i = 0; i < 256; ++i) total += frequencies.data()[256 * which + i];
    if (total != kRansTotal)
      fail("frequencies of class " + std::to_string(which) + " add up to " +
           std::to_string(total) + "; expected " + std::to_string(kRansTotal) + ".");
  }
  const int64_t slot = kRansHead + 2 * smaller(chunk_rows, rows) * width;
  expect("out", out, x.chunks(), slot);
  if (static_cast<int64_t>(sizes.shape(0)) != x.chunks()) fail("sizes: expected one for each chunk.");
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t col = 0; col < width; ++col) {
      const int byte = bytes.data()[row * width + col], which = classes.data()[col];
      if (frequencies.data()[256 * which + byte] == 0)
        fail("frequencies: byte " + std::to_string(byte) + " of class " + std::to_string(which) +
             " occurs and has none.");
    }
  nb::gil_scoped_release unlocked;
  rans_encode(bytes.data(), x, frequencies.data(), out.data(), slot, sizes.data(), threads);
}

int64_t bind_rans_decode(Line<const uint8_t> coded, Line<const int64_t> ends,
                         Line<const uint8_t> classes, In<uint32_t> table, int64_t chunk_rows,
                         Out<uint8_t> out, int threads) {
  const auto rows = static_cast<int64_t>(out.shape(0));
  const auto width = static_cast<int64_t>(out.shape(1));
  const auto count = static_cast<int64_t>(table.shape(0));
  expect("table", table, count, kRansTotal);
  const Classed x = classed_of(rows, width, chunk_rows, classes, count);
  const int64_t chunks = x.chunks();
  if (static_cast<int64_t>(ends.shape(0)) != chunks + 1)
    fail("ends: expected one more than there are chunks.");
  const auto size = static_cast<int64_t>(coded.shape(0));
  for (int64_t i = 0; i <= chunks; ++i)
    if (ends.data()[i] < 0 || ends.data()[i] > size || (i && ends.data()[i] < ends.data()[i - 1]))
      fail("ends: expected rising places within what is coded.");
  nb::gil_scoped_release unlocked;
  return rans_decode(coded.data(), ends.data(), x, table.data(), out.data(), threads);
}

int64_t bind_pack(In<int8_t> trits, int64_t group_size, Out<uint8_t> out, int threads) {
  const Layout x = layout_of_matrix(trits, group_size);
  expect("out", out, x.rows, x.width);
  nb::gil_scoped_release unlocked;
  return pack(x, trits.data(), out.data(), threads);
}

int64_t bind_unpack(In<uint8_t> packed, int64_t cols, int64_t group_size, Out<int8_t> out,
                    int threads) {
  const Layout x = checked_layout(static_cast<int64_t>(packed.shape(0)), cols, group_size);
  expect("packed", packed, x.rows, x.width);
  expect("out", out, x.rows, x.cols);
  nb::gil_scoped_release unlocked;
  return unpack(x, packed.data(), out.data(), threads);
}

int64_t bind_check(In<uint8_t> packed, int64_t cols, int64_t group_size, Out<uint8_t> nonzero,
                   int threads) {
  const Layout x = checked_layout(static_cast<int64_t>(packed.shape(0)), cols, group_size);
  expect("packed", packed, x.rows, x.width);
  expect("nonzero", nonzero, x.rows, x.groups);
  nb::gil_scoped_release unlocked;
  return check(x, packed.data(), nonzero.data(), threads);
}

void bind_dequantize(In<uint8_t> packed, In<float> scales, int64_t cols, int64_t group_size,
                     Dense<> out, const std::string& kind_name, int threads) {
  const Kind kind = kind_of(kind_name);
  const Layout x = checked_layout(static_cast<int64_t>(packed.shape(0)), cols, group_size);
  const auto scale_rows = static_cast<int64_t>(scales.shape(0));
  expect("packed", packed, x.rows, x.width);
  expect("scales", scales, scale_rows, x.groups);
  if (x.rows != 0 && (scale_rows == 0 || x.rows % scale_rows != 0))
    fail("scales: " + std::to_string(scale_rows) + " rows do not divide the " +
         std::to_string(x.rows) + " rows of the matrix.");
  expect("out", out, x.rows, x.cols);
  expect_kind("out", out, kind);
  nb::gil_scoped_release unlocked;
  dequantize(x, packed.data(), scales.data(), scale_rows, kind, out.data(), threads);
}

template <Method method>
int64_t bind_ternarize(Dense<nb::ro> weights, const std::string& kind_name, int64_t group_size,
                       Out<int8_t> trits, Out<double> scales, int threads) {
  const Kind kind = kind_of(kind_name);
  const Layout x = layout_of_matrix(weights, group_size);
  expect_kind("weights", weights, kind);
  expect("trits", trits, x.rows, x.cols);
  if (group_size != 0) {
    expect("scales", scales, x.rows, x.groups);
    nb::gil_scoped_release unlocked;
    return ternarize::ternarize(method, kind, x, weights.data(), trits.data(), scales.data(),
                                threads);
  }
  expect("scales", scales, 1, 1);
  std::vector<Total> totals(static_cast<size_t>(x.rows));
  nb::gil_scoped_release unlocked;
  return ternarize_tensor(method, kind, x, weights.data(), trits.data(), scales.data(),
                          totals.data(), threads);
}

template <Method method>
nb::tuple bind_ternarize_packed(Dense<nb::ro> weights, const std::string& kind_name,
                                int64_t group_size, Out<uint8_t> packed, Out<double> scales,
                                int threads) {
  const Kind kind = kind_of(kind_name);
  const Layout x = layout_of_matrix(weights, group_size);
  expect_kind("weights", weights, kind);
  if (group_size == 0) fail("group_size is 0; expected -1 or more: scales of groups or rows.");
  expect("packed", packed, x.rows, x.width);
  expect("scales", scales, x.rows, x.groups);
  std::vector<Distance> rows(static_cast<size_t>(x.rows));
  Distance sum{0.0, 0.0, 0};
  int64_t bad = kNone;
  {
    nb::gil_scoped_release unlocked;
    bad = ternarize_packed(method, kind, x, weights.data(), packed.data(), scales.data(),
                           rows.data(), &sum, threads);
  }
  return nb::make_tuple(bad, sum.error, sum.energy, sum.nonzero);
}

int64_t bind_levels(Dense<nb::ro> weights, const std::string& kind_name, int64_t group_size,
                    Out<int8_t> trits, Out<double> scales, int threads) {
  const Kind kind = kind_of(kind_name);
  const Layout x = layout_of_matrix(weights, group_size);
  expect_kind("weights", weights, kind);
  expect("trits", trits, x.rows, x.cols);
  if (group_size != 0)
    expect("scales", scales, x.rows, x.groups);
  else
    expect("scales", scales, 1, 1);
  nb::gil_scoped_release unlocked;
  return group_size != 0
             ? levels(kind, x, weights.data(), trits.data(), scales.data(), threads)
             : levels_tensor(kind, x, weights.data(), trits.data(), scales.data(), threads);
}

nb::tuple bind_distance(Dense<nb::ro> weights, const std::string& kind_name, int64_t group_size,
                        In<int8_t> trits, In<double> scales, int threads) {
  const Kind kind = kind_of(kind_name);
  const Layout x = layout_of_matrix(weights, group_size);
  const int64_t scale_rows = group_size != 0 ? x.rows : 1;
  expect_kind("weights", weights, kind);
  expect("trits", trits, x.rows, x.cols);
  expect("scales", scales, scale_rows, group_size != 0 ? x.groups : 1);
  std::vector<Distance> rows(static_cast<size_t>(x.rows));
  Distance sum;
  {
    nb::gil_scoped_release unlocked;
    sum = distance(kind, x, weights.data(), trits.data(), scales.data(), scale_rows, rows.data(),
                   threads);
  }
  return nb::make_tuple(sum.error, sum.energy, sum.nonzero);
}

// The groups of latent weights and their scales, checked.
Layout latent_layout(const In<float>& latent, const In<float>& scales, int64_t group_size) {
  const Layout x = layout_of_matrix(latent, group_size);
  if (group_size == 0) fail("group_size is 0; expected -1 or more: scales of groups or rows.");
  expect("scales", scales, x.rows, x.groups);
  return x;
}

void bind_read_latent(In<float> latent, In<float> scales, int64_t group_size, Dense<> out,
                      const std::string& kind_name, int threads) {
  const Kind kind = kind_of(kind_name);
  const Layout x = latent_layout(latent, scales, group_size);
  expect("out", out, x.rows, x.cols);
  expect_kind("out", out, kind);
  nb::gil_scoped_release unlocked;
  read_latent(kind, x, latent.data(), scales.data(), out.data(), threads);
}

void bind_latent_gradients(In<float> latent, In<float> scales, int64_t group_size,
                           Dense<nb::ro> given, const std::string& kind_name, float edge,
                           Out<float> to_latent, Out<float> to_scales, int threads) {
  const Kind kind = kind_of(kind_name);
  const Layout x = latent_layout(latent, scales, group_size);
  expect("given", given, x.rows, x.cols);
  expect_kind("given", given, kind);
  expect("to_latent", to_latent, x.rows, x.cols);
  expect("to_scales", to_scales, x.rows, x.groups);
  nb::gil_scoped_release unlocked;
  latent_gradients(kind, x, latent.data(), scales.data(), given.data(), edge, to_latent.data(),
                   to_scales.data(), threads);
}

// ---------------------------------------------------------------------------------------------
// Products

template <class... Options>
using Flat = nb::ndarray<nb::device::cpu, nb::c_contig, nb::ndim<1>, Options...>;

// `form` is "lanes2" or "lanes3"; the cols in a row are bounded by what the sums can hold.
Lanes checked_lanes(const std::string& form, int64_t rows, int64_t cols, int64_t group_size) {
  if (form != "lanes2" && form != "lanes3")
    fail("form is '" + form + "'; expected 'lanes2' or 'lanes3'.");
  if (rows < 0) fail("rows is " + std::to_string(rows) + "; expected 0 or more.");
  const Layout stored = checked_layout(rows, cols, group_size);
  if (stored.group > kLongestGroup)
    fail("cols is " + std::to_string(cols) + " with groups of " + std::to_string(stored.group) +
         "; expected groups of at most " + std::to_string(kLongestGroup) + " columns.");
  return lanes_of(form == "lanes2" ? Form::Lanes2 : Form::Lanes3, stored);
}

void expect_count(const char* name, int64_t has, int64_t size) {
  if (has != size)
    fail(std::string(name) + ": " + std::to_string(has) + " elements; expected " +
         std::to_string(size) + ".");
}

template <class Array>
void expect_size(const char* name, const Array& array, int64_t size) {
  expect_count(name, static_cast<int64_t>(array.shape(0)), size);
}

nb::tuple bind_lanes_shape(const std::string& form, int64_t rows, int64_t cols,
                           int64_t group_size) {
  const Lanes x = checked_lanes(form, rows, cols, group_size);
  return nb::make_tuple(x.size(), x.blocks, x.block);
}

void bind_ask_for_large_pages(Flat<uint8_t> bytes) {
  ask_for_large_pages(bytes.data(), static_cast<int64_t>(bytes.shape(0)));
}

int64_t bind_to_lanes(In<uint8_t> packed, const std::string& form, int64_t cols,
                      int64_t group_size, Flat<uint8_t> out, int threads) {
  const Lanes x = checked_lanes(form, static_cast<int64_t>(packed.shape(0)), cols, group_size);
  expect("packed", packed, x.stored.rows, x.stored.width);
  expect_size("out", out, x.size());
  nb::gil_scoped_release unlocked;
  return to_lanes(x, packed.data(), out.data(), threads);
}

int64_t bind_from_lanes(Flat<const uint8_t> lanes, const std::string& form, int64_t cols,
                        int64_t group_size, Out<uint8_t> out, int threads) {
  const Lanes x = checked_lanes(form, static_cast<int64_t>(out.shape(0)), cols, group_size);
  expect("out", out, x.stored.rows, x.stored.width);
  expect_size("lanes", lanes, x.size());
  nb::gil_scoped_release unlocked;
  return from_lanes(x, lanes.data(), out.data(), threads);
}

// The columns of `read_stored`'s table, of int64.
enum Column {
  kFile, kStart, kBytes, kForm, kRows, kCols, kGroupSize, kCoded, kOut, kOutBytes, kScaleFile,
  kScaleStart, kScaleBytes, kScaleKind, kScalesCoded, kScaleOut, kScaleOutBytes, kColumns
};

// A row of the table, checked: sizes agree, so that nothing is written beyond the memory that is given.
Stored checked_stored(const int64_t* row, int64_t files) {
  const auto out = [](int64_t address) { return reinterpret_cast<uint8_t*>(address); };
  Stored x{};
  x.file = row[kFile], x.scale_file = row[kScaleFile];
  for (const int64_t file : {x.file, x.scale_file})
    if (file < 0 || file >= files)
      fail("tensors: file " + std::to_string(file) + " of " + std::to_string(files) + ".");
  x.start = row[kStart], x.nbytes = row[kBytes];
  x.out = out(row[kOut]), x.scale_out = out(row[kScaleOut]);
  if (x.start < 0 || x.nbytes < 0 || row[kScaleStart] < 0) fail("tensors: a negative place.");
  const int64_t form = row[kForm];
  if (form == 0) {
    x.form = Stored::Form::Raw;
    if (x.out) expect_count("out", row[kOutBytes], x.nbytes);
    return x;
  }
  if (form < 1 || form > 3 || row[kScaleKind] < 0 || row[kScaleKind] > 3)
    fail("tensors: expected a form of 0 to 3 and a kind of scales of 0 to 3.");
  const int64_t rows = row[kRows], cols = row[kCols], group_size = row[kGroupSize];
  x.form = form == 1 ? Stored::Form::Trits : Stored::Form::Lanes;
  if (form == 1) {
    x.lanes.stored = checked_layout(rows, cols, group_size);
  } else {
    x.lanes = checked_lanes(form == 2 ? "lanes2" : "lanes3", rows, cols, group_size);
  }
  const int64_t width = x.lanes.stored.width;
  constexpr int64_t kMost = int64_t{1} << 50;  // no product of sizes wraps
  x.coded = row[kCoded] != 0;
  constexpr int64_t kMostCoded = 1 << 16;  // of a row in a stream
  if (rows < 1 || width < 1 || x.nbytes > kMost || width > kMost / rows ||
      (x.coded ? width > kMostCoded : x.nbytes != rows * width))
    fail("tensors: " + std::to_string(x.nbytes) + " bytes; expected " + std::to_string(rows) +
         " rows of " + std::to_string(width) + ".");
  x.scale_start = row[kScaleStart];
  x.scale_bytes = row[kScaleBytes];
  x.scales_coded = row[kScalesCoded] != 0;
  x.scale_kind = static_cast<ScaleKind>(row[kScaleKind]);
  x.one_scale = group_size == 0;
  const int64_t scale_size = size_of(x.scale_kind);
  const int64_t row_scales = x.lanes.stored.groups * scale_size;
  if (x.scale_bytes < 0 || (x.scales_coded ? row_scales > kMostCoded
                                           : x.scale_bytes != x.scales() * scale_size))
    fail("tensors: " + std::to_string(x.scale_bytes) + " bytes of scales; expected " +
         std::to_string(x.scales()) + " numbers.");
  if (form == 1) {
    if (x.out) expect_count("out", row[kOutBytes], rows * width);
    if (x.scale_out) expect_count("scale_out", row[kScaleOutBytes], x.scales() * scale_size);
    return x;
  }
  expect_count("out", row[kOutBytes], x.lanes.size());
  const bool half = x.scale_kind == ScaleKind::F16 || x.scale_kind == ScaleKind::E;
  expect_count("scale_out", row[kScaleOutBytes],
               x.lanes.blocks * x.lanes.block * x.lanes.stored.groups * (half ? 2 : 4));
  return x;
}

bool bind_read_stored(const std::vector<nb::bytes>& files, In<int64_t> tensors, bool checked,
                      Line<uint8_t> states, Out<uint8_t> digests, Line<const uint8_t> stop,
                      int threads) {
  const auto n = static_cast<int64_t>(tensors.shape(0));
  expect("tensors", tensors, n, kColumns);
  expect_size("states", states, n);
  expect("digests", digests, n, 32);
  expect_size("stop", stop, 1);
  std::vector<Stored> stored;
  const auto n_files = static_cast<int64_t>(files.size());
  for (int64_t i = 0; i < n; ++i)
    stored.push_back(checked_stored(tensors.data() + i * kColumns, n_files));
  std::vector<const char*> paths;
  for (const nb::bytes& file : files) paths.push_back(file.c_str());
  nb::gil_scoped_release unlocked;
  return read_stored(paths.data(), stored.data(), n, checked, states.data(), digests.data(),
                     stop.data(), threads);
}

// Memory by address: a layer's product takes tens of microseconds, and to look at each tensor through
// DLPack takes three. The caller, runtime/kernels.py, knows dtypes and strides; sizes are
// checked here.
void* at(int64_t address) { return reinterpret_cast<void*>(address); }

using MatrixArgs = std::tuple<int64_t, int64_t, int64_t, int64_t, bool, int64_t, int64_t>;

void bind_products(int64_t x, const std::string& kind_name, int64_t tokens, int64_t cols,
                   const std::vector<MatrixArgs>& args, const std::string& form,
                   int64_t group_size, bool int8, int threads) {
  const Kind kind = kind_of(kind_name);
  if (tokens < 0) fail("tokens is " + std::to_string(tokens) + "; expected 0 or more.");
  if (args.empty()) return;
  std::vector<Matrix> matrices;
  for (const auto& [lanes, lanes_size, scales, scales_size, half, out, rows] : args) {
    const Lanes l = checked_lanes(form, rows, cols, group_size);
    expect_count("lanes", lanes_size, l.size());
    expect_count("scales", scales_size, l.blocks * l.stored.groups * l.block);
    matrices.push_back({l, static_cast<const uint8_t*>(at(lanes)), {at(scales), half}, at(out)});
  }
  if (matrices[0].x.form == Form::Lanes3 && !products().lanes3)
    fail("form is 'lanes3', which '" + std::string(variant().name) +
         "' cannot multiply; expected 'lanes2'.");
  nb::gil_scoped_release unlocked;
  product(matrices.data(), static_cast<int>(matrices.size()), kind, int8 ? 1 : 3, tokens, at(x),
          threads);
}

// Memory by address as in bind_products; runtime/decode.py knows what it is. The position is read from
// memory too, so that a call can be made again with the same arguments.
void bind_rms_norm(const std::string& kind_name, int64_t rows, int64_t n, int64_t x,
                   int64_t weight, float epsilon, int64_t out, int threads) {
  const Kind kind = kind_of(kind_name);
  if (rows < 0 || n < 1) fail("rows and n are " + std::to_string(rows) + " and " +
                              std::to_string(n) + "; expected at least 0 and 1.");
  nb::gil_scoped_release unlocked;
  rms_norm(kind, rows, n, at(x), at(weight), epsilon, at(out), threads);
}

void bind_gate(const std::string& kind_name, const std::string& activation, int64_t n,
               int64_t gate_at, int64_t up, int64_t out, int threads) {
  const Kind kind = kind_of(kind_name);
  if (activation != "silu" && activation != "relu2")
    fail("activation is '" + activation + "'; expected 'silu' or 'relu2'.");
  if (n < 0) fail("n is " + std::to_string(n) + "; expected 0 or more.");
  nb::gil_scoped_release unlocked;
  gate(kind, activation == "silu" ? Activation::Silu : Activation::Relu2, n, at(gate_at), at(up),
       at(out), threads);
}

void bind_dense(const std::string& kind_name, int64_t tokens, int64_t rows, int64_t cols, int64_t x,
                int64_t w, int64_t out, int threads) {
  const Kind kind = kind_of(kind_name);
  if (tokens < 0 || rows < 0 || cols < 1)
    fail("tokens, rows and cols are " + std::to_string(tokens) + ", " + std::to_string(rows) +
         " and " + std::to_string(cols) + "; expected at least 0, 0 and 1.");
  nb::gil_scoped_release unlocked;
  dense(kind, tokens, rows, cols, at(x), at(w), at(out), threads);
}

void bind_attend(const std::string& kind_name, int64_t batch, int64_t heads, int64_t kv_heads,
                 int64_t dim, int64_t capacity, float scaling,
                 const std::array<int64_t, 9>& memory, int threads) {
  const Kind kind = kind_of(kind_name);
  if (batch < 0 || kv_heads < 1 || heads < 1 || heads % kv_heads || dim < 2 || dim % 2)
    fail("heads of queries, of keys and their numbers are " + std::to_string(heads) + ", " +
         std::to_string(kv_heads) + " and " + std::to_string(dim) +
         "; expected a multiple of the second, at least 1, and an even one.");
  const int64_t position = *reinterpret_cast<const int64_t*>(memory[8]);
  if (position < 0 || position >= capacity)
    fail("position is " + std::to_string(position) + "; expected less than the capacity " +
         std::to_string(capacity) + ".");
  const auto part = [&](size_t i) { return static_cast<char*>(at(memory[i])); };
  const int64_t rotary = position * dim * size_of(kind);
  const Attention a{
      batch,   heads,   kv_heads,         dim,              capacity, position, scaling, part(0),
      part(1), part(2), part(3) + rotary, part(4) + rotary, part(5),  part(6),  part(7)};
  nb::gil_scoped_release unlocked;
  attend(kind, a, threads);
}

// As bind_products, of int8 or int4 weights as they are stored.
template <bool halves>
void bind_stored_product(int64_t x, const std::string& kind_name, int64_t tokens, int64_t cols,
                       int64_t weights, int64_t weights_size, int64_t scales, int64_t scale_rows,
                       int64_t scales_size, const std::string& scale_kind_name, int64_t group_size,
                       bool int8, int64_t out, int64_t rows, int threads) {
  const Kind kind = kind_of(kind_name), scale_kind = kind_of(scale_kind_name);
  const Lanes l = checked_lanes("lanes2", rows, cols, group_size);
  if (tokens < 0) fail("tokens is " + std::to_string(tokens) + "; expected 0 or more.");
  expect_count("weights", weights_size, rows * (halves ? half_width(l) : cols));
  expect_count("scales", scales_size, scale_rows * l.stored.groups);
  if (rows != 0 && (scale_rows <= 0 || rows % scale_rows != 0))
    fail("scales: " + std::to_string(scale_rows) + " rows do not divide the " +
         std::to_string(rows) + " rows of the matrix.");
  Int8Matrix matrix{l, nullptr, at(scales), scale_kind, rows != 0 ? rows / scale_rows : 1};
  if (halves)
    matrix.halves = static_cast<const uint8_t*>(at(weights));
  else
    matrix.weights = static_cast<const int8_t*>(at(weights));
  nb::gil_scoped_release unlocked;
  int8_product(matrix, kind, int8 ? 1 : 3, tokens, at(x), at(out), threads);
}

void bind_use_openmp(int64_t parallel) { use_openmp(reinterpret_cast<Parallel>(parallel)); }

std::string bind_cpu() { return variant().name; }

// Names of all variants, or of those that differ in their functions for weights.
nb::list names_of_variants(bool all) {
  nb::list names;
  for (const Variant* one = variants(); one->name; ++one)
    if (all || one == variants() || one->kernels != one[-1].kernels) names.append(one->name);
  return names;
}

nb::list bind_cpus() { return names_of_variants(false); }
nb::list bind_product_cpus() { return names_of_variants(true); }

void bind_use_cpu(const std::string& name) {
  if (!use(name.c_str()))
    fail("TERNARIZE_CPU is '" + name + "', which this CPU or this build does not have; expected " +
         nb::cast<std::string>(nb::str(", ").attr("join")(bind_product_cpus())) + ".");
}

uint64_t bind_read_all(Flat<const uint8_t> bytes, int threads) {
  nb::gil_scoped_release unlocked;
  return read_all(bytes.data(), static_cast<int64_t>(bytes.shape(0)), threads);
}

int64_t bind_dot_peak(int64_t rounds, int threads) {
  nb::gil_scoped_release unlocked;
  return dot_peak(rounds, threads);
}

// All sizes are bounded, so that no product of them wraps.
void bind_unfold(Flat<const uint8_t> images, const std::array<int64_t, 4>& sizes,
                 const std::array<int64_t, 2>& kernel, const std::array<int64_t, 2>& stride,
                 const std::array<int64_t, 2>& dilation, const std::array<int64_t, 4>& padding,
                 int size, Flat<uint8_t> out, int threads) {
  constexpr int64_t kMost = int64_t{1} << 30;
  const auto bounded = [](const char* name, const auto& values, int64_t least) {
    for (const int64_t value : values)
      if (value < least || value > kMost)
        fail(std::string(name) + ": " + std::to_string(value) + "; expected at least " +
             std::to_string(least) + ", and 2^30 at most.");
  };
  bounded("sizes", sizes, 0);
  bounded("kernel", kernel, 1);
  bounded("stride", stride, 1);
  bounded("dilation", dilation, 1);
  bounded("padding", padding, 0);
  if (size != 2 && size != 4) fail("size is " + std::to_string(size) + "; expected 2 or 4.");
  const Images x{sizes[0], sizes[1], sizes[2], sizes[3]};
  Windows k{};
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t whole = sizes[1 + axis] + padding[2 * axis] + padding[2 * axis + 1];
    const int64_t reach = dilation[axis] * (kernel[axis] - 1) + 1;
    if (reach > whole) fail("kernel: it is larger than the image with its padding.");
    k.kernel[axis] = kernel[axis], k.stride[axis] = stride[axis];
    k.dilation[axis] = dilation[axis], k.before[axis] = padding[2 * axis];
    k.places[axis] = (whole - reach) / stride[axis] + 1;
  }
  const auto expect_bytes = [size](const char* name, int64_t has, std::vector<int64_t> factors) {
    int64_t bytes = size;
    for (const int64_t factor : factors) {
      if (factor != 0 && bytes > std::numeric_limits<int64_t>::max() / factor)
        fail(std::string(name) + ": its sizes do not fit 63 bits.");
      bytes *= factor;
    }
    if (bytes != has)
      fail(std::string(name) + ": " + std::to_string(has) + " bytes; expected " +
           std::to_string(bytes) + ".");
  };
  expect_bytes("images", static_cast<int64_t>(images.shape(0)),
               {x.count, x.height, x.width, x.channels});
  expect_bytes("out", static_cast<int64_t>(out.shape(0)),
               {x.count, k.places[0], k.places[1], x.channels, k.kernel[0], k.kernel[1]});
  if (out.shape(0) == 0) return;
  nb::gil_scoped_release unlocked;
  unfold(x, k, size, images.data(), out.data(), threads);
}

bool bind_has_lanes3() { return products().lanes3; }

}  // namespace

NB_MODULE(_native, m) {
  if (const char* name = std::getenv("TERNARIZE_CPU")) bind_use_cpu(name);
  // noconvert: a converted output would be a copy that nobody reads.
  m.def("pack", bind_pack, nb::arg("trits").noconvert(), nb::arg("group_size"),
        nb::arg("out").noconvert(), nb::arg("threads"));
  m.def("unpack", bind_unpack, nb::arg("packed").noconvert(), nb::arg("cols"),
        nb::arg("group_size"), nb::arg("out").noconvert(), nb::arg("threads"));
  m.def("check", bind_check, nb::arg("packed").noconvert(), nb::arg("cols"), nb::arg("group_size"),
        nb::arg("nonzero").noconvert(), nb::arg("threads"));
  m.def("dequantize", bind_dequantize, nb::arg("packed").noconvert(),
        nb::arg("scales").noconvert(), nb::arg("cols"), nb::arg("group_size"),
        nb::arg("out").noconvert(), nb::arg("kind"), nb::arg("threads"));
  const auto method = [&m](const char* name, auto function) {
    m.def(name, function, nb::arg("weights").noconvert(), nb::arg("kind"), nb::arg("group_size"),
          nb::arg("trits").noconvert(), nb::arg("scales").noconvert(), nb::arg("threads"));
  };
  method("absmean", bind_ternarize<Method::Absmean>);
  method("twn", bind_ternarize<Method::Twn>);
  method("itf", bind_ternarize<Method::Itf>);
  method("levels", bind_levels);
  const auto packed = [&m](const char* name, auto function) {
    m.def(name, function, nb::arg("weights").noconvert(), nb::arg("kind"), nb::arg("group_size"),
          nb::arg("packed").noconvert(), nb::arg("scales").noconvert(), nb::arg("threads"));
  };
  packed("absmean_packed", bind_ternarize_packed<Method::Absmean>);
  packed("twn_packed", bind_ternarize_packed<Method::Twn>);
  packed("itf_packed", bind_ternarize_packed<Method::Itf>);
  m.def("distance", bind_distance, nb::arg("weights").noconvert(), nb::arg("kind"),
        nb::arg("group_size"), nb::arg("trits").noconvert(), nb::arg("scales").noconvert(),
        nb::arg("threads"));
  m.def("read_latent", bind_read_latent, nb::arg("latent").noconvert(),
        nb::arg("scales").noconvert(), nb::arg("group_size"), nb::arg("out").noconvert(),
        nb::arg("kind"), nb::arg("threads"));
  m.def("latent_gradients", bind_latent_gradients, nb::arg("latent").noconvert(),
        nb::arg("scales").noconvert(), nb::arg("group_size"), nb::arg("given").noconvert(),
        nb::arg("kind"), nb::arg("edge"), nb::arg("to_latent").noconvert(),
        nb::arg("to_scales").noconvert(), nb::arg("threads"));
  m.def("lanes_shape", bind_lanes_shape, nb::arg("form"), nb::arg("rows"), nb::arg("cols"),
        nb::arg("group_size"));
  m.def("ask_for_large_pages", bind_ask_for_large_pages, nb::arg("bytes").noconvert());
  m.def("to_lanes", bind_to_lanes, nb::arg("packed").noconvert(), nb::arg("form"), nb::arg("cols"),
        nb::arg("group_size"), nb::arg("out").noconvert(), nb::arg("threads"));
  m.def("from_lanes", bind_from_lanes, nb::arg("lanes").noconvert(), nb::arg("form"),
        nb::arg("cols"), nb::arg("group_size"), nb::arg("out").noconvert(), nb::arg("threads"));
  m.def("products", bind_products, nb::arg("x"), nb::arg("kind"), nb::arg("tokens"),
        nb::arg("cols"), nb::arg("matrices"), nb::arg("form"), nb::arg("group_size"),
        nb::arg("int8"), nb::arg("threads"));
  m.def("rms_norm", bind_rms_norm, nb::arg("kind"), nb::arg("rows"), nb::arg("n"), nb::arg("x"),
        nb::arg("weight"), nb::arg("epsilon"), nb::arg("out"), nb::arg("threads"));
  m.def("gate", bind_gate, nb::arg("kind"), nb::arg("activation"), nb::arg("n"), nb::arg("gate"),
        nb::arg("up"), nb::arg("out"), nb::arg("threads"));
  m.def("dense", bind_dense, nb::arg("kind"), nb::arg("tokens"), nb::arg("rows"), nb::arg("cols"),
        nb::arg("x"), nb::arg("weight"), nb::arg("out"), nb::arg("threads"));
  m.def("attend", bind_attend, nb::arg("kind"), nb::arg("batch"), nb::arg("heads"),
        nb::arg("kv_heads"), nb::arg("dim"), nb::arg("capacity"), nb::arg("scaling"),
        nb::arg("memory"), nb::arg("threads"));
  m.def("use_openmp", bind_use_openmp, nb::arg("parallel"));
  m.def("int8_product", bind_stored_product<false>, nb::arg("x"), nb::arg("kind"), nb::arg("tokens"),
        nb::arg("cols"), nb::arg("weights"), nb::arg("weights_size"), nb::arg("scales"),
        nb::arg("scale_rows"), nb::arg("scales_size"), nb::arg("scale_kind"),
        nb::arg("group_size"), nb::arg("int8"), nb::arg("out"), nb::arg("rows"),
        nb::arg("threads"));
  m.def("int4_product", bind_stored_product<true>, nb::arg("x"), nb::arg("kind"), nb::arg("tokens"),
        nb::arg("cols"), nb::arg("weights"), nb::arg("weights_size"), nb::arg("scales"),
        nb::arg("scale_rows"), nb::arg("scales_size"), nb::arg("scale_kind"),
        nb::arg("group_size"), nb::arg("int8"), nb::arg("out"), nb::arg("rows"),
        nb::arg("threads"));
  m.def("apply_steps", bind_apply_steps, nb::arg("values").noconvert(), nb::arg("first"),
        nb::arg("limit"), nb::arg("purpose"), nb::arg("seeds").noconvert(),
        nb::arg("fields").noconvert(), nb::arg("bounds").noconvert(),
        nb::arg("chosen").noconvert(), nb::arg("signs").noconvert(), nb::arg("threads"));
  m.def("align", bind_align, nb::arg("up").noconvert(), nb::arg("down").noconvert(),
        nb::arg("first"), nb::arg("seed"), nb::arg("number"), nb::arg("bits"), nb::arg("purpose"),
        nb::arg("out").noconvert(), nb::arg("threads"));
  m.def("rans_count", bind_rans_count, nb::arg("bytes").noconvert(),
        nb::arg("classes").noconvert(), nb::arg("counts").noconvert(), nb::arg("threads"));
  m.def("rans_encode", bind_rans_encode, nb::arg("bytes").noconvert(),
        nb::arg("classes").noconvert(), nb::arg("frequencies").noconvert(), nb::arg("chunk_rows"),
        nb::arg("out").noconvert(), nb::arg("sizes").noconvert(), nb::arg("threads"));
  m.def("rans_decode", bind_rans_decode, nb::arg("coded").noconvert(),
        nb::arg("ends").noconvert(), nb::arg("classes").noconvert(), nb::arg("table").noconvert(),
        nb::arg("chunk_rows"), nb::arg("out").noconvert(), nb::arg("threads"));
  m.def("can_read_stored", can_read_stored);
  m.def("read_stored", bind_read_stored, nb::arg("files"), nb::arg("tensors").noconvert(),
        nb::arg("checked"), nb::arg("states").noconvert(), nb::arg("digests").noconvert(),
        nb::arg("stop").noconvert(), nb::arg("threads"));
  m.def("unfold", bind_unfold, nb::arg("images").noconvert(), nb::arg("sizes"), nb::arg("kernel"),
        nb::arg("stride"), nb::arg("dilation"), nb::arg("padding"), nb::arg("size"),
        nb::arg("out").noconvert(), nb::arg("threads"));
  m.def("read_all", bind_read_all, nb::arg("bytes").noconvert(), nb::arg("threads"));
  m.def("dot_peak", bind_dot_peak, nb::arg("rounds"), nb::arg("threads"));
  m.def("cpu", bind_cpu);
  m.def("cpus", bind_cpus);
  m.def("product_cpus", bind_product_cpus);
  m.def("has_lanes3", bind_has_lanes3);
  m.def("use_cpu", bind_use_cpu, nb::arg("name"));
}
