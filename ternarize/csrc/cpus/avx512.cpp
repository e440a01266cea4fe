// x86-64 with AVX-512 F, BW, VL, DQ and VBMI.
#define TERNARIZE_KERNELS kAvx512
#include "cpus/weights.h"
