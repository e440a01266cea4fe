// entropy/: rows of bytes in as few bits as their frequencies allow (formats/rans.md). Integers: every
// CPU and any number of threads give the same bytes.
#pragma once

#include "shared/formats.h"

namespace ternarize {

constexpr int kRansLanes = 8;              // states that take turns
constexpr int kRansBits = 12;              // frequencies of a class add up to 2^12
constexpr int kRansTotal = 1 << kRansBits;
constexpr int64_t kRansHead = 4 * kRansLanes;  // bytes of a chunk in front of its words
constexpr uint32_t kRansLeast = 1u << 16;  // of a state; below it takes a word of 16 bits
constexpr int kRansTogether = 8;           // chunks that are decoded at once

// How far the decoding of a chunk is: the bytes that come next, the words that are left, the states.
struct RansChunk {
  uint8_t* bytes;
  const uint8_t* at;
  const uint8_t* end;
  uint32_t states[kRansLanes];
};

// The functions of one instruction set.
struct Entropy {
  // Takes rounds of one byte from each lane, the first in lane 0, from `count` chunks (1 to
  // kRansTogether), while each has 16 bytes of words left; n bytes at most. Returns how many it has taken
  // from each (perhaps none): `at` and `states` are after them, `bytes` stays.
  int64_t (*take_rounds)(RansChunk* chunks, int count, int64_t n, const uint32_t* table);
};

}  // namespace ternarize
