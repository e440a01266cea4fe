// Products with int8 weights of a range of rows, around the loops of one instruction set. A source that
// includes this (by table.h) has defined, in namespace int8,
//   kSums         how many sums `dots` works on at a time
//   kSumOffset    `dots` gives sum (w + kSumOffset) q
//   dots<rows, n>(weights, weights_stride, cols, q, stride, ahead, sums)
//                 sums[r * rows + i] = the sum over the columns of weights[i] * q[r], of `rows` rows
//                 of weights and n rows of q; `ahead` bytes behind are what is read next
//   kFew          up to how many tokens `dots` is faster, or 0 if there is no `tile`
//   kTileRows     how many rows of weights `tile` takes, 0 if there is none
//   kPanelOffset  panels hold q + kPanelOffset
//   tile<n>(weights, weights_stride, cols, panel, panel_stride, sums)
//                 sums[(b kTileRows + i) * 16 + token] of kTileRows rows of weights and n panels;
//                 weights are read up to 63 bytes beyond the columns
//   Session       what has to be there while these run
// Internal linkage, see shared/formats.h.
#pragma once

#include "multiply/levels.h"

namespace ternarize {
namespace {
namespace int8 {

// Where kTileRows is 0, nobody defines this.
template <int n>
void tile(const int8_t* weights, int64_t weights_stride, int64_t cols, const uint8_t* panel,
          int64_t panel_stride, int32_t* sums);

constexpr int64_t kMostRows = kTileRows > kSums ? kTileRows : kSums;
constexpr int kMostPanels = 3;

// ---------------------------------------------------------------------------------------------
// Scales and results

// The scales of rows as floats: [row, group].
void load_scales(const Int8Matrix& x, int64_t row, int64_t n, float* out) {
  const int64_t groups = x.lanes.stored.groups;
  if (x.rows_per_scale == 1) return widen(x.scale_kind, x.scales, row * groups, n * groups, out);
  for (int64_t i = 0; i < n; ++i)
    widen(x.scale_kind, x.scales, (row + i) / x.rows_per_scale * groups, groups,
          out + i * groups);
}

// A group's value from the sums of its parts, `stride` apart.
template <int parts>
TERNARIZE_INLINE float value_at(const int32_t* s, int64_t stride) {
  if constexpr (parts == 1) return static_cast<float>(s[0]);
  return value_of(s[0], s[stride], s[2 * stride]);
}

struct Call {
  const Int8Matrix& x;
  const Levels& in;
  Kind kind;
  void* out;
  float* scales;    // [row, group], of up to kMostRows rows
  int32_t* sums;    // of one step
  float* all;       // likewise
  int32_t* excess;  // [group, row] of a tile: what its sums have too much
  int8_t* copy;     // of the weights of a tile
};

// ---------------------------------------------------------------------------------------------
// Few tokens: rows of weights with rows of q

// How many rows of weights meet n rows of q at once.
constexpr int rows_of(int n) {
  return static_cast<int>(n <= 1 ? kSums : n == 2 ? kSums / 2 : kSums / 4);
}

// `rows` rows of weights and the tokens [token, token + n).
template <int rows, int parts, int n>
TERNARIZE_INLINE void step(const Call& c, int64_t row, int64_t token, int64_t ahead,
                           const float* scales) {
  const Lanes& lanes = c.x.lanes;
  const int64_t groups = lanes.stored.groups, group = lanes.stored.group, cols = c.x.cols();
  const int8_t* q = c.in.q + token * parts * c.in.stride;
  const int32_t* excess = c.in.sums + token * parts * groups;
  const int8_t* weights = c.x.row(row);
  float all[n * rows] = {};
  for (int64_t g = 0; g < groups; ++g) {
    int32_t sums[(n * parts * rows + 15) / 16 * 16];
    dots<rows, n * parts>(weights + g * group, cols, lanes.cols_of(g),
                          q + g * lanes.group_quads * 4, c.in.stride, ahead, sums);
    if constexpr (kSumOffset != 0)
      for (int r = 0; r < n * parts; ++r)
        for (int i = 0; i < rows; ++i) sums[r * rows + i] -= kSumOffset * excess[r * groups + g];
    for (int t = 0; t < n; ++t)
      for (int i = 0; i < rows; ++i)
        all[t * rows + i] +=
            value_at<parts>(sums + t * parts * rows + i, rows) * scales[i * groups + g];
  }
  for (int t = 0; t < n; ++t)
    store<rows>(all + t * rows, c.in.factors[token + t], rows, c.kind,
                (token + t) * c.x.rows() + row, c.out);
}

// All tokens with `rows` rows.
template <int rows, int parts>
void tokens_of(const Call& c, int64_t row) {
  // What is read next: the rows after these, where that is not too far for the cache to keep.
  const int64_t next = rows * c.x.cols(), ahead = next <= (1 << 17) ? next : 4096;
  load_scales(c.x, row, rows, c.scales);
  int64_t token = 0;
  const int64_t tokens = c.in.tokens;
  if constexpr (parts == 3) {
    for (; token < tokens; ++token) step<rows, 3, 1>(c, row, token, ahead, c.scales);
  } else {
    constexpr int kMost = static_cast<int>(kSums) / rows < 4 ? static_cast<int>(kSums) / rows : 4;
    for (; token + kMost <= tokens; token += kMost)
      step<rows, 1, kMost>(c, row, token, ahead, c.scales);
    for (; token < tokens; ++token) step<rows, 1, 1>(c, row, token, ahead, c.scales);
  }
}

template <int rows, int parts>
void rows_with_few(const Call& c, int64_t row, int64_t row_end) {
  for (; row + rows <= row_end; row += rows) tokens_of<rows, parts>(c, row);
  for (; row < row_end; ++row) tokens_of<1, parts>(c, row);
}

// ---------------------------------------------------------------------------------------------
// Many tokens: rows of weights with panels

[[maybe_unused]] int32_t row_sum(const int8_t* weights, int64_t cols) {
  int32_t sum = 0;
  for (int64_t c = 0; c < cols; ++c) sum += weights[c];
  return sum;
}

void arrange(const Lanes& x, const Levels& in, int64_t first, int64_t last, uint8_t* panels) {
  constexpr auto offset = static_cast<uint8_t>(kTileRows > 0 ? kPanelOffset : 0);
  const int64_t groups = x.stored.groups, size = panel_cols(x) * kLanes;
  std::memset(panels + first * in.parts * size, 0,
              static_cast<size_t>((last - first) * in.parts * size));
  for (int64_t block = first; block < last; ++block)
    for (int p = 0; p < in.parts; ++p)
      for (int64_t lane = 0; lane < kLanes; ++lane) {
        const int64_t token = block * kLanes + lane;
        if (token >= in.tokens) break;
        const int8_t* q = in.q + (token * in.parts + p) * in.stride;
        uint8_t* out = panels + (block * in.parts + p) * size + lane * 4;
        for (int64_t g = 0; g < groups; ++g) {
          const int8_t* from = q + g * x.group_quads * 4;
          uint8_t* to = out + g * panel_group(x) * kLanes;
          const int64_t cols = x.cols_of(g);
          for (int64_t k = 0; k < cols / 4; ++k)
            for (int j = 0; j < 4; ++j)
              to[k * 64 + j] = static_cast<uint8_t>(static_cast<uint8_t>(from[k * 4 + j]) ^ offset);
          for (int64_t c = cols / 4 * 4; c < cols; ++c)
            to[c / 4 * 64 + c % 4] = static_cast<uint8_t>(static_cast<uint8_t>(from[c]) ^ offset);
        }
      }
}

// The `n` panels from `panel` on, of the tokens from `token` on, with the rows of a tile.
template <int parts, int n>
void tile_step(const Call& c, const int8_t* weights, const uint8_t* panel, int64_t row,
               int64_t rows, int64_t token) {
  constexpr int kBlocks = parts == 3 ? 1 : n, kTile = static_cast<int>(kTileRows) * 16;
  const Lanes& lanes = c.x.lanes;
  const int64_t groups = lanes.stored.groups, size = panel_cols(lanes) * kLanes;
  std::memset(c.all, 0, kBlocks * kTile * sizeof(float));
  for (int64_t g = 0; g < groups; ++g) {
    tile<n>(weights + g * lanes.stored.group, c.x.cols(), lanes.cols_of(g),
            panel + g * panel_group(lanes) * kLanes, size, c.sums);
    for (int b = 0; b < kBlocks; ++b)
      for (int64_t i = 0; i < kTileRows; ++i) {
        int32_t* s = c.sums + (b * kTileRows + i) * 16;
        if constexpr (kPanelOffset != 0) {
          const int32_t less = c.excess[g * kTileRows + i];
          for (int p = 0; p < parts; ++p)
            for (int lane = 0; lane < 16; ++lane) s[p * kTile + lane] -= less;
        }
        const float scale = c.scales[i * groups + g];
        float* all = c.all + (b * kTileRows + i) * 16;
        for (int lane = 0; lane < 16; ++lane)
          all[lane] += value_at<parts>(s + lane, kTile) * scale;
      }
  }
  for (int b = 0; b < kBlocks; ++b)
    for (int64_t lane = 0; lane < 16; ++lane) {
      const int64_t at = token + b * 16 + lane;
      if (at >= c.in.tokens) break;
      float y[kMostRows];
      for (int64_t i = 0; i < kTileRows; ++i)
        y[i] = c.all[(b * kTileRows + i) * 16 + lane] * c.in.factors[at];
      narrow(c.kind, y, rows, c.out, at * c.x.rows() + row);
    }
}

template <int parts>
void rows_with_many(const Call& c, const uint8_t* panels, int64_t row, int64_t row_end) {
  if constexpr (kTileRows > 0) {
    const Lanes& lanes = c.x.lanes;
    const int64_t groups = lanes.stored.groups, cols = c.x.cols();
    const int64_t size = panel_size(lanes, parts), blocks = ceil_div(c.in.tokens, 16);
    std::memset(c.scales, 0, static_cast<size_t>(kTileRows * groups) * sizeof(float));
    for (; row < row_end; row += kTileRows) {
      const int64_t rows = smaller(kTileRows, row_end - row);
      const int8_t* weights = c.x.row(row);
      // where reading on could leave the matrix
      if ((c.x.rows() - row - kTileRows) * cols < 64) {
        std::memset(c.copy, 0, static_cast<size_t>(kTileRows * cols + 64));
        std::memcpy(c.copy, weights, static_cast<size_t>(rows * cols));
        weights = c.copy;
      }
      load_scales(c.x, row, rows, c.scales);
      if constexpr (kPanelOffset != 0)
        for (int64_t g = 0; g < groups; ++g)
          for (int64_t i = 0; i < kTileRows; ++i)
            c.excess[g * kTileRows + i] =
                i >= rows ? 0
                          : kPanelOffset * row_sum(weights + i * cols + g * lanes.stored.group,
                                                   lanes.cols_of(g));
      for (int64_t b = 0; b < blocks;) {
        const uint8_t* panel = panels + b * size;
        if constexpr (parts == 3) {
          tile_step<3, 3>(c, weights, panel, row, rows, b * 16);
          b += 1;
        } else if (blocks - b >= 3) {
          tile_step<1, 3>(c, weights, panel, row, rows, b * 16);
          b += 3;
        } else if (blocks - b == 2) {
          tile_step<1, 2>(c, weights, panel, row, rows, b * 16);
          b += 2;
        } else {
          tile_step<1, 1>(c, weights, panel, row, rows, b * 16);
          b += 1;
        }
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// int4: two weights in a byte

void open_run(const uint8_t* halves, int64_t n, int8_t* out) {
  for (int64_t i = 0; i < n / 2; ++i) {
    out[2 * i] = static_cast<int8_t>((halves[i] & 15) - 8);
    out[2 * i + 1] = static_cast<int8_t>((halves[i] >> 4) - 8);
  }
  if (n % 2 != 0) out[n - 1] = static_cast<int8_t>((halves[n / 2] & 15) - 8);
}

void open(const Lanes& x, const uint8_t* halves, int64_t rows, int8_t* out) {
  const int64_t cols = x.stored.cols, group = x.stored.group, width = half_width(x);
  // groups of an even length follow each other without filling
  const int64_t run = group % 2 == 0 ? cols : group;
  for (int64_t row = 0; row < rows; ++row, halves += width, out += cols)
    for (int64_t col = 0, at = 0; col < cols; col += run, at += (run + 1) / 2)
      open_run(halves + at, smaller(run, cols - col), out + col);
}

// ---------------------------------------------------------------------------------------------

int64_t scratch(const Int8Matrix& x) {
  const int64_t groups = x.lanes.stored.groups;
  const int64_t many = kTileRows * (2 * kMostPanels * 64 + groups * 4);
  const int64_t copy = kTileRows > 0 ? kTileRows * x.cols() + 64 : 0;
  return lines(kMostRows * groups * 4) + lines(many) + lines(copy);
}

void multiply(const Int8Matrix& x, const Levels& in, const uint8_t* panels, int64_t row,
              int64_t row_end, Kind kind, void* out, void* scratch) {
  const int64_t groups = x.lanes.stored.groups;
  auto* const sums = static_cast<int32_t*>(scratch);
  auto* const all = reinterpret_cast<float*>(sums + kTileRows * kMostPanels * 16);
  auto* const excess = reinterpret_cast<int32_t*>(all + kTileRows * kMostPanels * 16);
  auto* const scales = reinterpret_cast<float*>(excess + kTileRows * groups);
  auto* const copy = reinterpret_cast<int8_t*>(scales + kMostRows * groups);
  const Call call{x, in, kind, out, scales, sums, all, excess, copy};
  if (panels) {
    [[maybe_unused]] const Session session{};
    (in.parts == 3 ? rows_with_many<3> : rows_with_many<1>)(call, panels, row, row_end);
  } else if (in.parts == 3) {
    rows_with_few<rows_of(3), 3>(call, row, row_end);
  } else if (in.tokens == 1) {
    rows_with_few<rows_of(1), 1>(call, row, row_end);
  } else if (in.tokens < 4) {
    rows_with_few<rows_of(2), 1>(call, row, row_end);
  } else {
    rows_with_few<rows_of(4), 1>(call, row, row_end);
  }
}

}  // namespace int8
}  // namespace
}  // namespace ternarize
