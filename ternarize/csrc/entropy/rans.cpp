#include "entropy/rans.h"

#include <mutex>

#include "cpus/cpus.h"
#include "shared/parallel.h"

namespace ternarize {

namespace {

// About how many weights a chunk is worth: a byte that is coded as 8.
int64_t work_of(const Classed& x) { return 8 * smaller(x.chunk_rows, x.rows) * x.width; }

std::vector<ClassColumns> columns_of(const Classed& x) {
  std::vector<ClassColumns> found(static_cast<size_t>(x.count));
  for (int64_t col = 0; col < x.width; ++col) {
    ClassColumns& one = found[x.classes[col]];
    if (!one.runs.empty() && one.runs.back().first + one.runs.back().count == col)
      ++one.runs.back().count;
    else
      one.runs.push_back({col, 1});
    ++one.count;
    if (one.runs.back().count > one.longest) one.longest = one.runs.back().count;
  }
  return found;
}

// The bytes of rows in the order in which they are coded.
void in_order(const Classed& x, const std::vector<ClassColumns>& columns, const uint8_t* rows,
              int64_t count, uint8_t* ordered) {
  for (const ClassColumns& those : columns)
    for (int64_t row = 0; row < count; ++row)
      for (const Run& run : those.runs) {
        std::memcpy(ordered, rows + row * x.width + run.first, static_cast<size_t>(run.count));
        ordered += run.count;
      }
}

constexpr int64_t kMoved = 32;  // bytes of one move of registers

// The inverse; `end` is where what is written ends. A short run of class 0 is copied with what comes behind
// it, all of which is written after it: later columns, later rows, other classes. Behind a run of another
// class lies what is written already.
void in_rows(const Classed& x, const std::vector<ClassColumns>& columns, const uint8_t* ordered,
             int64_t count, uint8_t* rows, const uint8_t* end) {
  for (size_t which = 0; which < columns.size(); ++which) {
    const std::vector<Run>& runs = columns[which].runs;
    const int64_t most = columns[which].longest;
    for (int64_t i = 0; i < count; ++i) {
      uint8_t* const row = rows + i * x.width;
      if (most == 1) {
        for (const Run& run : runs) row[run.first] = *ordered++;
      } else if (which == 0 && most <= kMoved && end - row >= x.width + kMoved) {
        for (const Run& run : runs) {
          std::memcpy(row + run.first, ordered, kMoved);
          ordered += run.count;
        }
      } else {
        for (const Run& run : runs) {
          std::memcpy(row + run.first, ordered, static_cast<size_t>(run.count));
          ordered += run.count;
        }
      }
    }
  }
}

struct Symbol {
  uint32_t start;
  uint32_t frequency;
};

// Codes n bytes from the last to the first; words are put in front of `end`, which is returned.
uint8_t* put_bytes(const uint8_t* bytes, int64_t n, int64_t place, const Symbol* symbols,
                   uint32_t* states, uint8_t* end) {
  for (int64_t i = n - 1; i >= 0; --i) {
    uint32_t& x = states[(place + i) % kRansLanes];
    const Symbol s = symbols[bytes[i]];
    if (x >= static_cast<uint64_t>(s.frequency) << (32 - kRansBits)) {
      const auto word = static_cast<uint16_t>(x);
      end -= 2;
      std::memcpy(end, &word, 2);
      x >>= 16;
    }
    x = (x / s.frequency << kRansBits) + x % s.frequency + s.start;
  }
  return end;
}

// Reads n bytes, the first in the lane of `place`; false where words are missing.
bool take_bytes(uint8_t* bytes, int64_t n, int64_t place, const uint32_t* table, uint32_t* states,
                const uint8_t*& at, const uint8_t* end) {
  constexpr uint32_t kMask = kRansTotal - 1;
  const auto next = [&](uint32_t x, uint8_t& byte) {
    const uint32_t entry = table[x & kMask];
    byte = static_cast<uint8_t>(entry);
    return ((entry >> 8 & kMask) + 1) * (x >> kRansBits) + (entry >> 20);
  };
  int64_t i = 0;
  const auto one = [&] {
    uint32_t& x = states[(place + i) % kRansLanes];
    x = next(x, bytes[i++]);
    if (x >= kRansLeast) return true;
    if (end - at < 2) return false;
    uint16_t word;
    std::memcpy(&word, at, 2);
    at += 2;
    x = x << 16 | word;
    return true;
  };
  while (i < n && (place + i) % kRansLanes != 0)
    if (!one()) return false;
  // While 16 bytes are left, no lane of a round can lack its word.
  uint32_t x[kRansLanes];
  std::memcpy(x, states, sizeof x);
  for (; i + kRansLanes <= n && end - at >= 2 * kRansLanes; i += kRansLanes) {
    for (int lane = 0; lane < kRansLanes; ++lane) x[lane] = next(x[lane], bytes[i + lane]);
    for (int lane = 0; lane < kRansLanes; ++lane) {  // without a branch that nobody can foresee
      uint16_t word;
      std::memcpy(&word, at, 2);
      const bool low = x[lane] < kRansLeast;
      x[lane] = low ? x[lane] << 16 | word : x[lane];
      at += low ? 2 : 0;
    }
  }
  std::memcpy(states, x, sizeof x);
  while (i < n)
    if (!one()) return false;
  return true;
}

}  // namespace

void rans_count(const uint8_t* bytes, const Classed& x, int64_t* counts, int threads) {
  std::mutex added;
  const auto size = static_cast<size_t>(256 * x.count);
  for (size_t i = 0; i < size; ++i) counts[i] = 0;
  parallel_for(x.rows, x.width, threads, [&](int, int64_t first, int64_t last) {
    std::vector<int64_t> own(size);
    for (int64_t row = first; row < last; ++row)
      for (int64_t col = 0; col < x.width; ++col)
        ++own[256 * static_cast<size_t>(x.classes[col]) + bytes[row * x.width + col]];
    const std::lock_guard<std::mutex> alone(added);
    for (size_t i = 0; i < size; ++i) counts[i] += own[i];
  });
}

void rans_encode(const uint8_t* bytes, const Classed& x, const uint16_t* frequencies, uint8_t* out,
                 int64_t slot, int32_t* sizes, int threads) {
  const auto columns = columns_of(x);
  std::vector<Symbol> symbols(static_cast<size_t>(256 * x.count));
  for (int which = 0; which < x.count; ++which) {
    uint32_t start = 0;
    for (int i = 0; i < 256; ++i) {
      const uint16_t frequency = frequencies[256 * which + i];
      symbols[static_cast<size_t>(256 * which + i)] = {start, frequency};
      start += frequency;
    }
  }
  parallel_for(x.chunks(), work_of(x), threads, [&](int, int64_t first, int64_t last) {
    std::vector<uint8_t> ordered(static_cast<size_t>(smaller(x.chunk_rows, x.rows) * x.width));
    std::vector<uint8_t> words(2 * ordered.size());
    for (int64_t chunk = first; chunk < last; ++chunk) {
      const int64_t count = x.rows_of(chunk);
      in_order(x, columns, bytes + chunk * x.chunk_rows * x.width, count, ordered.data());
      uint32_t states[kRansLanes];
      for (uint32_t& state : states) state = kRansLeast;
      uint8_t* const end = words.data() + words.size();
      uint8_t* begin = end;
      int64_t place = count * x.width;
      for (int which = x.count - 1; which >= 0; --which) {
        const int64_t n = count * columns[static_cast<size_t>(which)].count;
        place -= n;
        begin = put_bytes(ordered.data() + place, n, place, symbols.data() + 256 * which, states,
                          begin);
      }
      uint8_t* const at = out + chunk * slot;
      std::memcpy(at, states, kRansHead);
      std::memcpy(at + kRansHead, begin, static_cast<size_t>(end - begin));
      sizes[chunk] = static_cast<int32_t>(kRansHead + (end - begin));
    }
  });
}

RansDecoder::RansDecoder(const Classed& x, const uint32_t* table, std::vector<uint8_t>& ordered)
    : x_(x), table_(table), columns_(columns_of(x)), ordered_(ordered) {
  const auto size = static_cast<size_t>(
      smaller(kRansTogether * x.chunk_rows, x.rows + x.chunk_rows) * x.width + kMoved);
  if (x.count > 1 && ordered.size() < size) ordered.resize(size);  // else the order is that of the rows
}

int64_t RansDecoder::decode(int64_t chunk, int64_t count, const uint8_t* coded,
                            const int64_t* ends, uint8_t* rows) {
  RansChunk chunks[kRansTogether] = {};
  int64_t places[kRansTogether] = {};  // bytes that are decoded of each
  bool good[kRansTogether];
  const int64_t size = x_.chunk_rows * x_.width;  // the last chunk may have less
  for (int64_t c = 0; c < count; ++c) {
    RansChunk& one = chunks[c];
    one.bytes = (x_.count > 1 ? ordered_.data() : rows) + c * size;
    one.at = coded + (ends[c] - ends[0]);
    one.end = coded + (ends[c + 1] - ends[0]);
    good[c] = one.end - one.at >= kRansHead;
    if (!good[c]) continue;
    std::memcpy(one.states, one.at, kRansHead);
    one.at += kRansHead;
    for (const uint32_t state : one.states) good[c] = good[c] && state >= kRansLeast;
  }
  // Of a damaged chunk whatever comes out is dropped.
  const auto take = [&](int64_t c, int64_t n, const uint32_t* table) {
    RansChunk& one = chunks[c];
    good[c] = good[c] && take_bytes(one.bytes, n, places[c], table, one.states, one.at, one.end);
    one.bytes += n, places[c] += n;
  };
  for (int which = 0; which < x_.count; ++which) {
    const uint32_t* const table = table_ + kRansTotal * which;
    int64_t left[kRansTogether];
    for (int64_t c = 0; c < count; ++c) {
      left[c] = x_.rows_of(chunk + c) * columns_[static_cast<size_t>(which)].count;
      const int64_t begin = smaller(left[c], -places[c] & (kRansLanes - 1));  // up to lane 0
      take(c, begin, table);
      left[c] -= begin;
    }
    // The last chunk may be shorter: what the others have more is decoded after it.
    for (int64_t n = count; n > 0 && n >= count - 1; --n) {
      const int64_t taken = kernels().entropy.take_rounds(
          chunks, static_cast<int>(n), smaller(left[0], left[n - 1]), table);
      for (int64_t c = 0; c < n; ++c)
        chunks[c].bytes += taken, places[c] += taken, left[c] -= taken;
    }
    for (int64_t c = 0; c < count; ++c) take(c, left[c], table);
  }
  uint8_t* const end = rows + (count - 1) * size + x_.rows_of(chunk + count - 1) * x_.width;
  for (int64_t c = 0; c < count; ++c) {
    good[c] = good[c] && chunks[c].at == chunks[c].end;
    for (const uint32_t state : chunks[c].states) good[c] = good[c] && state == kRansLeast;
    if (!good[c]) return chunk + c;
    if (x_.count > 1)
      in_rows(x_, columns_, ordered_.data() + c * size, x_.rows_of(chunk + c), rows + c * size, end);
  }
  return kNone;
}

void rans_slots(const uint16_t* frequencies, uint32_t* table) {
  for (uint32_t byte = 0; byte < 256; ++byte)
    for (uint32_t i = 0, often = frequencies[byte]; i < often; ++i)
      *table++ = byte | (often - 1) << 8 | i << 20;
}

int64_t rans_decode(const uint8_t* coded, const int64_t* ends, const Classed& x,
                    const uint32_t* table, uint8_t* bytes, int threads) {
  return first_of(x.chunks(), work_of(x), threads, [&](int64_t first, int64_t last) {
    std::vector<uint8_t> ordered;
    RansDecoder decoder(x, table, ordered);
    for (int64_t chunk = first, count; chunk < last; chunk += count) {
      count = rans_at_once(last - chunk);
      const int64_t bad = decoder.decode(chunk, count, coded + ends[chunk], ends + chunk,
                                         bytes + chunk * x.chunk_rows * x.width);
      if (bad != kNone) return bad;
    }
    return kNone;
  });
}

}  // namespace ternarize
