// Rows of bytes and their chunks, coded and decoded.
#pragma once

#include <vector>

#include "entropy/entropy.h"

namespace ternarize {

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

// How many of the chunks that are left are decoded at once: about as many each time.
inline int64_t rans_at_once(int64_t left) {
  return ceil_div(left, ceil_div(left, kRansTogether));
}

// Columns that are next to each other.
struct Run {
  int64_t first;
  int64_t count;
};

// The columns of one class.
struct ClassColumns {
  std::vector<Run> runs;
  int64_t count = 0;    // columns of all runs
  int64_t longest = 0;  // of the longest run
};

// Decodes chunks that follow each other, several at once; for one thread. What `x` and `table` point to
// is kept by the caller, and so is `ordered`, memory that it uses; `table` is as of `rans_decode`.
class RansDecoder {
 public:
  RansDecoder(const Classed& x, const uint32_t* table, std::vector<uint8_t>& ordered);
  // Decodes `count` chunks from `chunk` on, at most kRansTogether, into their rows. They lie in `coded`,
  // one behind the other; chunk + i takes ends[i + 1] - ends[i] bytes. Returns the first that is damaged,
  // or kNone.
  int64_t decode(int64_t chunk, int64_t count, const uint8_t* coded, const int64_t* ends,
                 uint8_t* rows);

 private:
  Classed x_;
  const uint32_t* table_;
  std::vector<ClassColumns> columns_;
  std::vector<uint8_t>& ordered_;
};

// Sets the part of `table` that is of one class, kRansTotal slots, from the frequencies of 256 bytes, which
// add up to that.
void rans_slots(const uint16_t* frequencies, uint32_t* table);

// Decodes chunks that lie one behind the other, chunk i from ends[i] to ends[i + 1], and returns the
// first that is damaged, or kNone. `table` (count, kRansTotal) has for each slot its byte, frequency - 1
// (from bit 8 on) and how far it is from the first slot of that byte (from bit 20 on).
int64_t rans_decode(const uint8_t* coded, const int64_t* ends, const Classed& x,
                    const uint32_t* table, uint8_t* bytes, int threads);

}  // namespace ternarize
