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

// A row, the place of its gradient, which may be its own, and the ids that are treated apart.
template <typename T>
struct Row {
  const T* z;
  T* grad;
  int64_t num_states;
  Apart apart;

  FASTDIFF_HD double number(int64_t id) const { return load(z[id]); }

  // Calls f(first, n) for runs of at most kBlock of the other ids, in rising order.
  template <typename F>
  FASTDIFF_HD void for_each_run(const F& f) const {
    const int64_t a = apart.x0, b = apart.left_out, c = apart.xt;
    const int64_t low = std::min({a, b, c}), high = std::max({a, b, c});
    const int64_t mid = std::max(std::min(a, b), std::min(std::max(a, b), c)), ids[] = {low, mid, high, num_states};
    int64_t first = 0;
    for (const int64_t id : ids) {
      for (; first < id; first += kBlock) f(first, std::min(kBlock, id - first));
      first = std::max<int64_t>(id + 1, 0);
    }
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

// The numbers of one load, side by side in a row: two BFloat16 are halves of a word, which no shuffle takes apart.
template <typename T>
struct Loaded {
  static constexpr int64_t kMany = 1;
  Acc<T> x[kMany];

  FASTDIFF_HD explicit Loaded(const T* from) : x{load(*from)} {}
};

template <>
struct Loaded<BFloat16> {
  static constexpr int64_t kMany = 2;
  float x[kMany];

  FASTDIFF_HD explicit Loaded(const BFloat16* from) {
    uint32_t word;
    std::memcpy(&word, from, sizeof(word));
    x[0] = bit_cast<float>(word << 16), x[1] = bit_cast<float>(word & 0xFFFF0000);
  }
};

// The sum of term(x) of a block; with kKeep also their derivatives.
template <bool kKeep, typename F, typename T, typename C>
FASTDIFF_HD Block<C> sum_terms(const F& term, const T* from, C* kept, int64_t n) {
  if constexpr (std::is_same_v<T, Float16>) {  // which is widened in more steps, of 16 bits each where they can be
    float in[kBlock];
    return sum_terms<kKeep>(term, widened(from, n, in), kept, n);
  }
  constexpr int64_t kMany = Loaded<T>::kMany;
  C sum = 0, least = kInfinity<C>;  // of the negatives: GCC takes no maximum of floats that are made from a word
#pragma omp simd reduction(+ : sum) reduction(min : least)
  for (int64_t v = 0; v < n / kMany; ++v) {
    const Loaded<T> loaded(from + kMany * v);
    for (int64_t j = 0; j < kMany; ++j) {
      const C x = static_cast<C>(loaded.x[j]);
      const Term<C> t = term(x);
      sum += t.value;
      least = -x < least ? -x : least;  // std::min would not vectorise
      if constexpr (kKeep) kept[kMany * v + j] = t.slope;
    }
  }
  Block<C> block{sum, -least};
  if constexpr (kMany > 1) {
    if (n % kMany) {
      const C last = load(from[n - 1]);
      const Block<C> rest = sum_terms<kKeep>(term, &last, kKeep ? kept + n - 1 : kept, 1);
      block.sum += rest.sum, block.max = rest.max > block.max ? rest.max : block.max;
    }
  }
  return block;
}

// ---------------------------------------------------------------------------------------------------------
// Scores: a plain sum, so loss and gradient come from one pass.

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

// ---------------------------------------------------------------------------------------------------------
// Softmax: the exponentials are kept from the first pass, the second multiplies them by what the sum makes known. Those
// of BFloat16 it computes again: twice a row, they would have to be written into the cache and read from it.

struct ExpSum {
  double shift, sum;  // of exp(z - shift)

  FASTDIFF_HD void add(double other_shift, double other_sum) {
    const double top = other_shift > shift ? other_shift : shift;
    // != rather than <, so that a NaN among the shifts reaches the sum
    if (shift != top) sum *= std::exp(shift - top);
    if (other_shift != top) other_sum *= std::exp(other_shift - top);
    shift = top;
    sum += other_sum;
  }
};

// The log of a sum over exp(all.shift), and -log of x0's share in it. Neither is 1 added to a small sum, nor the shift
// to the log: digits would be lost.
struct LogSum {
  double value, nll;

  FASTDIFF_HD LogSum(const ExpSum& others, const ExpSum& all, double at_x0) {
    const double ratio = others.sum * std::exp(others.shift - at_x0), ahead = at_x0 - all.shift;
    value = ratio < 1 ? ahead + std::log1p(ratio) : std::log(all.sum);
    nll = ratio < 1 ? std::log1p(ratio) : value - ahead;
  }
};

// exp(z - shift)
template <typename C>
struct Relative {
  C shift;

  FASTDIFF_HD Term<C> operator()(C z) const {
    const C e = exp_(z - shift);
    return {e, e};
  }
};

// What an exponential of a run with this shift is of the whole sum. Few shifts differ.
struct Shares {
  ExpSum all;
  double shift = NAN, share = 0;

  FASTDIFF_HD double of(double its_shift) {
    if (its_shift != shift) shift = its_shift, share = std::exp(shift - all.shift) / all.sum;
    return share;
  }
};

// Room for a row between the passes: the exponentials, unless the gradient can hold them (which it cannot in the row's
// own place), what else goes with them, and each run's shift.
template <typename T>
struct Scratch {
  std::vector<Acc<T>> exponentials, pulls, shifts;

  explicit Scratch(int64_t num_states) : shifts(num_states / kBlock + 4) {}

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
FASTDIFF_HD Acc<T> add_run(ExpSum& all, const T* z, Acc<T>* kept, int64_t n, Acc<T>& max) {
  using C = Acc<T>;
  C shift = std::max(static_cast<C>(all.shift), std::numeric_limits<C>::lowest());  // never -inf
  Block<C> block = sum_terms<kKeep>(Relative<C>{shift}, z, kept, n);
  if (block.max > shift + 60) block = sum_terms<kKeep>(Relative<C>{shift = block.max}, z, kept, n);
  all.add(shift, block.sum);
  max = block.max;
  return shift;
}

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

// ---------------------------------------------------------------------------------------------------------
// Affine: the exponentials are kept, the terms need their sum.

// Of a run, in the type it is computed in: rho = slope e + offset for an exponential e, of which c is `share`.
template <typename C>
struct AffineTerms {
  double share;
  C slope, offset, offset_w;

  FASTDIFF_HD AffineTerms(const AffineRow& row, double share_)
      : share(share_),
        slope(static_cast<C>(row.slope * share)),
        offset(static_cast<C>(row.offset)),
        offset_w(static_cast<C>(row.offset_w)) {}

  // Sums of w - log(rho) and c (1 - 1/rho); with kKeep also e (1 - 1/rho) of each. Numbers are taken in pairs, which
  // share a logarithm and a division.
  template <bool kKeep, typename E>
  FASTDIFF_HD void add(const E* kept, E* pulls, int64_t n, double& gap_sum, double& pull_sum) const {
    const int64_t half = n / 2;
    C gaps = 0, sum = 0;
#pragma omp simd reduction(+ : gaps, sum)
    for (int64_t v = 0; v < half; ++v) {
      const C e = kept[v], rho = slope * e + offset, w = slope * e + offset_w;
      const C e2 = kept[v + half], rho2 = slope * e2 + offset, w2 = slope * e2 + offset_w;
      const C inverse = 1 / (rho * rho2), pull = e * w * (rho2 * inverse), pull2 = e2 * w2 * (rho * inverse);
      gaps += log_gaps(w, rho, w2, rho2);
      sum += pull + pull2;
      if constexpr (kKeep) pulls[v] = static_cast<E>(pull), pulls[v + half] = static_cast<E>(pull2);
    }
    if (n % 2) {
      const C e = kept[n - 1], rho = slope * e + offset, w = slope * e + offset_w, pull = e * w / rho;
      gaps += log_gap(w, rho);
      sum += pull;
      if constexpr (kKeep) pulls[n - 1] = static_cast<E>(pull);
    }
    gap_sum += gaps;
    pull_sum += share * sum;
  }
};

// to = a x + b y, where it may be y; in double if a factor leaves the range of float.
template <typename C, typename T>
FASTDIFF_HD void store_sum(T* to, const C* x, const C* y, int64_t n, double a, double b) {
  const auto narrow_a = static_cast<C>(a), narrow_b = static_cast<C>(b);
  if ((std::isnormal(narrow_a) || a == 0) && (std::isnormal(narrow_b) || b == 0)) {
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) store(to + v, static_cast<Acc<T>>(narrow_a * x[v] + narrow_b * y[v]));
  } else {
    for (int64_t v = 0; v < n; ++v) store(to + v, static_cast<Acc<T>>(a * x[v] + b * y[v]));
  }
}

// constants(c) are the row's, from its conditionals.
template <bool kGrad, typename T, typename F>
FASTDIFF_HD double affine_row(const Row<T>& row, double weight, bool moved, Scratch<T>& scratch, const F& constants) {
  using C = Acc<T>;
  const auto [x0, left_out, xt] = row.apart;
  const double at_x0 = row.number(x0), at_xt = xt >= 0 ? row.number(xt) : -kInfinity<double>;
  ExpSum others{at_x0, 0};
  C* kept = scratch.kept(row);
  C* shift = scratch.shifts.data();
  row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
    C max;
    *shift++ = add_run<true>(others, row.z + first, kept + first, n, max);
  });
  ExpSum rest = others;
  if (xt >= 0) rest.add(at_xt, 1);
  ExpSum all = rest;
  all.add(at_x0, 1);
  const auto share = [&](double its_shift, double sum)
                         __attribute__((always_inline)) { return sum / all.sum * std::exp(its_shift - all.shift); };
  const double c_xt = xt >= 0 ? share(at_xt, 1) : 0, c_x0 = share(at_x0, 1), c_others = share(others.shift, others.sum);
  const Conditionals c{c_x0,
                       moved ? c_xt : c_x0,
                       c_others + c_xt,
                       moved ? c_others + c_x0 : c_others,
                       LogSum(rest, all, at_x0).nll,
                       moved,
                       xt >= 0};
  const AffineRow affine = constants(c);
  const bool fits = affine.fits_float();  // else in double
  double gaps = 0, mass = 0;
  if constexpr (kGrad) scratch.pulls.resize(row.num_states);
  C* pulls = scratch.pulls.data();
  Shares shares{all};
  shift = scratch.shifts.data();
  row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
    const double share = shares.of(*shift++);
    if (fits)
      AffineTerms<C>(affine, share).template add<kGrad>(kept + first, pulls + first, n, gaps, mass);
    else
      AffineTerms<double>(affine, share).template add<kGrad>(kept + first, pulls + first, n, gaps, mass);
  });
  if constexpr (kGrad) {
    mass *= affine.unit;
    const double masses = mass + affine.mass_x0 + affine.mass_xt;
    shift = scratch.shifts.data();
    row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
      const double scale = weight * shares.of(*shift++);
      store_sum(row.grad + first, pulls + first, kept + first, n, scale * affine.unit, -scale * masses);
    });
    // An id's mass less its share of all, where the two nearly cancel if its c is near 1.
    const double x0_grad = affine.mass_x0 * c.rest_x0 - c_x0 * (mass + affine.mass_xt);
    const double xt_grad = affine.mass_xt * c.rest_xt - c_xt * (mass + affine.mass_x0);
    store(row.grad + x0, static_cast<C>(weight * x0_grad));
    if (xt >= 0) store(row.grad + xt, static_cast<C>(weight * xt_grad));
    if (left_out >= 0) store(row.grad + left_out, C(0));
  }
  return weight * (affine.a * gaps + affine.value);
}

}  // namespace fastdiff
