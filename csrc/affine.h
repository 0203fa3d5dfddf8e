// Losses that are affine in conditionals: the constants of a row.
#pragma once

#include "functors.h"

namespace fastdiff {

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

}  // namespace fastdiff
