// Products with int8 weights for x86-64 with AVX-512 as in int8_products_avx512.cpp, and AMX with
// 8-bit integers.
#define TERNARIZE_INT8 kAmxInt8
#include "int8_products_avx512.cpp"
