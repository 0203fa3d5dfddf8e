// A row of an affine loss: two sums in sequence, then the gradient.
#pragma once

#include "softmax_rows.h"

namespace fastdiff {

// Not inlined, as its registers would be the kernel's.
inline __device__ __noinline__ void find(AffinePass& pass, const RowLoss& op, int64_t r, const Online& others,
                                         double at_x0, double at_xt, bool moved, bool apart) {
  const double other = others.m, shift = fmax(fmax(other, at_xt), at_x0);
  const double e_others = others.s * std::exp(other - shift), e_xt = std::exp(at_xt - shift);
  const double e_x0 = std::exp(at_x0 - shift), rest = e_others + e_xt, total = rest + e_x0;
  const double log_sum = at_x0 == shift ? std::log1p(rest) : std::log(total);
  pass.shift = static_cast<float>(shift), pass.inv_total = static_cast<float>(1 / total);
  Conditionals& c = pass.c;
  c.c_x0 = e_x0 / total, c.c_xt = moved ? e_xt / total : c.c_x0;
  c.rest_x0 = rest / total, c.rest_xt = moved ? (e_others + e_x0) / total : c.rest_x0;
  c.nll = log_sum - (at_x0 - shift), c.moved = moved, c.apart = apart;
  pass.row = {op.traits.functor, op.sigma[r], op.extra ? op.extra[r] : 0, op.penalty, op.z.num_states, c};
  pass.slope = static_cast<float>(pass.row.slope), pass.offset = static_cast<float>(pass.row.offset);
  pass.offset_w = static_cast<float>(pass.row.offset_w), pass.in_pairs = pass.row.fits_float();
}

// c, rho and w = rho - 1 of a few numbers.
template <int kMany>
struct AffineFew {
  Few<kMany> c, rho, w;
  bool in_pairs;  // which share a logarithm and a division

  __device__ AffineFew(const Few<kMany>& few, const AffinePass& pass)
      : c(few), rho(few), w(few), in_pairs(kMany > 1 && pass.in_pairs) {
    for (int i = 0; i < kMany; ++i) {
      c.x[i] = exp_(few.x[i] - pass.shift) * pass.inv_total;
      rho.x[i] = fmaf(pass.slope, c.x[i], pass.offset), w.x[i] = fmaf(pass.slope, c.x[i], pass.offset_w);
    }
  }

  // The sum of w - log(rho).
  __device__ float gaps() const {
    float sum = 0;
    if (in_pairs)
      for (int i = 0; i + 1 < kMany; i += 2) sum += log_gaps(w.x[i], rho.x[i], w.x[i + 1], rho.x[i + 1]);
    else
      for (int i = 0; i < kMany; ++i) sum += log_gap(w.x[i], rho.x[i]);
    return sum;
  }

  // 1 - 1/rho in the place of w.
  __device__ void pull() {
    if (in_pairs) {
      for (int i = 0; i + 1 < kMany; i += 2) {
        const float inverse = divide_(1, rho.x[i] * rho.x[i + 1]);
        w.x[i] *= rho.x[i + 1] * inverse, w.x[i + 1] *= rho.x[i] * inverse;
      }
    } else {
      for (int i = 0; i < kMany; ++i) w.x[i] = divide_(w.x[i], rho.x[i]);
    }
  }
};

template <bool kGrad, typename T>
__device__ Results affine_row(const Work<T>& work, const RowLoss& op, int64_t r, bool moved) {
  LossShared& shared = work.shared;
  const double at_x0 = number_at(work, work.x0), at_xt = number_at(work, work.xt), weight = shared.constants.weight;
  const Online others = sum_exp(work);
  if (threadIdx.x == 0) find(shared.affine, op, r, others, at_x0, at_xt, moved, work.xt != -1);
  __syncthreads();
  const AffinePass& pass = shared.affine;
  float gaps = 0, pulls = 0;
  work.row.each([&](auto& few) {
    AffineFew terms(few, pass);
    work.set_apart(terms.c, 0);
    work.set_apart(terms.rho, 1);
    work.set_apart(terms.w, 0);
    gaps += terms.gaps();
    terms.pull();
    for (int i = 0; i < few.kSize; ++i) pulls += terms.c.x[i] * terms.w.x[i];
  });
  const Pair sums = reduce_cluster(Pair{gaps, pulls}, shared.pair, Add());
  if constexpr (kGrad) {
    const Target<T> grad(work.grad, work.row.head);
    const Conditionals& c = pass.c;
    const AffineRow& row = pass.row;
    const double mass = row.unit * sums.b, masses = mass + row.mass_x0 + row.mass_xt;
    // c (unit pull - masses), in parts of the larger factor, so that the others fit.
    const double size = fmax(fmax(fabs(row.unit), fabs(masses)), 1e-300);
    const auto a = static_cast<float>(row.unit / size), b = static_cast<float>(masses / size);
    const auto scale = static_cast<float>(weight * size);
    work.row.each([&](auto& few) {
      AffineFew terms(few, pass);
      terms.pull();
      for (int i = 0; i < few.kSize; ++i) few.x[i] = scale * (terms.c.x[i] * fmaf(a, terms.w.x[i], -b));
      grad.put(few);
    });
    __syncthreads();
    // An id's mass less its share of all, where the two nearly cancel if its c is near 1.
    const double x0_grad = row.mass_x0 * c.rest_x0 - c.c_x0 * (mass + row.mass_xt);
    const double xt_grad = row.mass_xt * c.rest_xt - c.c_xt * (mass + row.mass_x0);
    if (work.minds(work.x0)) store(work.grad + work.x0, static_cast<float>(weight * x0_grad));
    if (work.minds(work.xt)) store(work.grad + work.xt, static_cast<float>(weight * xt_grad));
    if (work.minds(work.left_out)) store(work.grad + work.left_out, 0.0f);
  }
  return {weight * (pass.row.a * sums.a + pass.row.value)};
}

}  // namespace fastdiff
