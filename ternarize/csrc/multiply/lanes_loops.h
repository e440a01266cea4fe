// Products of a range of blocks of lanes, around the loops of one instruction set. A source that
// includes this (by table.h) has defined, in namespace lanes,
//   kLanes3      whether it multiplies Form::Lanes3
//   kDirect      how many rows of q `dots` takes at most
//   dots<fields, n>(lanes, quads, q, stride, sums, sums_stride)
//                sums[r, i] = sum over the columns of `quads` quads of digit[i] * q[r], for n rows
//                of q and the 16 fields rows i of a block
//   kTile        0, or how many rows of q `tile` takes at most
//   kFew         up to how many rows of q `dots` is faster, called as often as it takes
//   tile<fields>(n, panel, quads, q, stride, more, sums, sums_stride)
//                the same sums, of n rows, from a panel that `open` made; added to those that are
//                there if `more`
//   kSlice       quads of a panel, a multiple of 16
//   open<fields>(lanes, quads, panel)
//                the digits, a byte each: [16 quads, field, quad, lane, column]; of quads that fill
//                up the last 16 the digits are 0
//   stream<fields>(all, factor, to)
//                to[i] = all[i] * factor for the rows of a block, past the caches; `to` is aligned
//   Session      what has to be there while these run
//   Vectors      what registers.h and yardsticks.h take
// Internal linkage, see shared/formats.h.
#pragma once

#include "multiply/levels.h"

