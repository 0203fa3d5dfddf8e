// A row of scores: a plain sum, so loss and gradient come from one pass.
#pragma once

#include "row.h"

namespace fastdiff {

// Adds a run to the sum and stores its gradient, scale times the derivatives; unless it overflows, if that is to be
// avoided: then nothing, and false.
template <bool kGrad, bool kAvoid, typename C, typename T, typename F>
FASTDIFF_HD bool scores_run(const Row<T>& row, const F& term, double scale, int64_t first, int64_t n, double& sum) {
  C out[kBlock];
  const Block<C> block = sum_terms<kGrad>(term, row.z + first, out, n);
  if (kAvoid && (block.max >= term.shift + F::kMost || !std::isfinite(block.sum))) return false;
  if constexpr (kGrad) store_scaled(row.grad + first, out, n, scale * term.factor);
  sum += scale * term.factor * block.sum;
  return true;
}

// Blocks that overflow are computed again in double, with the weight in the exponent; numbers in double have it there.
template <bool kGrad, template <typename> class F, typename T>
FASTDIFF_HD double scores_runs(const Row<T>& row, double scale, double shift, double a, double log_a) {
  const F<double> exact(RowWeight(scale), shift, a, log_a);
  double sum = 0;
  if constexpr (std::is_same_v<Acc<T>, double>) {
    row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
      scores_run<kGrad, false, double>(row, exact, 1, first, n, sum);
    });
  } else {
    const F<float> term(shift, a, log_a);
    row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
      if (!scores_run<kGrad, true, float>(row, term, scale, first, n, sum))
        scores_run<kGrad, false, double>(row, exact, 1, first, n, sum);
    });
  }
  return sum;
}

// F::Zero and F::Near are the terms where the ratio is 0 and where it is not.
template <typename F, bool kGrad, typename T>
FASTDIFF_HD double scores_row(const Row<T>& row, double weight, double shift, const ScoresRow& scores) {
  const double scale = weight * scores.scale;
  const int64_t x0 = row.apart.x0, left_out = row.apart.left_out;
  double sum = scores.a > 0 ? scores_runs<kGrad, F::template Near>(row, scale, shift, scores.a, scores.log_a)
                            : scores_runs<kGrad, F::template Zero>(row, scale, shift, 0, 0);
  if (x0 >= 0 && x0 != left_out) {
    const typename F::template Near<double> at_x0(RowWeight(scale), shift, scores.a_x0, scores.log_a_x0);
    const Term<double> term = at_x0(row.number(x0));
    sum += at_x0.factor * term.value;
    if constexpr (kGrad) store(row.grad + x0, static_cast<Acc<T>>(at_x0.factor * term.slope));
  }
  if (kGrad && left_out >= 0) store(row.grad + left_out, Acc<T>(0));
  return sum;
}

}  // namespace fastdiff
