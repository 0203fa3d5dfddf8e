// One row: its loss and, if asked for, its gradient. The row is read from memory once and its gradient written once.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "../row_loss.h"

namespace fastdiff {

// Numbers summed in the working type before a sum goes into double. Loops with sanitizers have no lanes to share a sum.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kBlock = 64;
#else
constexpr int64_t kBlock = 1024;
#endif

// The type that numbers stored as T are computed in.
template <typename T>
using Acc = decltype(load(T()));

template <typename C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();

// A row and the place of its gradient, which may be its own. x0 and the excluded id (the mask or x_t) are treated
// apart; either is negative if it is not in the row.
template <typename T>
struct Row {
  const T* z;
  T* grad;
  int64_t num_states, x0, excluded;

  // Calls f(first, n) for runs of at most kBlock of the other ids, in rising order.
  template <typename F>
  FASTDIFF_HD void for_each_run(const F& f) const {
    const int64_t low = excluded < 0 ? x0 : std::min(x0, excluded), high = std::max(x0, excluded);
    const int64_t begin[] = {0, low + 1, high + 1}, end[] = {low, high, num_states};
    for (int k = 0; k < 3; ++k)
      for (int64_t first = begin[k]; first < end[k]; first += kBlock) f(first, std::min(kBlock, end[k] - first));
  }
};

// A block in the type it is computed in: itself, or a copy in the buffer.
template <typename C, typename T>
FASTDIFF_HD const C* widened(const T* from, int64_t n, C* buffer) {
  if constexpr (std::is_same_v<C, T>) {
    return from;
  } else {
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) buffer[v] = load(from[v]);
    return buffer;
  }
}

// to = scale * from, where both may be one place; in double if the scale leaves the range of float.
template <typename C, typename T>
FASTDIFF_HD void store_scaled(T* to, const C* from, int64_t n, double scale) {
  const auto narrow = static_cast<C>(scale);
  if (std::isnormal(narrow) || scale == 0) {
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) store(to + v, static_cast<Acc<T>>(narrow * from[v]));
  } else {
    for (int64_t v = 0; v < n; ++v) store(to + v, static_cast<Acc<T>>(scale * from[v]));
  }
}

template <typename C>
struct Block {
  C sum, max;  // of the terms, and of the numbers themselves
};

// The sum of term(x); with kKeep also their derivatives.
template <bool kKeep, typename F, typename C>
FASTDIFF_HD Block<C> sum_terms(const F& term, const C* x, C* kept, int64_t n) {
  C sum = 0, max = -kInfinity<C>;
#pragma omp simd reduction(+ : sum) reduction(max : max)
  for (int64_t v = 0; v < n; ++v) {
    const Term<C> t = term(x[v]);
    sum += t.value;
    max = x[v] > max ? x[v] : max;  // std::max would not vectorise
    if constexpr (kKeep) kept[v] = t.slope;
  }
  return {sum, max};
}

// ---------------------------------------------------------------------------------------------------------
// Score entropy: a plain sum, so loss and gradient come from one pass.

// Adds a run to the sum and stores its gradient, scale times the derivatives; unless it overflows, if that is to be
// avoided: then nothing, and false.
template <bool kGrad, bool kAvoid, typename C, typename T, typename F>
FASTDIFF_HD bool dse_run(const Row<T>& row, const F& term, double scale, int64_t first, int64_t n, double& sum) {
  constexpr C kMost = std::is_same_v<C, float> ? 88 : 709;
  C in[kBlock], out[kBlock];
  const Block<C> block = sum_terms<kGrad>(term, widened(row.z + first, n, in), out, n);
  if (kAvoid && (block.max >= term.shift + kMost || !std::isfinite(block.sum))) return false;
  if constexpr (kGrad) store_scaled(row.grad + first, out, n, scale * term.factor);
  sum += scale * term.factor * block.sum;
  return true;
}

// Blocks that overflow are computed again in double, with the weight in the exponent.
template <bool kGrad, template <typename> class F, typename T, typename... Constants>
FASTDIFF_HD double dse_runs(const Row<T>& row, double scale, Constants... constants) {
  using C = Acc<T>;
  const F<C> term(constants...);
  double sum = 0;
  row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
    if (dse_run<kGrad, true, C>(row, term, scale, first, n, sum)) return;
    dse_run<kGrad, false, double>(row, F<double>(RowWeight(scale), constants...), 1, first, n, sum);
  });
  return sum;
}

