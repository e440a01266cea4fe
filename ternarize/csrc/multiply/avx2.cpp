// Products for x86-64 with AVX2.
#define TERNARIZE_PRODUCTS kAvx2Products
#include "multiply/avx2.h"
