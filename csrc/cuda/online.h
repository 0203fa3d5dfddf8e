// A sum of exponentials, relative to a maximum that rises as numbers come.
#pragma once

#include <cfloat>

#include "../elementary.h"
#include "row.h"

namespace fastdiff {

// The sum of exp(z) is exp(m) s, with m the largest z.
struct Online {
  float m = -FLT_MAX, s = 0;  // which subtracts from -inf without NaN

  template <int kMany>
  __device__ void add(const Few<kMany>& few) {
    float top = m;
    for (const float x : few.x) top = fmaxf(top, x);
    float sum = 0;
    for (const float x : few.x) sum += exp_(x - top);
    s = fmaf(s, exp_(m - top), sum);
    m = top;
  }
};

struct MergeOnline {
  __device__ Online operator()(const Online& a, const Online& b) const {
    const bool a_is_high = a.m >= b.m;  // whose sum stays: the same bits in either order
    const float m = a_is_high ? a.m : b.m, low = a_is_high ? b.m : a.m;
    const float high_s = a_is_high ? a.s : b.s, low_s = a_is_high ? b.s : a.s;
    return {m, fmaf(low_s, exp_(low - m), high_s)};
  }
};

}  // namespace fastdiff
