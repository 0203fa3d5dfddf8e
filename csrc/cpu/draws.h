// Many draws of a stream at a time.
#pragma once

#include "../philox.h"

namespace fastdiff {

// Draws first .. first + n - 1 of a stream, and up to 3 more; first is a multiple of 4.
FASTDIFF_HD void draw_block(const Stream& stream, int64_t first, int64_t n, uint32_t* draws) {
  const Stream copy = stream;  // and 32-bit indices: what it takes to vectorise
  const auto first_group = static_cast<int32_t>(first / 4), groups = static_cast<int32_t>((n + 3) / 4);
#pragma omp simd
  for (int32_t g = 0; g < groups; ++g) {
    const Words words = copy.four(static_cast<uint32_t>(first_group + g));
    draws[4 * g] = words.w[0];
    draws[4 * g + 1] = words.w[1];
    draws[4 * g + 2] = words.w[2];
    draws[4 * g + 3] = words.w[3];
  }
}

}  // namespace fastdiff
