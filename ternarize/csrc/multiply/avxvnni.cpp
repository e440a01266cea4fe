// Products for x86-64 with AVX2 and AVX-VNNI.
#define TERNARIZE_PRODUCTS kAvxVnniProducts
#include "multiply/avx2.h"
