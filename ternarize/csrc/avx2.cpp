// x86-64 with AVX2.
#define TERNARIZE_VARIANT kAvx2
#define TERNARIZE_VARIANT_NAME "avx2"
#include "kernels.inc"
