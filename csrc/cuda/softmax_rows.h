// A row of logits: a sum of exponentials, relative to a running maximum, then the gradient.
#pragma once

#include "row_loss.h"

namespace fastdiff {

// Over all ids that are not treated apart.
template <typename T>
__device__ Online sum_exp(const Work<T>& work) {
  Online all;
  work.row.each([&](auto& few) {
    work.set_apart(few, -INFINITY);
    all.add(few);
  });
  Cluster::wait();
  return reduce_cluster(all, work.shared.online, MergeOnline());
}

// The number of an id, for all threads: before any gradient is written. Elsewhere it is as if it weighed nothing.
template <typename T>
__device__ float number_at(const Work<T>& work, int id) {
  return id >= 0 ? work.number(id) : id == -1 ? -INFINITY : NAN;
}

// log p of x0, and the log-sum-exp. Neither is 1 added to a small sum, nor the shift to log(sum): digits would be lost.
struct LogP {
  double logsumexp, x0, xt;

  __device__ LogP(const Online& others, double at_x0, double at_xt, bool elsewhere) {
    const double other = others.m, shift = fmax(fmax(other, at_xt), at_x0);
    double rest = others.s * std::exp(other - shift) + std::exp(at_xt - shift);
    if (shift == INFINITY) rest = NAN;  // inf - inf, as in PyTorch
    const double log_sum = at_x0 == shift ? std::log1p(rest) : std::log(rest + std::exp(at_x0 - shift));
    logsumexp = shift + log_sum;
    x0 = elsewhere ? -logsumexp : (at_x0 - shift) - log_sum;
    xt = (at_xt - shift) - log_sum;
  }
};

// Writes the gradients exp(x) (slope - pull x) of all ids, x = z - shift; the sum of exp(x) x over those that are not
// apart, and how many numbers stand before x0's.
template <bool kGrad, bool kStats, bool kEntropy, typename T>
__device__ Pair softmax_pass(const Work<T>& work, float at_x0, float shift, double slope, double pull) {
  const double excess = fmax(fmax(fabs(slope), fabs(pull)) * 1e-30, 1.0);  // what float has no room for
  const auto a = static_cast<float>(slope / excess), b = static_cast<float>(pull / excess);
  const auto size = static_cast<float>(excess);
  const Target<T> grad(work.grad, work.row.head);
  float dot = 0;
  int ahead = 0;
  work.row.each([&](auto& few) {
    if constexpr (kStats) work.set_apart(few, -INFINITY);
    for (int i = 0; i < few.kSize; ++i) {
      const float z = few.x[i], x = z - shift, e = exp_(x);
      if constexpr (kStats) {
        dot += x < -86 ? 0.0f : e * x;
        ahead += z > at_x0 || (z == at_x0 && few.first + i < work.x0);
      }
      few.x[i] = (kEntropy ? a - b * fmaxf(x, -1000) : a) * e * size;  // no NaN where e is 0
    }
    if constexpr (kGrad) grad.put(few);
  });
  return {dot, static_cast<double>(ahead)};
}

template <bool kGrad, bool kStats, bool kEntropy, typename T>
__device__ Results softmax_row(const Work<T>& work, double penalty) {
  const double offset = work.shared.constants.offset;
  const double at_x0 = number_at(work, work.x0) + (work.xt < 0 ? offset : 0);  // of x_t, if it is x0
  const double at_xt = number_at(work, work.xt) + offset;
  const bool elsewhere = work.x0 == -1;
  const Online others = sum_exp(work);
  const double weight = work.shared.constants.weight, entropy_weight = work.shared.constants.entropy_weight;

  Results results{};
  double grad_x0 = 0, grad_xt = 0;
  if (work.leads() || work.minds(work.x0) || work.minds(work.xt)) {
    const LogP log_p(others, at_x0, at_xt, elsewhere);
    const double drift = penalty == 0 ? 0 : log_p.logsumexp;  // which may be infinite
    results.logsumexp = log_p.logsumexp;
    results.nll = -log_p.x0;
    results.loss = weight * (penalty * drift * drift - log_p.x0);
    grad_x0 = weight * (std::expm1(log_p.x0) + 2 * penalty * drift * std::exp(log_p.x0));
    grad_xt = weight * (1 + 2 * penalty * drift) * std::exp(log_p.xt);
  }
  if (!kGrad && !kStats) return results;

  // The same in float, for the others.
  const float shift = fmaxf(fmaxf(others.m, static_cast<float>(at_xt)), static_cast<float>(at_x0));
  const auto x_x0 = static_cast<float>(at_x0 - shift), x_xt = static_cast<float>(at_xt - shift);
  const float e_x0 = exp_(x_x0), e_xt = exp_(x_xt);
  const float rest = others.s * exp_(others.m - shift) + e_xt, all = rest + e_x0;
  const float log_all = x_x0 >= 0 ? log1pf(rest) : logf(all);
  const bool is_nothing = elsewhere && all == 0;  // a part of the row without weight
  double slope = weight * (penalty == 0 ? 1 : 1 + 2 * penalty * (shift + log_all)), pull = entropy_weight;
  slope = is_nothing ? 0 : slope / all, pull = is_nothing ? 0 : pull / all;
  constexpr bool kAtOnce = kGrad && !kEntropy;
  const auto narrow = static_cast<float>(at_x0);
  Pair sums = softmax_pass<kAtOnce, kStats, false>(work, narrow, shift, slope, 0);
  if constexpr (kStats) {
    sums = reduce_cluster(sums, work.shared.pair, Add());
    const double mean = (sums.a + (e_x0 > 0 ? e_x0 * x_x0 : 0) + (e_xt > 0 ? e_xt * x_xt : 0)) / all;
    const bool ahead = at_xt > at_x0 || (at_xt == at_x0 && work.xt >= 0 && work.xt < work.x0);
    results.entropy = log_all - mean;
    results.correct = sums.b == 0 && !ahead && all == all;
    if constexpr (kEntropy) {
      const auto pull_of = [&](double p) { return p == 0 ? 0 : entropy_weight * p * (results.entropy + std::log(p)); };
      results.loss += entropy_weight * results.entropy;
      grad_x0 -= pull_of(std::exp(-results.nll)), grad_xt -= pull_of(e_xt / all);
      if constexpr (kGrad)
        softmax_pass<true, false, true>(work, narrow, shift, is_nothing ? 0 : slope + pull * mean, pull);
    }
  }
  if constexpr (kGrad) {
    __syncthreads();
    if (work.minds(work.x0)) store(work.grad + work.x0, static_cast<float>(grad_x0));
    if (work.minds(work.xt)) store(work.grad + work.xt, static_cast<float>(grad_xt));
    if (work.minds(work.left_out)) store(work.grad + work.left_out, 0.0f);
  }
  return results;
}

}  // namespace fastdiff
