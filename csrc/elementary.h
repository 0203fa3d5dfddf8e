// Elementary functions in float, in operations that vectorise, for host and device; and in double.
#pragma once

#include <cmath>
#include <cstdint>

#include "element.h"

namespace fastdiff {

// x = n log(2) + r, |r| <= log(2)/2, in operations that vectorise; for -87 < x < 88.3. The remainder is within |x|/60
// ulp of r where multiply and add are fused, within |x| ulp elsewhere.
struct Reduced {
  float scale, r;  // 2^n

  FASTDIFF_HD explicit Reduced(float x) {
    constexpr float kRound = 0x1.8p23f + 127.0f;  // rounds to integers, and has the exponent of 2^n in its low bits
    const float shifted = x * 1.44269504f + kRound, n = shifted - kRound;
    scale = bit_cast<float>(bit_cast<uint32_t>(shifted) << 23);
    r = x - n * 0.693147181f;
  }
};

// 2^x, from where a GPU has an instruction for it.
FASTDIFF_HD float exp2_(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::exp2(x);
#endif
}

// a / b for |b| < 2^126, within 2 ulp.
FASTDIFF_HD float divide_(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

// exp for x < 88.3, within 2 ulp about 0; it is 0 below -86.9. On a GPU for all x, within |x| ulp.
FASTDIFF_HD float exp_(float x) {
#ifdef FASTDIFF_GPU
  return exp2_(x * 1.44269504f);
#else
  const Reduced reduced(x);
  const float r = reduced.r;
  float p = 8.3125012967e-3f;
  p = p * r + 4.1890331715e-2f;
  p = p * r + 1.6667115389e-1f;
  p = p * r + 4.9999230308e-1f;
  p = (p * r + 1.0f) * r + 1.0f;
  return x < -86.9f ? 0.0f : p * reduced.scale;
#endif
}
FASTDIFF_HD double exp_(double x) { return std::exp(x); }

template <typename T>
struct Term {
  T value, slope;
};

// exp(d) and expm1(d), for d < 88.3. Near 0, where scale = 1 and r = d, all but r + curve vanishes exactly.
struct Exponential {
  float scale, r, curve;

  FASTDIFF_HD explicit Exponential(float d) {
    const Reduced reduced(d < -86.9f ? -86.9f : d);
    scale = reduced.scale, r = reduced.r;
    float q = 1.3901476693e-3f;
    q = q * r + 8.3631704377e-3f;
    q = q * r + 4.1666851746e-2f;
    q = q * r + 1.6666577139e-1f;
    q = q * r + 4.9999999554e-1f;
    curve = r * r * q;
  }
  FASTDIFF_HD float whole() const { return scale * (curve + r) + scale; }
  FASTDIFF_HD float less_one() const { return scale * (curve + r) + (scale - 1.0f); }
};

// phi(d) = expm1(d) - d and its derivative expm1(d).
FASTDIFF_HD Term<float> phi(float d) {
  const Exponential e(d);
  return {e.scale * e.curve + ((e.scale * e.r - d) + (e.scale - 1.0f)), e.less_one()};
}

// a phi(s - log a) and its derivative exp(s) - a, where s and d = s - log a come from the caller, who can round once.
FASTDIFF_HD Term<double> scaled_phi(double s, double d, double a) {
  const double series = d * d * (1.0 / 2 + d * (1.0 / 6 + d * (1.0 / 24 + d * (1.0 / 120 + d / 720))));
  const double e = std::exp(s);
  if (std::fabs(d) < 1e-2) return {a * series, a * (series + d)};
  return {e - a * (1 + d), e - a};
}

// s^2 R(s) + linear - n log(2), where rho = 2^n (1 + s): rho - 1 - log(rho), if linear + s is rho - 1. Near 1, where n
// is 0, s is w and linear is `near`, which keep their digits.
FASTDIFF_HD float log_gap_of(float rho, float w, float near, float less_one) {
  constexpr uint32_t kRootHalf = 0x3F3504F3;
  const uint32_t shifted = bit_cast<uint32_t>(rho) + (0x3F800000 - kRootHalf);
  const float n = static_cast<float>(static_cast<int32_t>(shifted >> 23) - 127);
  const float far = bit_cast<float>((shifted & 0x007FFFFF) + kRootHalf) - 1.0f;
  const float s = n == 0 ? w : far, linear = n == 0 ? near : (less_one - far) - n * 0.693147181f;
  float p = 7.779105448e-2f;
  p = p * s - 1.277899054e-1f;
  p = p * s + 1.311441154e-1f;
  p = p * s - 1.419595402e-1f;
  p = p * s + 1.662703996e-1f;
  p = p * s - 2.000164238e-1f;
  p = p * s + 2.500078027e-1f;
  p = p * s - 3.333332531e-1f;
  p = p * s + 4.999999764e-1f;
  return p * s * s + linear;
}

// w - log(1 + w) from w and rho = 1 + w, each rounded by itself.
FASTDIFF_HD float log_gap(float w, float rho) { return log_gap_of(rho, w, 0, w); }

FASTDIFF_HD double log_gap(double w, double rho) {
  const double series = w * w * (1.0 / 2 - w * (1.0 / 3 - w * (1.0 / 4 - w * (1.0 / 5 - w / 6))));
  return std::fabs(w) < 1e-3 ? series : w - std::log(rho);
}

// The sum of two, in float by one logarithm: of w + w' and (1 + w) (1 + w') = 1 + (w + w' + w w').
FASTDIFF_HD float log_gaps(float w, float rho, float w2, float rho2) {
  const float sum = w + w2, cross = w * w2;
  return log_gap_of(rho * rho2, sum + cross, -cross, sum);
}
FASTDIFF_HD double log_gaps(double w, double rho, double w2, double rho2) {
  return log_gap(w, rho) + log_gap(w2, rho2);
}

}  // namespace fastdiff
