// entropy/: rows of bytes in as few bits as their frequencies allow (formats/rans.md). Integers: every
// CPU and any number of threads give the same bytes.
#pragma once

#include "shared/formats.h"

namespace ternarize {

constexpr int kRansLanes = 8;              // states that take turns
constexpr int kRansBits = 12;              // frequencies of a class add up to 2^12
constexpr int kRansTotal = 1 << kRansBits;
constexpr int64_t kRansHead = 4 * kRansLanes;  // bytes of a chunk in front of its words

// Rows of bytes that are coded in chunks. The columns of a row are of classes, each with a table of its
// own; of a chunk the bytes of class 0 come first, row after row, then those of class 1, and so on.
struct Classed {
  int64_t rows;
  int64_t width;
  int64_t chunk_rows;
  const uint8_t* classes;  // (width): 0 to count - 1
  int count;

  int64_t chunks() const { return ceil_div(rows, chunk_rows); }
  int64_t rows_of(int64_t chunk) const {
    return smaller(chunk_rows, rows - chunk * chunk_rows);
  }
};

// How often each byte occurs in each class: counts (count, 256), from zero on.
void rans_count(const uint8_t* bytes, const Classed& x, int64_t* counts, int threads);

// Codes each chunk into its slot of `out`, `slot` bytes apart, and says how many bytes it has taken.
// `frequencies` (count, 256) add up to kRansTotal in each class, and are at least 1 where a byte occurs.
// A slot has kRansHead bytes and two for each byte that is coded.
void rans_encode(const uint8_t* bytes, const Classed& x, const uint16_t* frequencies, uint8_t* out,
                 int64_t slot, int32_t* sizes, int threads);

// Decodes chunks that lie one behind the other, chunk i from ends[i] to ends[i + 1], and returns the
// first that is damaged, or kNone. `table` (count, kRansTotal) has for each slot its byte, frequency - 1
// (from bit 8 on) and how far it is from the first slot of that byte (from bit 20 on).
int64_t rans_decode(const uint8_t* coded, const int64_t* ends, const Classed& x,
                    const uint32_t* table, uint8_t* bytes, int threads);

}  // namespace ternarize