template <bool kGrad, typename T>
FASTDIFF_HD double dse_row(const Row<T>& row, double weight, double shift, const DseRow& dse) {
  const double scale = weight * dse.scale;
  double sum = dse.a > 0 ? dse_runs<kGrad, PhiTerm>(row, scale, shift, dse.a, dse.log_a)
                         : dse_runs<kGrad, ExpTerm>(row, scale, shift);
  if (row.x0 >= 0 && row.x0 != row.excluded) {
    const double s = load(row.z[row.x0]) - shift;
    const Term<double> term = RowWeight(scale).phi(s, s - dse.log_a_x0, dse.a_x0);
    sum += term.value;
    if constexpr (kGrad) store(row.grad + row.x0, static_cast<Acc<T>>(term.slope));
  }
  if (kGrad && row.excluded >= 0) store(row.grad + row.excluded, Acc<T>(0));
  return sum;
}

// ---------------------------------------------------------------------------------------------------------
// Cross-entropy: the exponentials are kept from the first pass, the second multiplies them by what the sum makes known.

template <typename C>
struct ExpSum {
  C shift;
  double sum;  // of exp(z - shift)

  FASTDIFF_HD void add(C other_shift, double other_sum) {
    const C top = other_shift > shift ? other_shift : shift;
    // != rather than <, so that a NaN among the shifts reaches the sum
    if (shift != top) sum *= std::exp(static_cast<double>(shift) - top);
    if (other_shift != top) other_sum *= std::exp(static_cast<double>(other_shift) - top);
    shift = top;
    sum += other_sum;
  }
};

// Room for a row between the passes: the exponentials, unless the gradient can hold them (which it cannot in the row's
// own place), and each run's shift.
template <typename T>
struct Scratch {
  std::vector<Acc<T>> exponentials, shifts;

  explicit Scratch(int64_t num_states) : shifts(num_states / kBlock + 3) {}

  FASTDIFF_HD Acc<T>* kept(const Row<T>& row) {
    if constexpr (std::is_same_v<Acc<T>, T>) {
      if (row.grad && row.grad != row.z) return row.grad;
    }
    exponentials.resize(row.num_states);
    return exponentials.data();
  }
};

struct RowStats {
  double logsumexp = 0, entropy = 0, correct = 0, nll = 0;
};

// Adds a run to the sum and gives the shift it took: what others took, unless that lets the exponentials grow too
// large.
template <bool kKeep, typename T>
FASTDIFF_HD Acc<T> add_run(ExpSum<Acc<T>>& all, const T* z, Acc<T>* kept, int64_t n, Acc<T>& max) {
  using C = Acc<T>;
  C in[kBlock], shift = std::max(all.shift, std::numeric_limits<C>::lowest());  // never -inf
  const C* x = widened(z, n, in);
  Block<C> block = sum_terms<kKeep>(ExpTerm<C>(shift), x, kept, n);
  if (block.max > shift + 60) block = sum_terms<kKeep>(ExpTerm<C>(shift = block.max), x, kept, n);
  all.add(shift, block.sum);
  max = block.max;
  return shift;
}

// -sum p log p, from the row's log-sum-exp, which is top + log_sum; of a part of a row, as if it were all.
template <typename T>
FASTDIFF_HD double entropy(const Row<T>& row, Acc<T> top, double log_sum) {
  using C = Acc<T>;
  const auto term = [&](C z) __attribute__((always_inline)) {
    const C x = z - top;
    return x < C(-86) ? 0 : exp_(x) * x;
  };
  double sum = row.x0 < 0 ? 0 : term(load(row.z[row.x0]));
  row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
    C part = 0;
#pragma omp simd reduction(+ : part)
    for (int64_t v = first; v < first + n; ++v) part += term(load(row.z[v]));
    sum += part;
  });
  return log_sum - sum * std::exp(-log_sum);
}

// The gradient p (slope - e (log p + H)) of a run, from the exponentials kept of it: p is share times one of them, and
// log p is z - top - log_sum. In parts of the larger factor, so that the others fit the working type.
template <typename T>
FASTDIFF_HD void dce_entropy_grad(const T* z, const Acc<T>* kept, T* grad, int64_t n, Acc<T> top, double share,
                                  double constant, double entropy_weight) {
  using C = Acc<T>;
  const double size = std::max(std::fabs(constant), std::fabs(entropy_weight));
  const C a = static_cast<C>(constant / size), b = static_cast<C>(entropy_weight / size);
  C out[kBlock];
#pragma omp simd
  for (int64_t v = 0; v < n; ++v) {
    const C x = load(z[v]) - top;
    out[v] = kept[v] * (a - b * (x < C(-1000) ? C(-1000) : x));  // no NaN where p is 0
  }
  store_scaled(grad, out, n, share * size);
}

