// Products with int8 weights for x86-64 with AVX2 and AVX-VNNI.
#define TERNARIZE_INT8 kAvxVnniInt8
#include "int8_products_avx2.cpp"
