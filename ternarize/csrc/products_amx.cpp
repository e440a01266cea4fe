// Products for x86-64 with AVX-512 as in products_avx512.cpp, and AMX with 8-bit integers.
#define TERNARIZE_PRODUCTS kAmxProducts
#include "products_avx512.cpp"
