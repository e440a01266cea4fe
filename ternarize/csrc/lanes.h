// The contract of the products: run-time layouts, and y = x W^T straight from them.
//
// Layers:  bind.cpp -> lanes.cpp (layouts, threads) -> products.inc (a range of blocks).
// products.inc is compiled for each instruction set around the loops of products_*.cpp. All of them,
// with any number of threads, give the same bits, because everything up to a group's sum is integer
// arithmetic, and the float operations after it have one order (see Levels).
#pragma once

#include "kernels.h"

namespace ternarize {

// A run-time layout: trits in the order in which vectors of 64 bytes multiply them.
//
//   byte (block b, quad k, lane i in 0..15, column j in 0..3) holds the trits of column j of quad k in
//   the rows  16 (fields b + f) + i,  f = 0..fields-1,  as the sum of digit_f power_f
//
// with digit = trit + 1, and the powers
//
//   Lanes2   1, 4, 16, 64       4 fields: 2 bits a weight, for any CPU
//   Lanes3   1, 3, 9, 28, 84    5 fields: 1.6 bits, for those that can look up bytes in tables of 64
//
// (28 instead of 27: then what v / 4 is tells the upper two digits.) A quad is four consecutive columns
// of one group: groups are padded to whole quads, and rows to whole blocks of 16 fields, with trits
// that are 0. The bytes lie in the order block, quad, lane, column. So one instruction multiplies each
// lane's four trits of a field by the same four activations and adds them up, and a group ends where
// a vector ends.
enum class Form { Lanes2 = 4, Lanes3 = 5 };  // the value is the number of fields

struct Lanes {
  Form form;
  Layout stored;
  int64_t block;        // rows in a block: 16 fields
  int64_t blocks;
  int64_t group_quads;  // quads of a group; the last group of a row may have fewer
  int64_t quads;        // quads of a row, all its groups together

  TERNARIZE_INLINE int64_t size() const { return blocks * quads * 64; }
  // Quads, and columns, of group g.
  TERNARIZE_INLINE int64_t quads_of(int64_t g) const {
    const int64_t left = quads - g * group_quads;
    return left < group_quads ? left : group_quads;
  }
  TERNARIZE_INLINE int64_t cols_of(int64_t g) const {
    const int64_t left = stored.cols - g * stored.group;
    return left < stored.group ? left : stored.group;
  }
};

// Longer groups could overflow the sums of 32 bits.
constexpr int64_t kLongestGroup = 1 << 16;

Lanes lanes_of(Form, const Layout&);

// Asks the system for large pages for memory that is not used yet: reading it is faster then.
void ask_for_large_pages(uint8_t* bytes, int64_t n);

// Stored bytes (formats/base3.md) -> lanes. Returns what unpack does: the flat index of a byte that
// is not a code or has padding other than zero trits (the lowest one), or kNone.
int64_t to_lanes(const Lanes&, const uint8_t* packed, uint8_t* lanes, int threads);
// The inverse. Returns the flat index of the first weight whose digit is none, or kNone.
int64_t from_lanes(const Lanes&, const uint8_t* lanes, uint8_t* packed, int threads);

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
  // q[token * parts + p, column], columns padded with 0 to the quads of the layout, and `stride`
  // bytes readable from any column of it; rows up to a multiple of kTokens tokens exist.
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

// The functions of one instruction set.
struct Products {
  bool lanes3;  // whether it multiplies Form::Lanes3
  void (*quantize)(const Lanes&, Kind, const void* x, int64_t first, int64_t last, const Levels&);
  // Bytes that `multiply` needs for itself, a multiple of 64.
  int64_t (*scratch)(const Lanes&, const Levels&);
  // out[token, row], rounded to nearest even, of the tokens [token, token_end) and of the rows of
  // the blocks [block, block_end). `token` is a multiple of kTokens. Scratch is aligned to 64 bytes.
  void (*multiply)(const Lanes&, const uint8_t* lanes, const Scales&, const Levels&, int64_t token,
                   int64_t token_end, int64_t block, int64_t block_end, Kind, void* out,
                   void* scratch);

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

// The yardsticks on threads: each reads its part of the bytes, or does all rounds.
uint64_t read_all(const uint8_t* bytes, int64_t n, int threads);
int64_t dot_peak(int64_t rounds, int threads);

}  // namespace ternarize
