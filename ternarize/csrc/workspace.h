// Memory for the calls of a product, for lanes.cpp and int8.cpp.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace ternarize {

// Memory that a thread keeps from one product to the next, aligned to 64 bytes.
class Workspace {
 public:
  uint8_t* bytes(int64_t n) {
    if (n > size_) {
      memory_.reset();
      size_ = 0;  // until there is other memory: new may throw
      memory_.reset(static_cast<uint8_t*>(::operator new(static_cast<size_t>(n), kAlign)));
      size_ = n;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(uint8_t* p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<uint8_t, Free> memory_;
  int64_t size_ = 0;
};

constexpr int64_t kOneThread = int64_t{1} << 18;  // multiplications that are not worth a second thread

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t lines(int64_t bytes) { return ceil_div(bytes, 64) * 64; }

}  // namespace ternarize
