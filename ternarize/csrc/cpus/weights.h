// The functions for weights of an instruction set: of the one that the file is compiled for which
// includes this and has defined TERNARIZE_KERNELS, the name of their table.
#include "cpus/cpus.h"
#include "decode/operations.h"
#include "entropy/loops.h"
#include "latent/loops.h"
#include "pack/base3.h"
#include "ternarize/rows.h"

namespace ternarize {

const Kernels TERNARIZE_KERNELS{
    kPacking,
    {kTernarizing<Float32>, kTernarizing<BFloat16>, kTernarizing<Float16>},
    {kLatent<Float32>, kLatent<BFloat16>, kLatent<Float16>},
    {kDecoding<Float32>, kDecoding<BFloat16>, kDecoding<Float16>},
    kEntropy};

}  // namespace ternarize
