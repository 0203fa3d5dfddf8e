// The mathematics of the row losses, for host and device. Twin of fastdiff/reference.py, section 2.
//
// A row is V numbers z. Two ids are treated apart, in double: x0, and the excluded one, which is the mask or, in the
// uniform graph, x_t; only NelboRow reads that one. All others share one formula:
//   dce   loss = logsumexp(z) - z_x0,                        gradient exp(z - logsumexp), minus 1 at x0
//         and with a weight of its own -sum_y p_y log p_y,   gradient -p_y (log p_y + this sum)
//   dse   loss = scale * sum_y a_y phi(s_y - log a_y),       gradient scale * (exp(s_y) - a_y)
//   dse from conditionals, uniform graph: see NelboRow
// where phi(d) = expm1(d) - d and s = z - shift. a_y is the ratio p(y | x0) / p(x_t | x0): for the absorbing graph
// 1/e1 at x0 and 0 elsewhere; for the uniform one r if x_t = x0, else 1/r at x0 and 1 elsewhere.
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

// phi(d) = expm1(d) - d and its derivative expm1(d), for d < 88.3. Near 0, where scale = 1 and r = d, all but r^2 q
// vanishes exactly.
FASTDIFF_HD Term<float> phi(float d) {
  const Reduced reduced(d < -86.9f ? -86.9f : d);
  const float scale = reduced.scale, r = reduced.r;
  float q = 1.3901476693e-3f;
  q = q * r + 8.3631704377e-3f;
  q = q * r + 4.1666851746e-2f;
  q = q * r + 1.6666577139e-1f;
  q = q * r + 4.9999999554e-1f;
  const float curve = r * r * q, rest = scale - 1.0f;
  return {scale * curve + ((scale * r - d) + rest), scale * (curve + r) + rest};
}

// a phi(s - log a) and its derivative exp(s) - a, where s and d = s - log a come from the caller, who can round once.
FASTDIFF_HD Term<double> scaled_phi(double s, double d, double a) {
  const double series = d * d * (1.0 / 2 + d * (1.0 / 6 + d * (1.0 / 24 + d * (1.0 / 120 + d / 720))));
  const double e = std::exp(s);
  if (std::fabs(d) < 1e-2) return {a * series, a * (series + d)};
  return {e - a * (1 + d), e - a};
}

// A weight as a product: a share <= 1 goes into the exponent, where it keeps exponentials from overflowing that do not
// overflow with their weight. A weight of 0 leaves nothing of a finite number.
struct RowWeight {
  double factor, share;

  FASTDIFF_HD explicit RowWeight(double weight) : factor(weight), share(1) {
    if (std::fabs(weight) < 1) factor = weight < 0 ? -1 : 1, share = std::fabs(weight);
  }
  // weight a phi(s - log a) and its derivative for s.
  FASTDIFF_HD Term<double> phi(double s, double d, double a) const {
    const Term<double> term = scaled_phi(s + std::log(share), d, a * share);
    return {factor * term.value, factor * term.slope};
  }
};

// The terms of a row's sum: factor * term(z), and its derivative. In float they need z - shift < 88.
template <typename T>
struct ExpTerm {
  T shift, factor = 1;

  FASTDIFF_HD explicit ExpTerm(double shift_) : shift(static_cast<T>(shift_)) {}
  FASTDIFF_HD ExpTerm(const RowWeight& weight, double shift_)
      : shift(shift_ - std::log(weight.share)), factor(weight.factor) {}
  FASTDIFF_HD Term<T> operator()(T z) const {
    const T e = exp_(z - shift);
    return {e, e};
  }
};

// a phi(z - shift - log a)
template <typename T>
struct PhiTerm;

template <>
struct PhiTerm<float> {
  float shift, factor;

  FASTDIFF_HD PhiTerm(double shift_, double a, double log_a)
      : shift(static_cast<float>(shift_ + log_a)), factor(static_cast<float>(a)) {}
  FASTDIFF_HD Term<float> operator()(float z) const { return phi(z - shift); }
};