// weight (nll + penalty logsumexp^2) + entropy_weight H. With x0 elsewhere, as if its number were 0 and its probability
// nothing: its nll is the log-sum-exp.
template <bool kGrad, typename T>
FASTDIFF_HD double dce_row(const Row<T>& row, double weight, double entropy_weight, double penalty, Scratch<T>& scratch,
                           RowStats* stats) {
  using C = Acc<T>;
  const bool here = row.x0 >= 0;
  const C at_x0 = here ? load(row.z[row.x0]) : -kInfinity<C>;
  ExpSum<C> others{at_x0, 0};
  C max_before = -kInfinity<C>, max_after = max_before;
  C *kept = kGrad ? scratch.kept(row) : nullptr, *shift = scratch.shifts.data();
  row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
    C max;
    *shift++ = add_run<kGrad>(others, row.z + first, kGrad ? kept + first : kept, n, max);
    max_before = first < row.x0 && max > max_before ? max : max_before;
    max_after = first > row.x0 && max > max_after ? max : max_after;
  });
  if (others.shift == kInfinity<C>) others.sum = NAN;  // inf - inf, as in PyTorch
  ExpSum<C> all = others;
  all.add(at_x0, here ? 1 : 0);
  // Neither is 1 added to a small sum, nor the shift to log(sum): digits would be lost.
  const double log_sum = here && all.shift == at_x0 ? std::log1p(others.sum) : std::log(all.sum);
  const double logsumexp = all.shift + log_sum;
  const double drift = penalty == 0 ? 0 : logsumexp;  // which may be infinite
  const double slope = 1 + 2 * penalty * drift;
  const double log_p = here ? (static_cast<double>(at_x0) - all.shift) - log_sum : -logsumexp;
  const C top = std::max({at_x0, max_before, max_after});
  const bool correct = at_x0 > max_before && at_x0 >= max_after && !std::isnan(all.sum);
  const bool with_entropy = entropy_weight != 0;
  const double log_sum_top = log_sum - (static_cast<double>(top) - all.shift);
  const double h = stats || with_entropy ? entropy(row, top, log_sum_top) : 0;
  if (stats) *stats = {logsumexp, h, static_cast<double>(correct), -log_p};
  if constexpr (kGrad) {
    shift = scratch.shifts.data();
    row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
      double share = std::exp(static_cast<double>(*shift++) - all.shift) / all.sum;
      if (!here && all.sum == 0) share = 0;  // a part of the row without weight
      if (with_entropy && share != 0)
        dce_entropy_grad(row.z + first, kept + first, row.grad + first, n, top, share,
                         weight * slope - entropy_weight * (h - log_sum_top), entropy_weight);
      else
        store_scaled(row.grad + first, kept + first, n, share == 0 ? 0 : weight * slope * share);
    });
    const double p = std::exp(log_p), pull = with_entropy && p > 0 ? entropy_weight * p * (log_p + h) : 0;
    if (here) store(row.grad + row.x0, static_cast<C>(weight * (std::expm1(log_p) + (slope - 1) * p) - pull));
    if (row.excluded >= 0) store(row.grad + row.excluded, C(0));
  }
  return weight * (penalty * drift * drift - log_p) + (with_entropy ? entropy_weight * h : 0);
}

// ---------------------------------------------------------------------------------------------------------
// Score entropy of the uniform graph from conditionals: their exponentials are kept, the terms need their sum.

// What a run's terms are made of, in the type they are computed in.
template <typename C>
struct NelboTerm {
  C c_per_exp, slope, offset, offset_w;

  FASTDIFF_HD NelboTerm(const NelboRow& row, double share)
      : c_per_exp(static_cast<C>(share)),
        slope(static_cast<C>(row.slope)),
        offset(static_cast<C>(row.offset)),
        offset_w(static_cast<C>(row.offset_w)) {}

  // c, w - log(rho) and 1 - 1/rho for an exponential.
  FASTDIFF_HD void operator()(C exponential, C& c, C& gap, C& pull) const {
    c = exponential * c_per_exp;
    const C rho = slope * c + offset, w = slope * c + offset_w;
    gap = log_gap(w, rho);
    pull = w / rho;
  }
};

