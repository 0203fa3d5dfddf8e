// The mathematics of the row losses, for host and device. Twin of fastdiff/reference.py, section 2.
//
// A row is V numbers z. One id, the excluded one (the mask; x_t for the uniform graph), is never read. The id x0 is
// treated apart, in double; all others share one formula:
//   dce   loss = logsumexp(z) - z_x0,                        gradient exp(z - logsumexp), minus 1 at x0
//   dse   loss = scale * sum_y a_y phi(s_y - log a_y),       gradient scale * (exp(s_y) - a_y)
// where phi(d) = expm1(d) - d and s = z - shift. a_y is the ratio p(y | x0) / p(x_t | x0): for the absorbing graph
// 1/e1 at x0 and 0 elsewhere; for the uniform one r if x_t = x0, else 1/r at x0 and 1 elsewhere.
#pragma once

#include <cmath>
#include <cstdint>

#include "element.h"

namespace fastdiff {

// exp in float, within 2 ulp, in operations that vectorise: 2^n e^r with |r| <= log(2)/2. Below -87 it is 0.
FASTDIFF_HD float exp_(float x) {
  constexpr float kLow = -86.9f, kHigh = 89.0f, kRound = 0x1.8p23f;
  float y = x < kLow ? kLow : x;
  y = y > kHigh ? kHigh : y;
  const float shifted = y * 1.44269504f + kRound;  // its low bits are n
  const float n = shifted - kRound;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // n reaches 128, one more than an exponent holds: scale by 2^(n-1), then by 2.
  const float half_scale = bit_cast<float>((bit_cast<uint32_t>(shifted) + 126u) << 23);
  const float value = p * half_scale * 2.0f;
  return x < kLow ? 0.0f : value;
}
FASTDIFF_HD double exp_(double x) { return std::exp(x); }

// Where phi's Taylor series through d^6/720 is as good as the type.
FASTDIFF_HD float near_zero(float) { return 0.25f; }
FASTDIFF_HD double near_zero(double) { return 1e-2; }

template <typename T>
struct Term {
  T value, slope;
};

// a phi(d) and its derivative exp(s) - a, for d = s - log a and a > 0. d comes from the caller, who can round once.
template <typename T>
FASTDIFF_HD Term<T> scaled_phi(T s, T d, T a) {
  const T e = exp_(s);
  const T series = a * (d * d) * (T(1) / 2 + d * (T(1) / 6 + d * (T(1) / 24 + d * (T(1) / 120 + d / 720))));
  const bool near = std::fabs(d) < near_zero(T());
  const T value = near ? series : e - a * (1 + d);
  const T slope = near ? series + a * d : e - a;
  return {value, slope};
}

// Functions of the total noise sigma, safe from 1e-6 to 700: e1 = expm1(sigma) is never formed.
struct Noise {
  double inv_e1, log_e1;

  FASTDIFF_HD explicit Noise(double sigma) {
    const double o = -std::expm1(-sigma);
    inv_e1 = std::exp(-sigma) / o;
    log_e1 = sigma + std::log(o);
  }
};

struct DseRow {
  double a, log_a, a_x0, log_a_x0, scale;

  FASTDIFF_HD static DseRow absorb(double sigma) {
    const Noise noise(sigma);
    return {0, 0, noise.inv_e1, -noise.log_e1, 1};
  }

  FASTDIFF_HD static DseRow uniform(double sigma, int64_t num_states, bool moved) {
    const double o = -std::expm1(-sigma), n = static_cast<double>(num_states);
    const double log_r = -std::log1p(n * std::exp(-sigma) / o), r = o / (o + n * std::exp(-sigma));
    return moved ? DseRow{1, 0, 1 / r, -log_r, 1 / n} : DseRow{r, log_r, 0, 0, 1 / n};
  }
};

}  // namespace fastdiff
