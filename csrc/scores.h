// Losses of scores: the constants of a row, and the terms of its sum.
#pragma once

#include "functors.h"

namespace fastdiff {

// The ratio a is 1/e1 at x0 and 0 elsewhere in the absorbing graph; in the uniform one it is r if x_t = x0, else 1/r at
// x0 and 1 elsewhere.
struct ScoresRow {
  double a, log_a, a_x0, log_a_x0, scale;

  ScoresRow() = default;
  FASTDIFF_HD ScoresRow(Functor functor, double sigma, int64_t num_states, bool moved) : scale(1) {
    const Noise noise(sigma);
    const double n = static_cast<double>(num_states);
    if (functor == Functor::dse_absorb || functor == Functor::csm_absorb) {
      a = 0, log_a = 0, a_x0 = noise.inv_e1, log_a_x0 = -noise.log_e1;
    } else {
      const double log_r = -std::log1p(n * noise.alpha / noise.rest), r = noise.rest / (noise.rest + n * noise.alpha);
      a = moved ? 1 : r, log_a = moved ? 0 : log_r;
      a_x0 = moved ? 1 / r : 0, log_a_x0 = moved ? -log_r : 0;
    }
    if (functor == Functor::dse_uniform) scale = 1 / n;
  }
};

// A weight as a product: a share <= 1 goes into the exponent, where it keeps exponentials from overflowing that do not
// overflow with their weight. A weight of 0 leaves nothing of a finite number.
struct RowWeight {
  double factor, share;

  FASTDIFF_HD explicit RowWeight(double weight) : factor(weight), share(1) {
    if (std::fabs(weight) < 1) factor = weight < 0 ? -1 : 1, share = std::fabs(weight);
  }
};

// Terms: factor * term(z), and its derivative. Those in float need z - shift < kMost, those in double have the weight
// in them.
struct Terms {
  double factor = 1;
};

template <typename C>
struct ExpTerm;

template <>
struct ExpTerm<float> : Terms {
  static constexpr float kMost = 88;
  float shift;

  FASTDIFF_HD ExpTerm(double shift_, double, double) : shift(static_cast<float>(shift_)) {}
  FASTDIFF_HD Term<float> operator()(float z) const {
    const float e = exp_(z - shift);
    return {e, e};
  }
};

template <>
struct ExpTerm<double> : Terms {
  static constexpr double kMost = 709;
  double shift;

  FASTDIFF_HD ExpTerm(const RowWeight& weight, double shift_, double, double)
      : Terms{weight.factor}, shift(shift_ - std::log(weight.share)) {}
  FASTDIFF_HD Term<double> operator()(double z) const {
    const double e = std::exp(z - shift);
    return {e, e};
  }
};

// a phi(z - shift - log a)
template <typename C>
struct PhiTerm;

template <>
struct PhiTerm<float> : Terms {
  static constexpr float kMost = 88;
  float shift;

  FASTDIFF_HD PhiTerm(double shift_, double a, double log_a) : Terms{a}, shift(static_cast<float>(shift_ + log_a)) {}
  FASTDIFF_HD Term<float> operator()(float z) const { return phi(z - shift); }
};

template <>
struct PhiTerm<double> : Terms {
  static constexpr double kMost = 709;
  double shift, shift_s, a;

  FASTDIFF_HD PhiTerm(const RowWeight& weight, double shift_, double a_, double log_a)
      : Terms{weight.factor}, shift(shift_ + log_a), shift_s(shift_ - std::log(weight.share)), a(a_ * weight.share) {}
  FASTDIFF_HD Term<double> operator()(double z) const { return scaled_phi(z - shift_s, z - shift, a); }
};

struct ScoreEntropy {
  static constexpr int kPasses = 1;
  template <typename C>
  using Zero = ExpTerm<C>;  // where a is 0
  template <typename C>
  using Near = PhiTerm<C>;
};

// exp(z - shift)^2 / 2
template <typename C>
struct SquareTerm;

template <>
struct SquareTerm<float> : Terms {
  static constexpr float kMost = 44;
  float shift;

  FASTDIFF_HD SquareTerm(double shift_, double, double) : shift(static_cast<float>(shift_)) {}
  FASTDIFF_HD Term<float> operator()(float z) const {
    const float e = exp_(2 * (z - shift));
    return {0.5f * e, e};
  }
};

template <>
struct SquareTerm<double> : Terms {
  static constexpr double kMost = 354;
  double shift;

  FASTDIFF_HD SquareTerm(const RowWeight& weight, double shift_, double, double)
      : Terms{weight.factor}, shift(shift_ - std::log(weight.share) / 2) {}
  FASTDIFF_HD Term<double> operator()(double z) const {
    const double e = std::exp(2 * (z - shift));
    return {e / 2, e};
  }
};

// (exp(z - shift) - a)^2 / 2
template <typename C>
struct DistanceTerm;

template <>
struct DistanceTerm<float> : Terms {
  static constexpr float kMost = 44;
  float shift;

  FASTDIFF_HD DistanceTerm(double shift_, double a, double log_a)
      : Terms{a * a}, shift(static_cast<float>(shift_ + log_a)) {}
  FASTDIFF_HD Term<float> operator()(float z) const {
    const Exponential x(z - shift);
    const float less_one = x.less_one();
    return {0.5f * less_one * less_one, less_one * x.whole()};
  }
};

template <>
struct DistanceTerm<double> : Terms {
  static constexpr double kMost = 354;
  double shift, shift_s, a;

  FASTDIFF_HD DistanceTerm(const RowWeight& weight, double shift_, double a_, double log_a)
      : Terms{weight.factor},
        shift(shift_ + log_a),
        shift_s(shift_ - std::log(weight.share) / 2),
        a(a_ * std::sqrt(weight.share)) {}
  FASTDIFF_HD Term<double> operator()(double z) const {
    const double d = z - shift, e = std::exp(z - shift_s), distance = d < 1 ? a * std::expm1(d) : e - a;
    return {distance * distance / 2, distance * e};
  }
};

struct ScoreMatching {
  static constexpr int kPasses = 1;
  template <typename C>
  using Zero = SquareTerm<C>;
  template <typename C>
  using Near = DistanceTerm<C>;
};

}  // namespace fastdiff
