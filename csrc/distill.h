// The mathematics of distillation, for host and device. Twin of fastdiff/reference.py's kl.
//
// KL(p || q) = sum p phi(d), d = log q - log p, phi(d) = expm1(d) - d, as both sum to 1: no term is negative, and where
// p and q are close none is a difference of larger numbers. Its derivative for log q is p expm1(d) = q - p.
#pragma once

#include <limits>

#include "row_loss.h"

namespace fastdiff {

FASTDIFF_HD Term<double> phi(double d) { return scaled_phi(d, d, 1); }

// Below exp(-kFar) q, p adds nothing to the digits of a term, which is q.
template <typename C>
constexpr C kFar = sizeof(C) == sizeof(float) ? 20 : 600;

// p phi(d) and q - p. For d > kFar p counts as exp(-kFar) q, lest q be lost where p is 0, or vanishes in its type.
// Infinite where q is 0 and p is not.
template <typename C>
FASTDIFF_HD Term<C> kl_term(C log_p, C log_q, C d) {
  const C least = log_q - kFar<C>, p = exp_(log_p > least ? log_p : least);
  const Term<C> t = phi(d > kFar<C> ? kFar<C> : d);
  return {d < -std::numeric_limits<C>::max() ? std::numeric_limits<C>::infinity() : p * t.value, p * t.slope};
}

// The log-probability of x * scale in a softmax whose log-sum-exp, in two parts, keeps its digits in float. NaN if that
// is not finite, as in PyTorch.
template <typename C>
struct LogSoftmax {
  C scale, high, low;

  FASTDIFF_HD LogSoftmax(double scale_, double logsumexp)
      : scale(static_cast<C>(scale_)), high(static_cast<C>(logsumexp)), low(static_cast<C>(logsumexp - high)) {
    if (!(std::fabs(logsumexp) < std::numeric_limits<C>::infinity())) high = low = std::numeric_limits<C>::quiet_NaN();
  }
  FASTDIFF_HD C operator()(C x) const { return (x * scale - high) - low; }
};

// The terms of a row whose student has numbers z and whose teacher t.
template <typename C>
struct KlRow {
  LogSoftmax<C> student, teacher;
  C shift;

  FASTDIFF_HD KlRow(double scale, double student_sum, double teacher_sum)
      : student(scale, student_sum),
        teacher(scale, teacher_sum),
        shift((student.high - teacher.high) + (student.low - teacher.low)) {}
  // log q - log p, without the rounding of either.
  FASTDIFF_HD C log_ratio(C z, C t) const { return z == t ? -shift : (z - t) * student.scale - shift; }
  FASTDIFF_HD Term<C> forward(C z, C t) const { return kl_term(teacher(t), student(z), log_ratio(z, t)); }
  FASTDIFF_HD C reverse(C z, C t) const { return kl_term(student(z), teacher(t), -log_ratio(z, t)).value; }
  // The reverse loss's derivative for z * scale.
  FASTDIFF_HD C reverse_slope(C z, C t, C loss) const {
    const C q = exp_(student(z));
    return q == 0 ? 0 : q * (log_ratio(z, t) - loss);
  }
};

// One outcome of the two, in double: of ids that count as one, too.
struct Outcome {
  double log_p, log_q;

  FASTDIFF_HD double log_ratio() const { return log_q == log_p ? 0 : log_q - log_p; }
  FASTDIFF_HD double term(bool reverse) const {
    return reverse ? kl_term(log_q, log_p, -log_ratio()).value : kl_term(log_p, log_q, log_ratio()).value;
  }
  // The loss's derivative for log q if the other outcomes keep their shares of what is left.
  FASTDIFF_HD double slope(bool reverse, double loss) const {
    if (!reverse) return kl_term(log_p, log_q, log_ratio()).slope;
    const double q = std::exp(log_q);
    return q == 0 ? 0 : q * (log_ratio() - loss);
  }
};

// log of what probabilities with this sum leave to the others, and what is to be taken off their logarithms.
FASTDIFF_HD double log_left(double sum) {
  return sum < 1 ? std::log1p(-sum) : -std::numeric_limits<double>::infinity();
}
FASTDIFF_HD double log_excess(double sum) { return sum > 1 ? std::log(sum) : 0; }

}  // namespace fastdiff
