// x86-64 with AVX-512 F, BW, VL, DQ and VBMI.
#define TERNARIZE_VARIANT kAvx512
#define TERNARIZE_VARIANT_NAME "avx512"
#include "kernels.inc"