template <>
struct PhiTerm<double> {
  double shift, shift_s, a, factor = 1;

  FASTDIFF_HD PhiTerm(double shift_, double a_, double log_a) : shift(shift_ + log_a), shift_s(shift_), a(a_) {}
  FASTDIFF_HD PhiTerm(const RowWeight& weight, double shift_, double a_, double log_a)
      : shift(shift_ + log_a), shift_s(shift_ - std::log(weight.share)), a(a_ * weight.share), factor(weight.factor) {}
  FASTDIFF_HD Term<double> operator()(double z) const { return scaled_phi(z - shift_s, z - shift, a); }
};

// w - log(1 + w) from w and rho = 1 + w, each rounded by itself. With rho = 2^n (1 + s) it is s^2 R(s) + (w - s) - n
// log(2), and near 0, where n = 0 and s = w, only s^2 R(s).
FASTDIFF_HD float log_gap(float w, float rho) {
  constexpr uint32_t kRootHalf = 0x3F3504F3;
  const uint32_t shifted = bit_cast<uint32_t>(rho) + (0x3F800000 - kRootHalf);
  const float n = static_cast<float>(static_cast<int32_t>(shifted >> 23) - 127);
  const float s = n == 0 ? w : bit_cast<float>((shifted & 0x007FFFFF) + kRootHalf) - 1.0f;
  float p = 7.779105448e-2f;
  p = p * s - 1.277899054e-1f;
  p = p * s + 1.311441154e-1f;
  p = p * s - 1.419595402e-1f;
  p = p * s + 1.662703996e-1f;
  p = p * s - 2.000164238e-1f;
  p = p * s + 2.500078027e-1f;
  p = p * s - 3.333332531e-1f;
  p = p * s + 4.999999764e-1f;
  return p * s * s + ((w - s) - n * 0.693147181f);
}

FASTDIFF_HD double log_gap(double w, double rho) {
  const double series = w * w * (1.0 / 2 - w * (1.0 / 3 - w * (1.0 / 4 - w * (1.0 / 5 - w / 6))));
  return std::fabs(w) < 1e-3 ? series : w - std::log(rho);
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

// Score entropy of the uniform graph at the score that conditionals c imply, which is p_t(y) / p_t(x_t) with p_t(y)
// proportional to 1 + k c_y, k = N / e1. With rho_y the score over the ratio a_y, and w_y = rho_y - 1,
//   loss = 1/N sum_{y != x_t} a_y (w_y - log rho_y),
//   d loss / d c_y = k / (N b) (1 - 1 / rho_y), b = 1 + k c_xt;  at x_t it is -k / (N b) sum a_y w_y.
// Everywhere but at x0 rho_y = slope c_y + offset. `rest` is 1 - c, summed from the other ids.
struct NelboRow {
  double b, a, slope, offset, offset_w, a_x0, w_x0, rho_x0, dc_xt;

  FASTDIFF_HD NelboRow(double k, int64_t num_states, bool moved, double c_xt, double c_x0, double rest_xt,
                       double rest_x0) {
    const double spread = k * (static_cast<double>(num_states) + k);
    b = 1 + k * c_xt;
    if (moved) {
      a = 1, slope = k / b, offset = 1 / b, offset_w = -k * c_xt / b;
      a_x0 = 1 + k, rho_x0 = (1 + k * c_x0) / (b * a_x0), w_x0 = -k * (rest_x0 + c_xt * a_x0) / (b * a_x0);
      dc_xt = spread * c_xt / b;
    } else {
      a = 1 / (1 + k), slope = k * (1 + k) / b, offset = (1 + k) / b, offset_w = k * rest_xt / b;
      a_x0 = w_x0 = 0, rho_x0 = 1;
      dc_xt = -spread * rest_xt * a / b;
    }
  }
};

}  // namespace fastdiff
