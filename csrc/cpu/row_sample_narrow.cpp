#include "row_sample_cpu.h"

namespace fastdiff {

FASTDIFF_SAMPLER_OF(BFloat16)
FASTDIFF_SAMPLER_OF(Float16)

}  // namespace fastdiff
