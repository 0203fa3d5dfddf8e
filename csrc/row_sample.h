// The mathematics of drawing a token from a row, for host and device. Twin of fastdiff/reference/draws.py.
#pragma once

#include "elementary.h"
#include "philox.h"

namespace fastdiff {

constexpr int64_t kClasses = 1024;  // ids with the same v mod kClasses race as one

// exp(d / temperature), where d is raised to `least` before: what weighs less is as good as nothing beside a weight
// of 1. of<false> is for d that are not below it. In float d / temperature must be less than 88.
template <typename C>
struct Exp;

template <>
struct Exp<float> {
  float scale, least;

  FASTDIFF_HD explicit Exp(double temperature)
      : scale(static_cast<float>(1.4426950408889634 / temperature)), least(-126.0f / scale) {}
  FASTDIFF_HD float operator()(float d) const { return of<true>(d); }

  template <bool kRaise>
  FASTDIFF_HD float of(float d) const {
    constexpr float kRound = 0x1.8p23f;  // rounds to integers, and leaves them in the low bits
    if (kRaise) d = d < least ? least : d;
    const float shifted = d * scale + kRound, r = d * scale - (shifted - kRound);
    float p = 1.33344e-3f;
    p = p * r + 9.67166e-3f;
    p = p * r + 5.550484e-2f;
    p = p * r + 2.4022239e-1f;
    p = p * r + 6.9314718e-1f;
    p = p * r + 1.0f;
    return bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(shifted) << 23));
  }
};

template <>
struct Exp<double> {
  double temperature, least;

  FASTDIFF_HD explicit Exp(double temperature_) : temperature(temperature_), least(-700 * temperature_) {}
  FASTDIFF_HD double operator()(double d) const { return of<true>(d); }

  template <bool kRaise>
  FASTDIFF_HD double of(double d) const {
    return std::exp((kRaise && d < least ? least : d) / temperature);
  }
};

// A standard exponential from a draw, -log of a uniform, from whichever end of (0, 1) keeps its digits.
template <typename C>
FASTDIFF_HD C exponential(uint32_t draw) {
  const bool low = draw < 0x80000000;
  const auto from_end = static_cast<int32_t>(low ? draw : ~draw);
  const C u = (static_cast<C>(from_end) + C(0.5)) * C(0x1p-32);
  const C w = low ? -u : u - 1;
  return log_gap(w, low ? 1 - u : u) - w;
}

// One step of the reverse process for one token (reference.reverse_weights): with e = exp(z) and T their sum, another
// id weighs (e - theta T)+, and x_t (kappa e_xt - lam T)+.
struct ReverseLaw {
  double theta, kappa, lam, log_here;
};

}  // namespace fastdiff
