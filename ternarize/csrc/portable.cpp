// The baseline of the machine that the compiler was told to build for.
#define TERNARIZE_VARIANT kPortable
#define TERNARIZE_VARIANT_NAME "portable"
#include "kernels.inc"
