#include "row_sample_cpu.h"

namespace fastdiff {

FASTDIFF_SAMPLER_OF(float)
FASTDIFF_SAMPLER_OF(double)

}  // namespace fastdiff
