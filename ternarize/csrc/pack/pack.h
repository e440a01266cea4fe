// pack/: how trits lie in bytes. As they are stored, in base 3 (formats/base3.md; base3.h has the
// arithmetic), and as they are multiplied, in lanes (lanes.h).
//
// For all folders but multiply/ and decode/, which have their own words on it: every buffer is
// row-major and dense, is allocated by the caller, and has the size that Layout says. No function
// throws, keeps state or writes outside its output, and any may be called by many threads at once.
// Packed bytes may hold anything: they are read as untrusted input, and so are weights.
//
// What works on rows is compiled once for each instruction set (cpus/), and the best one that the CPU
// can run is chosen once. All of them, with any number of threads, give the same bytes and the same
// bits: sums have one fixed order, nothing is contracted to fused multiply-adds, and subnormal numbers
// are kept.
#pragma once

#include "shared/formats.h"

namespace ternarize {

// A matrix of trits and how it is cut into groups along its columns.
struct Layout {
  int64_t rows;
  int64_t cols;
  int64_t group;   // weights in a group; the last group of a row may be shorter
  int64_t groups;  // groups in a row
  int64_t width;   // packed bytes in a row: each group is padded to whole bytes
};

// The layout of a matrix. group_size N > 0: N consecutive weights of a row share a scale; -1: the
// row; 0: the matrix, which is packed like -1.
Layout layout_of(int64_t rows, int64_t cols, int64_t group_size);

// The functions of one instruction set. They work on the rows [first, last) of the matrix; the
// pointers are those of the whole matrix.
struct Packing {
  // trits -> packed. Returns the flat index of the first value that is not -1, 0 or +1, or kNone.
  int64_t (*pack)(const Layout&, int64_t first, int64_t last, const int8_t* trits, uint8_t* packed);

  // packed -> trits. Returns the flat index of the first byte that is not a code (243..255) or whose
  // padding is not zero trits, or kNone. Where one is found the trits are unspecified.
  int64_t (*unpack)(const Layout&, int64_t first, int64_t last, const uint8_t* packed,
                    int8_t* trits);

  // The same test without the trits; nonzero[row, group] = 1 where a trit of the group is not 0.
  int64_t (*check)(const Layout&, int64_t first, int64_t last, const uint8_t* packed,
                   uint8_t* nonzero);

  // out = trit * scale, rounded to nearest even, for each Kind. Row r has the scales of row
  // r / rows_per_scale. Bytes are not checked; a byte that is not a code gives some trits.
  void (*dequantize[3])(const Layout&, int64_t first, int64_t last, const uint8_t* packed,
                        const float* scales, int64_t rows_per_scale, void* out);
};

// Each does what its namesake above does, for all rows; scale_rows divides them.
int64_t pack(const Layout&, const int8_t* trits, uint8_t* packed, int threads);
int64_t unpack(const Layout&, const uint8_t* packed, int8_t* trits, int threads);
int64_t check(const Layout&, const uint8_t* packed, uint8_t* nonzero, int threads);
void dequantize(const Layout&, const uint8_t* packed, const float* scales, int64_t scale_rows, Kind,
                void* out, int threads);

}  // namespace ternarize
