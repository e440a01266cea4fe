// The contract of the products with int8 weights: y = x W^T straight from the stored bytes
// (formats/int8.md), which need no other order.
//
// Layers:  bind.cpp -> int8.cpp (threads) -> int8_products.inc (a range of rows).
// Inputs become integers as in lanes.h (Levels), and what is computed is what is written there with W
// in place of the trits. So all variants, with any number of threads, give the same bits.
#pragma once

#include "lanes.h"

namespace ternarize {

struct Int8Matrix {
  Lanes lanes;            // of any form: how Levels lie that meet this matrix
  const int8_t* weights;  // [row, column]
  const void* scales;     // [row / rows_per_scale, group]
  Kind scale_kind;
  int64_t rows_per_scale;

  TERNARIZE_INLINE int64_t rows() const { return lanes.stored.rows; }
  TERNARIZE_INLINE int64_t cols() const { return lanes.stored.cols; }
};

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

// The functions of one instruction set.
struct Int8Products {
  // More tokens than these come as panels; 0: never.
  int64_t few;
  // Makes the panels of the blocks of tokens [first, last).
  void (*arrange)(const Lanes&, const Levels&, int64_t first, int64_t last, uint8_t* panels);
  // Bytes that `multiply` needs for itself, a multiple of 64.
  int64_t (*scratch)(const Int8Matrix&);
  // out[token, row], rounded to nearest even, of all tokens and of the rows [row, row_end). `panels`
  // is null where there are few tokens. Scratch is aligned to 64 bytes.
  void (*multiply)(const Int8Matrix&, const Levels&, const uint8_t* panels, int64_t row,
                   int64_t row_end, Kind, void* out, void* scratch);
};

extern const Int8Products kPortableInt8;
extern const Int8Products kAvx2Int8;  // x86-64 builds only, as the next
extern const Int8Products kAvxVnniInt8;
extern const Int8Products kAvx512Int8;
extern const Int8Products kAmxInt8;

// y = x W^T: out (tokens, rows) and x (tokens, cols) of the same kind; parts as in Levels.
void int8_product(const Int8Matrix&, Kind, int parts, int64_t tokens, const void* x, void* out,
                  int threads);

}  // namespace ternarize
