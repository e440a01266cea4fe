// Lanes: the order in which trits are multiplied. Made when a matrix is loaded, never stored.
#pragma once

#include "pack/pack.h"

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
// The same for one block: `rows` of them, all of its own or those that are left. Bytes are not checked;
// scratch has block_scratch bytes.
int64_t block_scratch(const Lanes&);
void block_to_lanes(const Lanes&, const uint8_t* packed, int64_t rows, uint8_t* lanes,
                    uint8_t* scratch);
// The inverse. Returns the flat index of the first weight whose digit is none, or kNone.
int64_t from_lanes(const Lanes&, const uint8_t* lanes, uint8_t* packed, int threads);

}  // namespace ternarize
