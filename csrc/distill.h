// The mathematics of distillation, for host and device. Twin of fastdiff/reference/distillation.py.
//
// KL(p || q) = sum p phi(d), d = log q - log p, phi(d) = expm1(d) - d, as both sum to 1: no term is negative, and where
// p and q are close none is a difference of larger numbers. Its derivative for log q is p expm1(d) = q - p.
#pragma once

#include <limits>

#include "row_loss.h"

namespace fastdiff {

// phi(d) for |d| < 1.
FASTDIFF_HD float near_phi(float d) {
  float p = 2.765987155e-6f;
  p = p * d + 2.535379608e-5f;
  p = p * d + 1.984511484e-4f;
  p = p * d + 1.388546742e-3f;
  p = p * d + 8.333304899e-3f;
  p = p * d + 4.166673397e-2f;
  p = p * d + 1.666666708e-1f;
  p = p * d + 4.999999980e-1f;
  return p * d * d;
}
FASTDIFF_HD double near_phi(double d) { return scaled_phi(d, d, 1).value; }

// p phi(d) and q - p. Infinite where q is 0 and p is not.
template <typename C>
FASTDIFF_HD Term<C> kl_term(C p, C q, C d) {
  const C difference = q - p, phi = near_phi(d);
  const C finite = d > C(1000) ? C(1000) : d;  // where p is 0
  const bool near = std::fabs(d) < 1;
  const C value = near ? p * phi : difference - p * finite;
  return {d < -std::numeric_limits<C>::max() ? std::numeric_limits<C>::infinity() : value,
          near ? p * (phi + d) : difference};
}

// exp(scale x) over its sum, of which the sum of exp(scale (x - top)) is known. NaN for a row that has +inf or only
// -inf, as in PyTorch.
template <typename C>
struct Conditional {
  C scale, top, factor;
  double log_sum;  // less scale top

  FASTDIFF_HD Conditional(double scale_, C top_, double sum)
      : scale(static_cast<C>(scale_)), top(top_), factor(static_cast<C>(1 / sum)), log_sum(std::log(sum)) {
    if (!(sum > 0)) factor = std::numeric_limits<C>::quiet_NaN(), log_sum = factor;
  }
  FASTDIFF_HD C operator()(C x) const { return exp_((x - top) * scale) * factor; }
  FASTDIFF_HD double log(C x) const { return (static_cast<double>(x) - top) * scale - log_sum; }
};

// The terms of a row whose student has numbers z and whose teacher t.
template <typename C>
struct KlRow {
  Conditional<C> student, teacher;
  C from, from_teacher, shift;

  FASTDIFF_HD KlRow(const Conditional<C>& student_, const Conditional<C>& teacher_)
      : student(student_), teacher(teacher_), from(0), from_teacher(0) {
    double apart = student.scale * (static_cast<double>(student.top) - teacher.top);
    if (std::fabs(apart) > 100) from = student.top, from_teacher = teacher.top, apart = 0;
    shift = static_cast<C>(apart + (student.log_sum - teacher.log_sum));
  }
  // log q - log p, without the rounding of either; where the rows lie far apart, from what each is less its top.
  FASTDIFF_HD C log_ratio(C z, C t) const {
    const C x = z - from, y = t - from_teacher;
    return x == y ? -shift : (x - y) * student.scale - shift;
  }
  FASTDIFF_HD Term<C> forward(C z, C t) const { return kl_term(teacher(t), student(z), log_ratio(z, t)); }
  FASTDIFF_HD C reverse(C z, C t) const { return kl_term(student(z), teacher(t), -log_ratio(z, t)).value; }
  // The reverse loss's derivative for z * scale.
  FASTDIFF_HD C reverse_slope(C z, C t, C loss) const {
    const C q = student(z);
    return q == 0 ? 0 : q * (log_ratio(z, t) - loss);
  }
};

// One outcome of the two, in double: of ids that count as one, too.
struct Outcome {
  double log_p, log_q;

  FASTDIFF_HD double log_ratio() const { return log_q == log_p ? 0 : log_q - log_p; }
  FASTDIFF_HD double term(bool reverse) const {
    const double p = std::exp(log_p), q = std::exp(log_q);
    return reverse ? kl_term(q, p, -log_ratio()).value : kl_term(p, q, log_ratio()).value;
  }
  // The loss's derivative for log q if the other outcomes keep their shares of what is left.
  FASTDIFF_HD double slope(bool reverse, double loss) const {
    const double q = std::exp(log_q);
    if (!reverse) return kl_term(std::exp(log_p), q, log_ratio()).slope;
    return q == 0 ? 0 : q * (log_ratio() - loss);
  }
};

// log of what probabilities with this sum leave to the other ids, and what is to be taken off their logarithms. Where
// there are no others, and above 1, a sum is off by rounding.
FASTDIFF_HD double log_left(double sum, bool are_all) {
  return are_all || sum >= 1 ? -std::numeric_limits<double>::infinity() : std::log1p(-sum);
}
FASTDIFF_HD double log_excess(double sum, bool are_all) { return are_all || sum > 1 ? std::log(sum) : 0; }

}  // namespace fastdiff
