// x86-64 with AVX2.
#define TERNARIZE_KERNELS kAvx2
#include "cpus/weights.h"
