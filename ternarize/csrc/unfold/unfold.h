// unfold/: the patches of images that the kernels of a convolution meet, as rows of a matrix that is
// then multiplied (runtime/unfold.py, which has the definition). Numbers are copied, not looked at.
#pragma once

#include "shared/formats.h"

namespace ternarize {

// Images with their channels last in memory: (count, height, width, channels).
struct Images {
  int64_t count, height, width, channels;
};

// Of a kernel, down and across.
struct Windows {
  int64_t kernel[2], stride[2], dilation[2];
  int64_t before[2];  // zeros above, and on the left
  int64_t places[2];
};

// out (count, places down, places across, channels * kernel down * kernel across), channel by channel;
// zeros where a kernel meets none of the image. Numbers are of `size` bytes, 2 or 4.
void unfold(const Images&, const Windows&, int size, const void* images, void* out, int threads);

}  // namespace ternarize
