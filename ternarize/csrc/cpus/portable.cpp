// The baseline of the machine that the compiler was told to build for.
#define TERNARIZE_KERNELS kPortable
#include "cpus/weights.h"
