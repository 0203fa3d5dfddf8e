// A row of scores: a plain sum, so loss and gradient come from one pass.
#pragma once

#include <cfloat>
#include <type_traits>

#include "row_loss.h"

namespace fastdiff {

// The sum of a few terms, which make room for scale times their derivatives; infinite where they have no room in C.
template <typename C, typename F, int kMany>
__device__ C sum_terms(const F& term, C scale, Few<kMany>& few) {
  C sum = 0;
  for (float& x : few.x) {
    const bool fits = std::is_same_v<C, double> || x - static_cast<float>(term.shift) < F::kMost;
    const Term<C> t = term(x);
    sum += fits ? t.value : INFINITY;
    x = static_cast<float>(scale * t.slope);
  }
  return sum;
}

// The same in double, out of the way of the registers.
template <typename F, int kMany>
__device__ __noinline__ double exact_terms(const F& term, Few<kMany>& few) {
  return term.factor * sum_terms(term, term.factor, few);
}

// What overflows is computed again in double, with the weight in the exponent; all of it if float has no such weight.
// neutral is a number whose term is 0.
template <bool kGrad, typename F, template <typename> class Kind, typename T>
__device__ Results scores_pass(const Work<T>& work, float neutral, double a, double log_a) {
  const Constants& constants = work.shared.constants;
  const ScoresRow& scores = constants.scores;
  const double shift = constants.shift;
  const RowWeight weight(constants.weight * scores.scale);
  Term<double> at_x0{work.x0 < -1 ? NAN : 0.0, 0};  // an id that does not exist
  if (work.minds(work.x0) && work.x0 != work.left_out) {
    const typename F::template Near<double> term(weight, shift, scores.a_x0, scores.log_a_x0);
    at_x0 = term(work.number(work.x0));
    at_x0.value *= term.factor, at_x0.slope *= term.factor;
  }
  __syncthreads();  // a gradient in the place of its row must not come before this
  const Target<T> grad(work.grad, work.row.head);
  const Kind<float> term(shift, a, log_a);
  const double scale = constants.weight * scores.scale * term.factor;
  const auto narrow = static_cast<float>(scale);
  const bool holds = scale == 0 || (fabsf(narrow) >= FLT_MIN && fabsf(narrow) < INFINITY);
  const float limit = holds ? INFINITY : 0;
  float sum = 0;
  double overflown = 0;
  work.row.each([&](auto& few) {
    work.set_apart(few, neutral);
    auto numbers = few;
    const float more = sum + sum_terms(term, narrow, few);
    if (fabsf(more) < limit) {
      sum = more;
    } else {
      const Kind<double> exact(weight, shift, a, log_a);
      overflown += exact_terms(exact, numbers);
      numbers.set(work.left_out, work.left_out, 0);
      few = numbers;
    }
    if constexpr (kGrad) grad.put(few);
  });
  Cluster::wait();
  const double loss = reduce_cluster(scale * sum + overflown + at_x0.value, work.shared.sum, Add());
  if (kGrad && work.minds(work.x0)) store(work.grad + work.x0, static_cast<float>(at_x0.slope));
  return {loss};
}

template <typename F, bool kGrad, typename T>
__device__ Results scores_row(const Work<T>& work) {
  const ScoresRow& scores = work.shared.constants.scores;
  if (scores.a == 0) return scores_pass<kGrad, F, F::template Zero>(work, -INFINITY, 0, 0);
  const auto neutral = static_cast<float>(work.shared.constants.shift + scores.log_a);
  return scores_pass<kGrad, F, F::template Near>(work, neutral, scores.a, scores.log_a);
}

}  // namespace fastdiff
