// digest/: SHA-256 (FIPS 180-4) of bytes that come a piece at a time, so that what reads them can hash
// them while they are near. Only by instructions of the processor: where it has none, hashlib is no
// slower than what would stand here.
#pragma once

#include "shared/formats.h"

namespace ternarize {

// Takes whole blocks of 64 bytes into the eight words of a state.
using Sha256Blocks = void (*)(uint32_t* state, const uint8_t* data, int64_t blocks);
void sha256_by_instructions(uint32_t* state, const uint8_t* data, int64_t blocks);  // x86-64 builds only

namespace {

class Sha256 {
 public:
  explicit Sha256(Sha256Blocks blocks) : blocks_(blocks) {}

  void update(const uint8_t* data, int64_t n) {
    total_ += n;
    if (held_ > 0) {
      const int64_t more = smaller(n, 64 - held_);
      std::memcpy(rest_ + held_, data, static_cast<size_t>(more));
      held_ += more, data += more, n -= more;
      if (held_ < 64) return;
      blocks_(state_, rest_, 1);
      held_ = 0;
    }
    if (n >= 64) blocks_(state_, data, n / 64);
    if (n % 64) std::memcpy(rest_, data + n / 64 * 64, static_cast<size_t>(n % 64));
    held_ = n % 64;
  }

  // The digest, 32 bytes; nothing more can be taken.
  void finish(uint8_t* digest) {
    uint8_t end[128] = {};
    std::memcpy(end, rest_, static_cast<size_t>(held_));
    end[held_] = 0x80;
    const int64_t blocks = held_ < 56 ? 1 : 2;
    const uint64_t bits = static_cast<uint64_t>(total_) * 8;
    for (int i = 0; i < 8; ++i)
      end[64 * blocks - 1 - i] = static_cast<uint8_t>(bits >> 8 * i);
    blocks_(state_, end, blocks);
    for (int i = 0; i < 32; ++i)
      digest[i] = static_cast<uint8_t>(state_[i / 4] >> (24 - 8 * (i % 4)));
  }

 private:
  Sha256Blocks blocks_;
  uint32_t state_[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  uint8_t rest_[64];
  int64_t held_ = 0, total_ = 0;
};

}  // namespace
}  // namespace ternarize
