// ternarize/: from weights to trits and scales, and how far they are from each other. methods.h has
// the formulas, sums.h the order of sums, rows.h what is done with a range of rows. The contract is
// that of pack/pack.h.
#pragma once

#include "pack/pack.h"

namespace ternarize {

// How weights become trits; the formulas stand in methods.h.
enum class Method { Absmean, Twn, Itf };

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

// The functions of one instruction set for one Kind of weights, of the rows [first, last) of a matrix;
// the pointers are those of the whole matrix.
struct Ternarizing {
  // weights -> trits and scales[row, group]. Returns the flat index of the first weight that is not
  // finite, or kNone. Where one is found the outputs are unspecified.
  int64_t (*ternarize)(Method, const Layout&, int64_t first, int64_t last, const void* weights,
                       int8_t* trits, double* scales);

  // Tensors with one scale need passes over the whole: the index of the first weight that is not
  // finite; sum and count of each row's |w| above the threshold (of all, if it is negative); and the
  // trits of a threshold.
  int64_t (*first_not_finite)(const Layout&, int64_t first, int64_t last, const void* weights);
  void (*row_totals)(const Layout&, int64_t first, int64_t last, const void* weights,
                     double threshold, Total* totals);
  void (*cut)(const Layout&, int64_t first, int64_t last, const void* weights, double threshold,
              int8_t* trits);

  // True if all nonzero |w| of each group are equal: then trits are the signs and scales that
  // magnitude, or 0. False ends early, with outputs unspecified.
  bool (*levels)(const Layout&, int64_t first, int64_t last, const void* weights, int8_t* trits,
                 double* scales);
  // The same where the magnitude is given; and the first magnitude that is not 0: 0 if all are, -1
  // if it is not finite.
  bool (*levels_of)(const Layout&, int64_t first, int64_t last, const void* weights,
                    double magnitude, int8_t* trits);
  double (*first_magnitude)(const Layout&, const void* weights);

  // Each row's distance, of what `ternarize` gave. Row r has the scales of row r / rows_per_scale.
  // Sums are in the fixed order, in float within blocks of 128 and in double above.
  void (*distances)(const Layout&, int64_t first, int64_t last, const void* weights,
                    const int8_t* trits, const double* scales, int64_t rows_per_scale,
                    Distance* distances);

  // `ternarize`, `Packing::pack` and `distances` in one pass over each group, with the same bytes and
  // bits; a group whose scale no float holds becomes 0. `trits` is scratch for the longest group.
  int64_t (*packed)(Method, const Layout&, int64_t first, int64_t last, const void* weights,
                    uint8_t* packed, double* scales, Distance* distances, int8_t* trits);
};

// Each does what its namesake above does, for all rows.
int64_t ternarize(Method, Kind, const Layout&, const void* weights, int8_t* trits, double* scales,
                  int threads);
bool levels(Kind, const Layout&, const void* weights, int8_t* trits, double* scales, int threads);

// Of the whole matrix; `rows` is scratch for one Distance per row.
Distance distance(Kind, const Layout&, const void* weights, const int8_t* trits,
                  const double* scales, int64_t scale_rows, Distance* rows, int threads);

// weights -> packed, scales and the distance of the whole matrix, group by group; returns as
// `ternarize` does. `rows` is scratch for one Distance per row.
int64_t ternarize_packed(Method, Kind, const Layout&, const void* weights, uint8_t* packed,
                         double* scales, Distance* rows, Distance* distance, int threads);

// One scale for the matrix. `totals` is scratch for one Total per row.
int64_t ternarize_tensor(Method, Kind, const Layout&, const void* weights, int8_t* trits,
                         double* scale, Total* totals, int threads);
bool levels_tensor(Kind, const Layout&, const void* weights, int8_t* trits, double* scale,
                   int threads);

}  // namespace ternarize
