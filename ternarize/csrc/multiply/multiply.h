// multiply/: products y = x W^T straight from packed weights: of trits in lanes (pack/lanes.h), and of
// int8 and int4 weights as they are stored (formats/int8.md, int4.md), which need no other order.
//
// multiply.cpp has the threads. Inputs become integers (levels.h), then ranges of blocks or of rows are
// multiplied (lanes_loops.h, int8_loops.h): compiled for each instruction set around the loops of its
// own file. All of them, with any number of threads, give the same bits, because everything up to a
// group's sum is integer arithmetic, and the float operations after it have one order (see Levels).
//
// Memory is the caller's, of the sizes below; nothing outside it is read or written. Threads may call
// these at once. Nothing fails but the allocation of scratch, by std::bad_alloc.
#pragma once

#include "pack/lanes.h"

namespace ternarize {

// How an input x becomes integers, and their sums the result. All floats are of 32 bits.
//
// One part (activations "int8"):
//     q = round(127 x / absmax)                    factor = absmax / 127
// Three parts (float activations), x as a number of 24 bits with a fixed point, cut in digits:
//     q2 65536 + q1 256 + q0 = round(x 2^k)        factor = 2^-k
// with the largest k <= 126 that leaves |x 2^k| <= 127 (65536 + 256 + 1), and digits -128..127.
// Rounding is to nearest even, 127 x is rounded before it is divided, absmax is max |x| of a token,
// and q is 0 where it is 0. Of a token with a number that is not finite (or whose 127 absmax is
// not), the factor is NaN.
//
// Then, for each row, s_p being the sum over a group of trit * q_p (exact):
//     y = (sum over groups, in order, of value * scale) * factor
//     value = float(s)        or        float(s2) 65536 + (float(s1) 256 + float(s0))
struct Levels {
  int64_t tokens;
  int parts;
  int64_t stride;  // bytes from one row of q to the next
  // q[token * parts + p, column], columns padded with 0 to the quads of the layout. `stride` bytes are
  // readable from any column of it, and rows up to a multiple of kTokens tokens; what is there beyond
  // the numbers is multiplied by digits that are 0, or gives rows that are not kept.
  int8_t* q;
  int32_t* sums;   // [token * parts + p, group]: the sum of q
  float* factors;  // [token]
};
constexpr int64_t kTokens = 32;

// Scales in the order of the blocks: [block, group, row of the block], float16 (as bits) or float32.
struct Scales {
  const void* values;
  bool half;
};

struct Int8Matrix {
  Lanes lanes;            // of any form: how Levels lie that meet this matrix
  const int8_t* weights;  // [row - first, column]
  const void* scales;     // [row / rows_per_scale, group]
  Kind scale_kind;
  int64_t rows_per_scale;
  const uint8_t* halves = nullptr;  // of int4: [row, half_width], and `weights` is null
  int64_t first = 0;

  TERNARIZE_INLINE const int8_t* row(int64_t at) const { return weights + (at - first) * cols(); }
  TERNARIZE_INLINE int64_t rows() const { return lanes.stored.rows; }
  TERNARIZE_INLINE int64_t cols() const { return lanes.stored.cols; }
};

// Bytes of a row of int4: each group is filled up to whole bytes.
TERNARIZE_INLINE int64_t half_width(const Lanes& x) {
  const int64_t groups = x.stored.groups;
  return groups == 0 ? 0 : (groups - 1) * ((x.stored.group + 1) / 2) + (x.cols_of(groups - 1) + 1) / 2;
}

// Levels in another order, for many tokens: kLanes tokens of one part side by side.
//
//   byte (block of tokens b, part p, group g, quad k, token i in 0..15, column j in 0..3)
//
// with the quads of each group filled up to 16, all of what is filled up being multiplied as 0.
// Weights come straight from memory, four of a row for all tokens.
constexpr int64_t kLanes = 16;

// Columns of a row of a panel, and of its groups but the last.
TERNARIZE_INLINE int64_t panel_group(const Lanes& x) { return (x.group_quads + 15) / 16 * 64; }
TERNARIZE_INLINE int64_t panel_cols(const Lanes& x) {
  const int64_t last = x.stored.groups - 1;
  return last < 0 ? 0 : last * panel_group(x) + (x.quads_of(last) + 15) / 16 * 64;
}
TERNARIZE_INLINE int64_t panel_size(const Lanes& x, int parts) {
  return panel_cols(x) * kLanes * parts;
}

// The functions of one instruction set. Scratch is aligned to 64 bytes, and its size a multiple of 64.
struct Products {
  bool lanes3;  // whether it multiplies Form::Lanes3

  // Rounds the tokens [first, last) of x.
  void (*quantize)(const Lanes&, Kind, const void* x, int64_t first, int64_t last, const Levels&);

  // Of lanes: bytes that `multiply` needs for itself; and out[token, row], rounded to nearest even, of
  // the tokens [token, token_end) and of the rows of the blocks [block, block_end). `token` is a
  // multiple of kTokens.
  int64_t (*scratch)(const Lanes&, const Levels&);
  void (*multiply)(const Lanes&, const uint8_t* lanes, const Scales&, const Levels&, int64_t token,
                   int64_t token_end, int64_t block, int64_t block_end, Kind, void* out,
                   void* scratch);

  // Of int8 weights: more tokens than these come as panels, 0: never; the panels of the blocks of
  // tokens [first, last); bytes that `int8_multiply` needs; and out[token, row] of all tokens and of
  // the rows [row, row_end). `panels` is null where there are few tokens. Of int4 `int4_open` first
  // makes int8 weights of a number of rows; behind them 64 bytes are readable.
  int64_t int8_few;
  void (*int8_arrange)(const Lanes&, const Levels&, int64_t first, int64_t last, uint8_t* panels);
  int64_t (*int8_scratch)(const Int8Matrix&);
  void (*int8_multiply)(const Int8Matrix&, const Levels&, const uint8_t* panels, int64_t row,
                        int64_t row_end, Kind, void* out, void* scratch);
  void (*int4_open)(const Lanes&, const uint8_t* halves, int64_t rows, int8_t* out);

  // Yardsticks for benchmarks: reads every byte of n and returns something that depends on them; does
  // nothing but dot products of 8 bits and returns how many multiplications (0: it has none).
  uint64_t (*read)(const uint8_t* bytes, int64_t n);
  int64_t (*dot_peak)(int64_t rounds);
};

extern const Products kPortableProducts;
extern const Products kAvx2Products;  // x86-64 builds only, as the next
extern const Products kAvxVnniProducts;
extern const Products kAvx512Products;
extern const Products kAmxProducts;
// AArch64 builds only; compared with the others under an emulator, never timed.
extern const Products kNeonProducts;

// A matrix in lanes, and where its product goes: out (tokens, rows).
struct Matrix {
  Lanes x;
  const uint8_t* lanes;
  Scales scales;
  void* out;
};

// y = x W^T for at least one matrix. All have the form, columns and groups of the first, so that x,
// `in` (tokens, cols), is rounded once for all; `in` and `out` are of one kind; parts as in Levels.
// The instruction set in use must have the form.
void product(const Matrix* matrices, int count, Kind, int parts, int64_t tokens, const void* in,
             int threads);

// The same of int8 or int4 weights, to out (tokens, rows).
void int8_product(const Int8Matrix&, Kind, int parts, int64_t tokens, const void* in, void* out,
                  int threads);

// The yardsticks on threads: each reads its part of the bytes, or does all rounds.
uint64_t read_all(const uint8_t* bytes, int64_t n, int threads);
int64_t dot_peak(int64_t rounds, int threads);

}  // namespace ternarize
