// A row of an affine loss: the exponentials are kept, the terms need their sum.
#pragma once

#include "exp_sums.h"

namespace fastdiff {

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
