#include "unfold/unfold.h"

#include <algorithm>
#include <vector>

#include "shared/pool.h"

namespace ternarize {
namespace {

constexpr int64_t kOfTask = 1 << 14;  // numbers that are worth a task

// The patch of one place: `at` has for each number of a kernel where its channels are.
template <int kKnown, class T>
T* patch(const T* const* at, int64_t taps, int64_t channels, T* out) {
  const int64_t count = kKnown ? kKnown : taps;
  for (int64_t channel = 0; channel < channels; ++channel)
    for (int64_t tap = 0; tap < count; ++tap) *out++ = at[tap][channel];
  return out;
}

template <class T>
void line(const Images& x, const Windows& k, const T* image, int64_t row, const T* zeros,
          const T** at, T* out) {
  const int64_t taps = k.kernel[0] * k.kernel[1];
  const int64_t top = row * k.stride[0] - k.before[0];
  for (int64_t place = 0; place < k.places[1]; ++place) {
    const int64_t left = place * k.stride[1] - k.before[1];
    const T** next = at;
    for (int64_t i = 0; i < k.kernel[0]; ++i) {
      const int64_t y = top + i * k.dilation[0];
      for (int64_t j = 0; j < k.kernel[1]; ++j) {
        const int64_t column = left + j * k.dilation[1];
        const bool inside = y >= 0 && y < x.height && column >= 0 && column < x.width;
        *next++ = inside ? image + (y * x.width + column) * x.channels : zeros;
      }
    }
    out = taps == 9 ? patch<9>(at, taps, x.channels, out) : patch<0>(at, taps, x.channels, out);
  }
}

template <class T>
void unfold_all(const Images& x, const Windows& k, const T* images, T* out, int threads) {
  const int64_t taps = k.kernel[0] * k.kernel[1];
  const int64_t size = k.places[1] * x.channels * taps;  // of a line
  const int64_t lines = x.count * k.places[0];
  const int64_t at_once = std::max<int64_t>(1, kOfTask / std::max<int64_t>(1, size));
  threads = std::clamp(threads, 1, 256);
  const std::vector<T> zeros(static_cast<size_t>(x.channels));
  std::vector<const T*> places(static_cast<size_t>(taps * threads));
  run_tasks(threads, ceil_div(lines, at_once), [&](int64_t task, int worker) {
    const int64_t last = std::min(lines, (task + 1) * at_once);
    for (int64_t each = task * at_once; each < last; ++each)
      line(x, k, images + each / k.places[0] * x.height * x.width * x.channels,
           each % k.places[0], zeros.data(), places.data() + worker * taps, out + each * size);
  });
}

}  // namespace

void unfold(const Images& x, const Windows& k, int size, const void* images, void* out,
            int threads) {
  if (size == 4)
    unfold_all(x, k, static_cast<const uint32_t*>(images), static_cast<uint32_t*>(out), threads);
  else
    unfold_all(x, k, static_cast<const uint16_t*>(images), static_cast<uint16_t*>(out), threads);
}

}  // namespace ternarize
