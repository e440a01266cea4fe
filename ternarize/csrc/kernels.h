// The contract of the compiled core.
//
// Layers:  bind.cpp (Python: checks every size) -> core.cpp (threads) -> kernels.inc (one row range).
// kernels.inc is compiled once for each instruction set (portable.cpp, avx2.cpp, avx512.cpp) and the
// best one that the CPU can run is chosen once, in core.cpp. All of them, with any number of threads,
// give the same bytes and the same bits: sums have one fixed order, nothing is contracted to fused
// multiply-adds, and subnormal numbers are kept.
//
// Every buffer is row-major and dense, is allocated by the caller, and has the size that Layout says.
// No function throws, keeps state or writes outside its output. Packed bytes and weights may hold
// anything: they are read as untrusted input.
#pragma once

#include <cstddef>
#include <cstdint>

#include "decode.h"

namespace ternarize {

// Bits of a weight or of an output. 16-bit kinds are handled as their bit patterns.
enum class Kind { F32, BF16, F16 };
constexpr TERNARIZE_INLINE int64_t size_of(Kind kind) { return kind == Kind::F32 ? 4 : 2; }  // bytes

// How a float tensor becomes trits; the formulas stand in kernels.inc.
enum class Method { Absmean, Twn, Itf };

// A matrix of trits and how it is cut into groups along its columns.
struct Layout {
  int64_t rows;
  int64_t cols;
  int64_t group;   // weights in a group; the last group of a row may be shorter
  int64_t groups;  // groups in a row
  int64_t width;   // packed bytes in a row: each group is padded to whole bytes
};

// How far a row's trits are from its weights: sum (w - scale trit)^2, sum w^2, and nonzero trits.
struct Distance {
  double error;
  double energy;
  int64_t nonzero;
};

// The results of a pass over a tensor that has one scale.
struct Total {
  double sum;
  int64_t count;
};

constexpr int64_t kNone = -1;  // "no such index", of the functions that return the first bad one

// The functions of one instruction set. They work on the rows [first, last) of the matrix; the
// pointers are those of the whole matrix.
struct Kernels {
  const char* name;

  // trits -> packed. Returns the flat index of the first value that is not -1, 0 or +1, or kNone.
  int64_t (*pack)(const Layout&, int64_t first, int64_t last, const int8_t* trits, uint8_t* packed);

  // packed -> trits. Returns the flat index of the first byte that is not a code (243..255) or whose
  // padding is not zero trits, or kNone. Where one is found the trits are unspecified.
  int64_t (*unpack)(const Layout&, int64_t first, int64_t last, const uint8_t* packed,
                    int8_t* trits);

  // The same test without the trits; nonzero[row, group] = 1 where a trit of the group is not 0.
  int64_t (*check)(const Layout&, int64_t first, int64_t last, const uint8_t* packed,
                   uint8_t* nonzero);

  // out = trit * scale, rounded to nearest even. Row r has the scales of row r / rows_per_scale.
  // Bytes are not checked; a byte that is not a code gives some trits.
  void (*dequantize)(const Layout&, int64_t first, int64_t last, const uint8_t* packed,
                     const float* scales, int64_t rows_per_scale, Kind, void* out);

  // weights -> trits and scales[row, group]. Returns the flat index of the first weight that is not
  // finite, or kNone. Where one is found the outputs are unspecified.
  int64_t (*ternarize)(Method, Kind, const Layout&, int64_t first, int64_t last,
                       const void* weights, int8_t* trits, double* scales);

  // Tensors with one scale need passes over the whole: the index of the first weight that is not
  // finite; sum and count of each row's |w| above the threshold (of all, if it is negative); and the
  // trits of a threshold.
  int64_t (*first_not_finite)(Kind, const Layout&, int64_t first, int64_t last,
                              const void* weights);
  void (*row_totals)(Kind, const Layout&, int64_t first, int64_t last, const void* weights,
                     double threshold, Total* totals);
  void (*cut)(Kind, const Layout&, int64_t first, int64_t last, const void* weights,
              double threshold, int8_t* trits);

  // The sum of n numbers in the fixed order, n values that are `stride` doubles apart.
  double (*fixed_sum)(const double* values, int64_t n, int64_t stride);

  // True if all nonzero |w| of each group (one_scale: of all rows together) are equal: then trits
  // are the signs and scales that magnitude, or 0. False ends early, with outputs unspecified.
  bool (*levels)(Kind, const Layout&, int64_t first, int64_t last, const void* weights,
                 int8_t* trits, double* scales);
  // The same where the magnitude is given; and the first magnitude that is not 0: 0 if all are, -1
  // if it is not finite.
  bool (*levels_of)(Kind, const Layout&, int64_t first, int64_t last, const void* weights,
                    double magnitude, int8_t* trits);
  double (*first_magnitude)(Kind, const Layout&, const void* weights);

  // Each row's distance, of what `ternarize` gave. Row r has the scales of row r / rows_per_scale.
  // Sums are in the fixed order, in float within blocks of 128 and in double above.
  void (*distances)(Kind, const Layout&, int64_t first, int64_t last, const void* weights,
                    const int8_t* trits, const double* scales, int64_t rows_per_scale,
                    Distance* distances);

  Decoding decoding;
};

extern const Kernels kPortable;
extern const Kernels kAvx2;    // x86-64 builds only, as the next
extern const Kernels kAvx512;

}  // namespace ternarize