namespace ternarize {
namespace {
namespace lanes {

// Where kTile is 0, nobody defines these.
template <int fields>
void open(const uint8_t* lanes, int64_t quads, uint8_t* panel);
template <int fields>
void tile(int64_t n, const uint8_t* panel, int64_t quads, const int8_t* q, int64_t stride,
          bool more, int32_t* sums, int64_t sums_stride);
template <int fields>
void stream(const float* all, float factor, float* to);

// ---------------------------------------------------------------------------------------------
// Sums of groups to results

TERNARIZE_INLINE Kind kind_of(const Scales& scales) { return scales.half ? Kind::F16 : Kind::F32; }

// all[token, i] += value * scale. Digits are trits + 1, so each of a group's sums has the sum of
// its q too much. Of three parts the sum of a short group fits in 32 bits, and its float is `value`:
// the products and the first sum of that are exact.
template <int fields, int parts>
TERNARIZE_INLINE void add_group(int64_t tokens, int64_t cols, const int32_t* sums,
                                const int32_t* excess, int64_t groups, const float* scale,
                                float* all) {
  constexpr int kRows = 16 * fields;
  constexpr int64_t kShort = 0x7fffffff / (127 * (65536 + 256 + 1));
  for (int64_t token = 0; token < tokens; ++token) {
    const int32_t less = excess[token * parts * groups];
    const int32_t* s = sums + token * parts * kRows;
    float* sum = all + token * kRows;
    if (parts == 1) {
      for (int i = 0; i < kRows; ++i) sum[i] += static_cast<float>(s[i] - less) * scale[i];
      continue;
    }
    const int32_t less1 = excess[(token * parts + 1) * groups];
    const int32_t less2 = excess[(token * parts + 2) * groups];
    if (cols <= kShort) {
      const auto whole = [](int32_t s0, int32_t s1, int32_t s2) {  // modulo 2^32
        return static_cast<uint32_t>(s0) + (static_cast<uint32_t>(s1) << 8) +
               (static_cast<uint32_t>(s2) << 16);
      };
      const uint32_t all_less = whole(less, less1, less2);
      for (int i = 0; i < kRows; ++i) {
        const uint32_t value = whole(s[i], s[kRows + i], s[2 * kRows + i]) - all_less;
        sum[i] += static_cast<float>(static_cast<int32_t>(value)) * scale[i];
      }
    } else {
      for (int i = 0; i < kRows; ++i) {
        const float value =
            value_of(s[i] - less, s[kRows + i] - less1, s[2 * kRows + i] - less2);
        sum[i] += value * scale[i];
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------
// The loops over blocks, tokens and groups

constexpr int64_t padded_quads(int64_t quads) { return ceil_div(quads, 16) * 16; }

// What is opened at a time: quads of one group of a block, or whole groups. A panel stays in a near
// cache while all tokens that are held meet it.
struct Slices {
  int64_t groups;  // in a panel
  int64_t quads;   // of each
};

Slices slices_of(const Lanes& x) {
  const int64_t fit = x.quads == 0 ? 1 : kSlice / padded_quads(x.group_quads);
  return fit > 0 ? Slices{fit, x.group_quads} : Slices{1, kSlice};
}

// Tokens whose sums are held at a time: they, and their q, should stay in the second cache.
int64_t held(const Levels& in) {
  const int64_t most = 256 / in.parts / kTokens * kTokens;
  return kTile > 0 ? smaller(ceil_div(in.tokens, kTokens) * kTokens, most) : kDirect;
}

struct Call {
  const Lanes& x;
  const Scales& scales;
  const Levels& in;
  Kind kind;
  void* out;
  int32_t* sums;  // [tokens, parts, rows of a block]
  float* all;     // [tokens, rows of a block]
  float* scale;   // [groups of a panel, rows of a block]
  uint8_t* panel;
};

// `n` <= kDirect, known to the compiler in each call of dots.
template <int fields>
TERNARIZE_INLINE void dots_of(int64_t n, const uint8_t* lanes, int64_t quads, const int8_t* q,
                              int64_t stride, int32_t* sums) {
  constexpr int kRows = 16 * fields;
  if (n == 1) return dots<fields, 1>(lanes, quads, q, stride, sums, kRows);
  if constexpr (kDirect >= 2)
    if (n == 2) return dots<fields, 2>(lanes, quads, q, stride, sums, kRows);
  if constexpr (kDirect >= 3)
    if (n == 3) return dots<fields, 3>(lanes, quads, q, stride, sums, kRows);
  if constexpr (kDirect >= 4)
    if (n == 4) return dots<fields, 4>(lanes, quads, q, stride, sums, kRows);
}

template <int fields>
void store_block(const Call& c, int64_t block, int64_t token, int64_t n) {
  constexpr int kRows = 16 * fields;
  const int64_t all = c.x.stored.rows, first = block * kRows, rows = smaller(kRows, all - first);
  // Rows of `out` lie far apart: to read all these lines before they are written takes long.
  if constexpr (kTile > 0) {
    float* to = static_cast<float*>(c.out) + token * all + first;
    if (n > kDirect && c.kind == Kind::F32 && rows == kRows && all % 16 == 0 &&
        reinterpret_cast<uintptr_t>(to) % 64 == 0) {
      for (int64_t i = 0; i < n; ++i)
        stream<fields>(c.all + i * kRows, c.in.factors[token + i], to + i * all);
      return;
    }
  }
  for (int64_t i = 0; i < n; ++i)
    store<kRows>(c.all + i * kRows, c.in.factors[token + i], rows, c.kind,
                 (token + i) * all + first, c.out);
}

// The block's product with the tokens [token, token + n), a few.
template <int fields, int parts>
void direct(const Call& c, const uint8_t* lanes, int64_t block, int64_t token, int64_t n) {
  constexpr int kRows = 16 * fields;
  const Lanes& x = c.x;
  const int64_t groups = x.stored.groups, stride = c.in.stride;
  const int8_t* q = c.in.q + token * parts * stride;
  const int32_t* excess = c.in.sums + token * parts * groups;
  std::memset(c.all, 0, static_cast<size_t>(n * kRows) * sizeof(float));
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t quads = x.quads_of(g), at = g * x.group_quads;
    for (int64_t row = 0; row < n * parts; row += kDirect)
      dots_of<fields>(smaller(kDirect, n * parts - row), lanes + at * 64, quads,
                      q + row * stride + at * 4, stride, c.sums + row * kRows);
    widen(kind_of(c.scales), c.scales.values, (block * groups + g) * kRows, kRows, c.scale);
    add_group<fields, parts>(n, x.cols_of(g), c.sums, excess + g, groups, c.scale, c.all);
  }
  store_block<fields>(c, block, token, n);
}

// The same with quads [from, from + slices.quads) of the groups [group, end), by a panel.
template <int fields, int parts>
void add_slice(const Call& c, const uint8_t* lanes, int64_t block, int64_t token, int64_t n,
               int64_t group, int64_t end, int64_t from, int64_t most) {
  constexpr int kRows = 16 * fields;
  const Lanes& x = c.x;
  const int64_t groups = x.stored.groups, stride = c.in.stride;
  uint8_t* to = c.panel;
  for (int64_t g = group; g < end; ++g) {
    const int64_t quads = smaller(most, x.quads_of(g) - from);
    open<fields>(lanes + (g * x.group_quads + from) * 64, quads, to);
    to += padded_quads(quads) * fields * 64;
    widen(kind_of(c.scales), c.scales.values, (block * groups + g) * kRows, kRows,
          c.scale + (g - group) * kRows);
  }
  for (int64_t i = 0; i < n; i += kTile) {
    const int64_t tokens = smaller(kTile, n - i), row = (token + i) * parts;
    const uint8_t* panel = c.panel;
    for (int64_t g = group; g < end; ++g) {
      const int64_t quads = smaller(most, x.quads_of(g) - from);
      const bool whole = quads == x.quads_of(g);
      int32_t* sums = whole ? c.sums : c.sums + i * parts * kRows;
      const int8_t* q = c.in.q + row * stride + (g * x.group_quads + from) * 4;
      for (int p = 0; p < parts; ++p)
        tile<fields>(tokens, panel, quads, q + p * stride, parts * stride, from > 0,
                     sums + p * kRows, parts * kRows);
      if (from + quads == x.quads_of(g))
        add_group<fields, parts>(tokens, x.cols_of(g), sums, c.in.sums + row * groups + g, groups,
                                 c.scale + (g - group) * kRows, c.all + i * kRows);
      panel += padded_quads(quads) * fields * 64;
    }
  }
}

template <int fields, int parts>
void multiply_as(const Call& c, const uint8_t* lanes, int64_t token, int64_t token_end,
                 int64_t block, int64_t block_end) {
  const int64_t size = c.x.quads * 64;  // bytes of a block
  if constexpr (kTile > 0) {
    if ((token_end - token) * parts > kFew) {
      const Slices slices = slices_of(c.x);
      const int64_t groups = c.x.stored.groups, most = held(c.in);
      for (; token < token_end; token += most) {
        const int64_t n = smaller(most, token_end - token);
        for (int64_t b = block; b < block_end; ++b) {
          std::memset(c.all, 0, static_cast<size_t>(n * c.x.block) * sizeof(float));
          for (int64_t g = 0; g < groups; g += slices.groups)
            for (int64_t from = 0; from < c.x.quads_of(g); from += slices.quads)
              add_slice<fields, parts>(c, lanes + b * size, b, token, n, g,
                                       smaller(groups, g + slices.groups), from, slices.quads);
          store_block<fields>(c, b, token, n);
        }
      }
      return;
    }
  }
  // whole tokens, and as many as dots takes at once; of three parts one, in one call or more
  constexpr int64_t kStep = kDirect / parts > 1 ? kDirect / parts : 1;
  for (; block < block_end; ++block)
    for (int64_t t = token; t < token_end; t += kStep)
      direct<fields, parts>(c, lanes + block * size, block, t, smaller(kStep, token_end - t));
}

int64_t scratch(const Lanes& x, const Levels& in) {
  const int64_t panel = kSlice * static_cast<int64_t>(x.form) * 64;
  return (held(in) * (in.parts + 1) + slices_of(x).groups) * x.block * 4 + panel;
}

void multiply(const Lanes& x, const uint8_t* lanes, const Scales& scales, const Levels& in,
              int64_t token, int64_t token_end, int64_t block, int64_t block_end, Kind kind,
              void* out, void* scratch) {
  auto* sums = static_cast<int32_t*>(scratch);
  auto* all = reinterpret_cast<float*>(sums + held(in) * in.parts * x.block);
  auto* scale = all + held(in) * x.block;
  auto* panel = reinterpret_cast<uint8_t*>(scale + slices_of(x).groups * x.block);
  const Call call{x, scales, in, kind, out, sums, all, scale, panel};
  const bool three = in.parts == 3;
  [[maybe_unused]] const Session session{};
  if (x.form == Form::Lanes2)
    (three ? multiply_as<4, 3> : multiply_as<4, 1>)(call, lanes, token, token_end, block,
                                                    block_end);
  else if constexpr (kLanes3)
    (three ? multiply_as<5, 3> : multiply_as<5, 1>)(call, lanes, token, token_end, block,
                                                    block_end);
}

}  // namespace lanes
}  // namespace
}  // namespace ternarize
