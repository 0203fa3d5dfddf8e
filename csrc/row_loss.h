// All that the kernels know of each row loss, for host and device. Twin of fastdiff/reference/.
//
// A row is V numbers z. A few ids are treated apart, in double (Apart). All others share one formula, of a family:
//   softmax  loss = -log p_x0,  p = softmax(z), an offset added to z at x_t before
//            and with a weight of its own -sum_y p_y log p_y
//   scores   loss = scale sum_y term(s_y),  s = z - shift, at the ratio a_y = p(y | x0) / p(x_t | x0):
//            score entropy a phi(s - log a), phi(d) = expm1(d) - d, or concrete score matching (exp(s) - a)^2 / 2
//   affine   loss = a sum_y gap(rho_y) + what x0 and x_t add,  rho_y = slope c_y + offset,  c = softmax(z),
//            gap(rho) = rho - 1 - log(rho)
// A functor is an entry of kFunctors, and a branch of its family's constants: SoftmaxRow, ScoresRow or AffineRow.
#pragma once

#include <string>

#include "elementary.h"
#include "tensor.h"

namespace fastdiff {

enum class Functor {
  dce,
  loo,
  dse_absorb,
  dse_uniform,
  csm_absorb,
  csm_uniform,
  dse_uniform_logits,
  d3pm_uniform,
  mixture,
};

// What x_t may be: x0 or the mask, of which only masks are scored; any id; or any id, where the mask is one of its own.
enum class Noised { absorb, uniform, mixture };

// What a row's one more number is, and must be.
enum class Extra { none, sigma_s, share };

struct Traits {
  Functor functor;
  const char* name;
  Noised noised;
  bool scores;         // rows are log scores, where x_t has no part
  bool clean = false;  // sigma may be 0: everywhere, or of scores where x_t is x0
  Extra extra = Extra::none;
};

constexpr Traits kFunctors[] = {
    {Functor::dce, "dce", Noised::absorb, false},
    {Functor::loo, "loo", Noised::uniform, false},
    {Functor::dse_absorb, "dse_absorb", Noised::absorb, true},
    {Functor::dse_uniform, "dse_uniform", Noised::uniform, true, true},
    {Functor::csm_absorb, "csm_absorb", Noised::absorb, true},
    {Functor::csm_uniform, "csm_uniform", Noised::uniform, true, true},
    {Functor::dse_uniform_logits, "dse_uniform_logits", Noised::uniform, false},
    {Functor::d3pm_uniform, "d3pm_uniform", Noised::uniform, false, false, Extra::sigma_s},
    {Functor::mixture, "mixture", Noised::mixture, false, true, Extra::share},
};

inline const Traits& functor_named(const std::string& name) {
  std::string names;
  for (const Traits& traits : kFunctors) {
    if (name == traits.name) return traits;
    names += (names.empty() ? "" : ", ") + std::string(traits.name);
  }
  bad_value("functor: expected one of ", names, ", got ", name);
}

// The ids of a row that are treated apart; negative if they are not in it. left_out has no part in the loss; x_t is
// here where it has a part of its own, and is not x0.
struct Apart {
  int64_t x0, left_out, xt;

  FASTDIFF_HD explicit Apart(int64_t left_out_) : x0(-1), left_out(left_out_), xt(-1) {}
  // exclude: the mask has no part.
  FASTDIFF_HD Apart(const Traits& traits, int64_t x0_, int64_t xt_, int64_t mask_index, bool exclude)
      : x0(x0_), left_out(-1), xt(-1) {
    if (traits.noised != Noised::uniform && exclude) left_out = mask_index;
    if (traits.noised == Noised::uniform && traits.scores) left_out = xt_;
    if (traits.noised != Noised::absorb && !traits.scores && xt_ != x0 && xt_ != left_out) xt = xt_;
  }
};

// Functions of the total noise sigma, safe from 1e-6 to 700: e1 = expm1(sigma) is never formed.
struct Noise {
  double alpha, rest;  // exp(-sigma), and 1 less it
  double inv_e1, log_e1;

  FASTDIFF_HD explicit Noise(double sigma)
      : alpha(std::exp(-sigma)), rest(-std::expm1(-sigma)), inv_e1(alpha / rest), log_e1(sigma + std::log(rest)) {}
};

// ---------------------------------------------------------------------------------------------------------
// Softmax.

struct SoftmaxRow {
  double weight = 1, offset = 0;