// Sums over a run of w - log(rho) and c (1 - 1/rho).
template <typename C, typename E>
FASTDIFF_HD void nelbo_sums(const NelboTerm<C>& term, const E* kept, int64_t n, double& gaps, double& pulls) {
  C gap_sum = 0, pull_sum = 0;
#pragma omp simd reduction(+ : gap_sum, pull_sum)
  for (int64_t v = 0; v < n; ++v) {
    C c, gap, pull;
    term(kept[v], c, gap, pull);
    gap_sum += gap;
    pull_sum += c * pull;
  }
  gaps += gap_sum;
  pulls += pull_sum;
}

template <typename C, typename E, typename T>
FASTDIFF_HD void nelbo_grad(const NelboTerm<C>& term, const E* kept, T* grad, int64_t n, C scale, C mean_pull) {
  Acc<T> out[kBlock];
#pragma omp simd
  for (int64_t v = 0; v < n; ++v) {
    C c, gap, pull;
    term(kept[v], c, gap, pull);
    out[v] = static_cast<Acc<T>>(c * (pull - mean_pull) * scale);
  }
  store_scaled(grad, out, n, 1);
}

// k = N / expm1(sigma). From 1e15 on its square leaves float's range, and terms are computed in double.
template <bool kGrad, typename T>
FASTDIFF_HD double nelbo_row(const Row<T>& row, double weight, double k, Scratch<T>& scratch) {
  using C = Acc<T>;
  const C at_x0 = load(row.z[row.x0]), at_xt = load(row.z[row.excluded]);
  const bool moved = row.x0 != row.excluded;
  ExpSum<C> others{at_x0, 0};
  C *kept = scratch.kept(row), *shift = scratch.shifts.data();
  row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
    C max;
    *shift++ = add_run<true>(others, row.z + first, kept + first, n, max);
  });
  ExpSum<C> all = others;
  all.add(at_x0, 1);
  if (moved) all.add(at_xt, 1);
  const auto share = [&](C its_shift, double sum) __attribute__((always_inline)) {
    return sum / all.sum * std::exp(static_cast<double>(its_shift) - all.shift);
  };
  const double c_xt = share(at_xt, 1), c_x0 = moved ? share(at_x0, 1) : 0, c_others = share(others.shift, others.sum);
  const double rest_xt = c_others + c_x0, rest_x0 = c_others + c_xt;
  const NelboRow nelbo(k, row.num_states, moved, c_xt, c_x0, rest_xt, rest_x0);
  double gaps = 0, pulls = 0;
  shift = scratch.shifts.data();
  row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
    const double c_per_exp = share(*shift++, 1);
    if (k < 1e15)
      nelbo_sums(NelboTerm<C>(nelbo, c_per_exp), kept + first, n, gaps, pulls);
    else
      nelbo_sums(NelboTerm<double>(nelbo, c_per_exp), kept + first, n, gaps, pulls);
  });
  if constexpr (kGrad) {
    const double pull_x0 = nelbo.w_x0 / nelbo.rho_x0, scale = weight * k / (row.num_states * nelbo.b);
    const double mean = pulls + c_xt * nelbo.dc_xt + c_x0 * pull_x0;
    shift = scratch.shifts.data();
    row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
      const double c_per_exp = share(*shift++, 1);
      if (k < 1e15)
        nelbo_grad(NelboTerm<C>(nelbo, c_per_exp), kept + first, row.grad + first, n, C(scale), C(mean));
      else
        nelbo_grad(NelboTerm<double>(nelbo, c_per_exp), kept + first, row.grad + first, n, scale, mean);
    });
    // pull - mean, where the two nearly cancel if c is near 1
    const double xt_pull = nelbo.dc_xt * rest_xt - (pulls + c_x0 * pull_x0),
                 x0_pull = pull_x0 * rest_x0 - (mean - c_x0 * pull_x0);
    store(row.grad + row.excluded, static_cast<C>(scale * c_xt * xt_pull));
    if (moved) store(row.grad + row.x0, static_cast<C>(scale * c_x0 * x0_pull));
  }
  return weight / row.num_states * (nelbo.a * gaps + nelbo.a_x0 * log_gap(nelbo.w_x0, nelbo.rho_x0));
}

}  // namespace fastdiff
