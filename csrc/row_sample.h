// The mathematics of drawing a token from a row, for host and device. Twin of fastdiff/reference.py, section 4.
#pragma once

#include "philox.h"
#include "row_loss.h"

namespace fastdiff {

constexpr int64_t kClasses = 1024;  // ids with the same v mod kClasses race as one

// 2^t for t < 128; below -126 it stays 2^-126, which is as good as nothing beside a number of weight 1.
FASTDIFF_HD float exp2_(float t) {
  constexpr float kRound = 0x1.8p23f;  // rounds to integers, and leaves them in the low bits
  t = t < -126.0f ? -126.0f : t;
  const float shifted = t + kRound, r = t - (shifted - kRound);
  float p = 1.33344e-3f;
  p = p * r + 9.67166e-3f;
  p = p * r + 5.550484e-2f;
  p = p * r + 2.4022239e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  return bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(shifted) << 23));
}
FASTDIFF_HD double exp2_(double t) { return std::exp2(t); }

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