  // sigma is null if none is given.
  FASTDIFF_HD SoftmaxRow(Functor functor, const double* sigma, int64_t num_states) {
    if (!sigma) return;
    const double inv_e1 = Noise(*sigma).inv_e1;
    if (functor == Functor::dce) weight = inv_e1;  // turns conditionals into scores: DSE of log c - log e1 is DCE / e1
    if (functor == Functor::loo) offset = std::log1p(static_cast<double>(num_states) * inv_e1);
  }
};

// ---------------------------------------------------------------------------------------------------------
// Scores.

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

// ---------------------------------------------------------------------------------------------------------
// Affine.

// What the softmax c gives to x0 and x_t. A rest is 1 - c, summed from the other ids. Where x_t is x0 its c is x0's;
// where it has no part, 0.
struct Conditionals {
  double c_x0, c_xt, rest_x0, rest_xt, nll;  // -log c_x0
  bool moved, apart;                         // x_t is not x0, and has a part
};

// Constants of a row, without its weight. At x0, and at x_t if it is not x0, a mass is c times the loss's derivative
// for c.
struct AffineRow {
  double a, slope, offset, offset_w;  // rho - 1 = slope c + offset_w, which keeps its digits near 0
  double unit;                        // a slope
  double value, mass_x0, mass_xt;

  FASTDIFF_HD AffineRow(Functor functor, double sigma, double extra, double penalty, int64_t num_states,
                        const Conditionals& c)
      : mass_xt(0) {
    const double n = static_cast<double>(num_states);
    if (functor == Functor::d3pm_uniform)
      d3pm_uniform(Noise(sigma), extra, Noise(sigma - extra), penalty, n, c);
    else if (functor == Functor::mixture)
      mixture(Noise(sigma), extra, n - 1, c);
    else
      dse_uniform(n * Noise(sigma).inv_e1, n, c);
  }

  // Whether float has room for the product of two rhos, and for what multiplies their reciprocals.
  FASTDIFF_HD bool fits_float() const { return slope < 1e18 && offset < 1e18 && offset > 1e-11; }

 private:
  // Score entropy of the uniform graph at the score that conditionals imply, which is p_t(y) / p_t(x_t) with p_t(y)
  // proportional to 1 + k c_y, k = N / e1. With rho_y the score over the ratio a_y, and w_y = rho_y - 1,
  //   loss = 1/N sum_{y != x_t} a_y (w_y - log rho_y),
  //   d loss / d c_y = k / (N b) (1 - 1 / rho_y), b = 1 + k c_xt;  at x_t it is -k / (N b) sum a_y w_y.
  FASTDIFF_HD void dse_uniform(double k, double n, const Conditionals& c) {
    const double b = 1 + k * c.c_xt, ratio = c.moved ? 1 : 1 / (1 + k);
    a = ratio / n, unit = k / (n * b);
    slope = k / (ratio * b), offset = 1 / (ratio * b), offset_w = (c.moved ? -k * c.c_xt : k * c.rest_xt) / b;
    const double at_xt = unit * k * (n + k) / b * c.c_xt;
    if (c.moved) {
      const Gap x0(-k * (c.rest_x0 + c.c_xt * (1 + k)), 1 + k * c.c_x0, (1 + k) * b);
      value = (1 + k) / n * x0.value, mass_x0 = unit * c.c_x0 * x0.pull, mass_xt = at_xt * c.c_xt;
    } else {
      value = 0, mass_x0 = -at_xt * c.rest_xt * ratio;
    }
  }

