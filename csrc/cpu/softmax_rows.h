// A row of logits: the exponentials are kept from the first pass, the second multiplies them by what the sum makes
// known. Those of BFloat16 it computes again: twice a row, they would have to be written into the cache and read from
// it.
#pragma once

#include <algorithm>
#include <type_traits>

#include "exp_sums.h"

namespace fastdiff {

struct RowStats {
  double logsumexp = 0, entropy = 0, correct = 0, nll = 0;
};

// -sum p log p, from the row's log-sum-exp, which is top + log_sum, and the numbers at x0 and x_t; of a part of a row,
// as if it were all.
template <typename T>
FASTDIFF_HD double entropy(const Row<T>& row, double at_x0, double at_xt, Acc<T> top, double log_sum) {
  using C = Acc<T>;
  const auto part = [&](C x) __attribute__((always_inline)) { return x < C(-86) ? 0 : exp_(x) * x; };
  const auto term = [&](C z) __attribute__((always_inline)) { return Term<C>{part(z - top), 0}; };
  double sum = part(static_cast<C>(at_x0 - top)) + part(static_cast<C>(at_xt - top));
  row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
    sum += sum_terms<false>(term, row.z + first, static_cast<C*>(nullptr), n).sum;
  });
  return log_sum - sum * std::exp(-log_sum);
}

// The gradient p (slope - e (log p + H)) of a run, from its exponentials: p is share times one of them, and
// log p is z - top - log_sum. In parts of the larger factor, so that the others fit the working type.
template <typename T>
FASTDIFF_HD void entropy_grad(const T* z, const Acc<T>* e, T* grad, int64_t n, Acc<T> top, double share,
                              double constant, double entropy_weight) {
  using C = Acc<T>;
  const double size = std::max(std::fabs(constant), std::fabs(entropy_weight));
  const C a = static_cast<C>(constant / size), b = static_cast<C>(entropy_weight / size);
  C out[kBlock];
#pragma omp simd
  for (int64_t v = 0; v < n; ++v) {
    const C x = load(z[v]) - top;
    out[v] = e[v] * (a - b * (x < C(-1000) ? C(-1000) : x));  // no NaN where p is 0
  }
  store_scaled(grad, out, n, share * size);
}

// weight (nll + penalty logsumexp^2) + entropy_weight H. With x0 elsewhere, as if its number were 0 and its probability
// nothing: its nll is the log-sum-exp.
template <bool kGrad, typename T>
FASTDIFF_HD double softmax_row(const Row<T>& row, const SoftmaxRow& softmax, double weight, double entropy_weight,
                               double penalty, Scratch<T>& scratch, RowStats* stats) {
  using C = Acc<T>;
  const auto [x0, left_out, xt] = row.apart;
  const bool here = x0 >= 0, still = here && xt < 0;  // then an offset is x0's
  const double at_x0 = here ? row.number(x0) + (still ? softmax.offset : 0) : -kInfinity<double>;
  const double at_xt = xt >= 0 ? row.number(xt) + softmax.offset : -kInfinity<double>;
  weight *= softmax.weight;
  ExpSum others{at_x0, 0};
  double largest[] = {-kInfinity<double>, -kInfinity<double>};  // before x0, and after it
  largest[xt > x0] = at_xt;
  constexpr bool kKeep = kGrad && !std::is_same_v<T, BFloat16>;
  C* kept = kKeep ? scratch.kept(row) : nullptr;
  C* shift = scratch.shifts.data();
  row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
    C max;
    *shift++ = add_run<kKeep>(others, row.z + first, kKeep ? kept + first : kept, n, max);
    double& most = largest[first > x0];  // where a branch would have GCC copy the loop, and not vectorise the copy
    most = max > most ? max : most;
  });
  if (xt >= 0) others.add(at_xt, 1);
  if (others.shift == kInfinity<double>) others.sum = NAN;  // inf - inf, as in PyTorch
  ExpSum all = others;
  all.add(at_x0, here ? 1 : 0);
  const LogSum log_sum(others, all, at_x0);
  const double logsumexp = all.shift + log_sum.value;
  const double drift = penalty == 0 ? 0 : logsumexp;  // which may be infinite
  const double slope = 1 + 2 * penalty * drift;
  const double log_p = here ? -log_sum.nll : -logsumexp;
  const auto [before, after] = largest;
  const C top = static_cast<C>(std::max({at_x0, before, after}));
  const bool correct = at_x0 > before && at_x0 >= after && !std::isnan(all.sum);
  const bool with_entropy = entropy_weight != 0;
  const double log_sum_top = log_sum.value - (top - all.shift);
  const double h = stats || with_entropy ? entropy(row, at_x0, at_xt, top, log_sum_top) : 0;
  if (stats) *stats = {logsumexp, h, static_cast<double>(correct), -log_p};
  if constexpr (kGrad) {
    if (!here && all.sum == 0) all.sum = kInfinity<double>;  // a part of the row without weight
    Shares shares{all};
    shift = scratch.shifts.data();
    row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
      C again[kBlock], *e = kKeep ? kept + first : again;
      if constexpr (!kKeep) sum_terms<true>(Relative<C>{*shift}, row.z + first, e, n);
      const double share = shares.of(*shift++);
      if (with_entropy && share != 0)
        entropy_grad(row.z + first, e, row.grad + first, n, top, share,
                     weight * slope - entropy_weight * (h - log_sum_top), entropy_weight);
      else
        store_scaled(row.grad + first, e, n, share == 0 ? 0 : weight * slope * share);
    });
    const auto pull = [&](double log_p) {  // of the entropy
      const double p = std::exp(log_p);
      return with_entropy && p > 0 ? entropy_weight * p * (log_p + h) : 0;
    };
    const double p = std::exp(log_p), log_p_xt = (at_xt - all.shift) - log_sum.value;
    if (here) store(row.grad + x0, static_cast<C>(weight * (std::expm1(log_p) + (slope - 1) * p) - pull(log_p)));
    if (xt >= 0) store(row.grad + xt, static_cast<C>(weight * slope * std::exp(log_p_xt) - pull(log_p_xt)));
    if (left_out >= 0) store(row.grad + left_out, C(0));
  }
  return weight * (penalty * drift * drift - log_p) + (with_entropy ? entropy_weight * h : 0);
}

}  // namespace fastdiff
