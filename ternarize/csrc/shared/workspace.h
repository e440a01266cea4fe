#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace ternarize {

// Memory that a thread keeps from one call to the next, aligned to 64 bytes.
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

}  // namespace ternarize