  // KL(q(x_s | x_t, x0) || p(x_s | x_t)) of the uniform graph, from sigma to sigma_s, `step` being the noise between
  // them. Either of q_y and p_y is q(x_t | y) (alpha_s c_y + (1 - alpha_s) / N), normalised, with c or one-hot x0 for
  // c, so that with k = N / e1 and k_s = N / e1(sigma_s)
  //   rho_y = p_y / q_y = (1 + k_s c_y) / (1 + k_s [y = x0]) (1 + k [x_t = x0]) / (1 + k c_xt).
  // As both sum to 1 the KL is sum_y q_y gap(rho_y), and the normaliser adds nothing to its derivative.
  FASTDIFF_HD void d3pm_uniform(const Noise& t, double sigma_s, const Noise& step, double penalty, double n,
                                const Conditionals& c) {
    a = slope = offset_w = unit = 0, offset = 1;
    value = (penalty + (sigma_s == 0)) * c.nll, mass_x0 = -(penalty + (sigma_s == 0));
    if (sigma_s == 0) return;  // the last step, where the model says x0
    const Noise s(sigma_s);
    const double k = n * t.inv_e1, k_s = n * s.inv_e1, b = 1 + k * c.c_xt, m = c.moved ? 1 : 1 + k;
    const double between = n * s.alpha * step.rest / (t.rest * s.rest);  // k_s - k
    const double keeps = s.alpha + s.rest / n, stays = step.alpha + step.rest / n;
    a = step.rest * s.rest / (n * t.rest * m), unit = step.rest * s.alpha / (t.rest * b);
    slope = k_s * m / b, offset = m / b, offset_w = (c.moved ? -k * c.c_xt : k * c.rest_xt) / b;
    const double unit_xt = (step.rest + n * step.alpha) * s.alpha / (t.rest * b);
    if (c.moved) {
      const Gap x0(-(k_s * c.rest_x0 + k * c.c_xt * (1 + k_s)), 1 + k_s * c.c_x0, (1 + k_s) * b);
      const Gap xt(between * c.c_xt, 1 + k_s * c.c_xt, b);
      value += step.rest / t.rest * keeps * x0.value + stays * s.rest / t.rest * xt.value;
      mass_x0 += unit * c.c_x0 * x0.pull, mass_xt = unit_xt * c.c_xt * xt.pull;
    } else {
      const Gap x0(-between * c.rest_xt, (1 + k_s * c.c_x0) * (1 + k), (1 + k_s) * b);
      value += stays * keeps / (t.alpha + t.rest / n) * x0.value, mass_x0 += unit_xt * c.c_x0 * x0.pull;
    }
  }

  // KL(q_t(. | x0) || q_t(. | c)) + IS(x_t) where noise is the mask or, for `share` of it, any of the n other ids:
  // q_t(y | c) = alpha c_y + base, base = (1 - alpha) share / n, and the mask's does not know c. IS is gap(1 / rho_xt),
  // 0 of the mask. With t = base / alpha rho is 1 + c / t, and (c + t) / (1 + t) at x0. A base of 0 gives
  // cross-entropy, here from a t next to it.
  FASTDIFF_HD void mixture(const Noise& noise, double share, double n, const Conditionals& c) {
    constexpr double kLeastAlpha = 1e-280, kLeast = 2e-18;
    const double alpha = noise.alpha < kLeastAlpha ? kLeastAlpha : noise.alpha;
    const double base = noise.rest * share / n, t = base / alpha, least = t < kLeast ? kLeast : t;
    a = alpha * least, unit = alpha;
    slope = 1 / least, offset = 1, offset_w = 0;
    const double rho = (c.c_x0 + t) / (1 + t), part = 1 / (1 + (t > 0 ? t * std::exp(c.nll) : 0));  // c / (c + t)
    const double w = -c.rest_x0 / (1 + t), log_rho = t > 0 ? std::log(rho) : -c.nll;
    value = (alpha + base) * (std::fabs(w) < 1e-3 ? log_gap(w, rho) : w - log_rho), mass_x0 = -alpha * c.rest_x0 * part;
    if (c.apart) {
      const double w_xt = c.c_xt / least, rho_xt = 1 + w_xt, pull = w_xt / rho_xt;
      value += a * log_gap(w_xt, rho_xt) + log_gap(-pull, 1 / rho_xt);
      mass_xt = pull * (alpha * c.c_xt + pull);
    } else if (!c.moved) {
      const double v = c.rest_x0 / (c.c_x0 + t);  // 1 / rho - 1
      value += std::fabs(v) < 1e-3 ? log_gap(v, 1 + v) : v + log_rho, mass_x0 -= v * part;
    }
  }

  // gap(rho) of rho = 1 + w and its derivative, from w and rho times a divisor.
  struct Gap {
    double value, pull;

    FASTDIFF_HD Gap(double w, double rho, double divisor) : value(log_gap(w / divisor, rho / divisor)), pull(w / rho) {}
  };
};

// ---------------------------------------------------------------------------------------------------------

struct Softmax {
  static constexpr int kPasses = 2;
};
struct Affine {
  static constexpr int kPasses = 3;
};

// Calls f with a functor's family.
template <typename F>
auto with_family(Functor functor, const F& f) {
  switch (functor) {
    case Functor::dce:
    case Functor::loo:
      return f(Softmax());
    case Functor::dse_absorb:
    case Functor::dse_uniform:
      return f(ScoreEntropy());
    case Functor::csm_absorb:
    case Functor::csm_uniform:
      return f(ScoreMatching());
    default:
      return f(Affine());
  }
}

}  // namespace fastdiff
