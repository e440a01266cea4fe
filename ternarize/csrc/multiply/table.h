// The products of the instruction set that the file is compiled for which includes this, last. It has
// defined what lanes_loops.h and int8_loops.h say, and TERNARIZE_PRODUCTS, the name of their table.
#include "multiply/int8_loops.h"
#include "multiply/lanes_loops.h"
#include "multiply/yardsticks.h"

namespace ternarize {

const Products TERNARIZE_PRODUCTS{
    lanes::kLanes3, quantize,      lanes::scratch, lanes::multiply, int8::kFew,
    int8::arrange,  int8::scratch, int8::multiply, int8::open,      read,
    dot_peak<lanes::Vectors>};

}  // namespace ternarize
