// One call of the row loss: where its rows are, which are scored, and the constants of each.
#pragma once

#include <string>
#include <vector>

#include "softmax_rows.h"

namespace fastdiff {

// z is [..., V] with any strides before the last; all other tensors are contiguous over [...]. Where z holds a part of
// a row of `all_states` numbers, ids count from its first, x0 is -1 if it lies elsewhere, and x_t -1 or, if it is not
// x0, -2.
struct RowLoss {
  const Tensor& tensor;
  const void* z;
  const int64_t *x0, *xt;
  const bool* mask;
  const double *sigma, *weight, *entropy_weight, *extra;
  const Traits& traits;
  int64_t mask_index, ignore_index, num_states, all_states, rows;
  bool exclude_mask, scale_by_sigma;
  double penalty, scale = 1;
  std::vector<uint8_t> scored;
  double* loss = nullptr;
  RowStats* stats = nullptr;
  void* grad = nullptr;

  RowLoss(const Tensor& z_, const Tensor& x0_, const std::optional<Tensor>& xt_, const std::optional<Tensor>& mask_,
          const std::optional<Tensor>& sigma_, const std::optional<Tensor>& weight_,
          const std::optional<Tensor>& entropy_weight_, const std::optional<Tensor>& extra_,
          const std::string& functor_, int64_t mask_index_, bool exclude_mask_, int64_t ignore_index_,
          bool scale_by_sigma_, double penalty_, std::optional<int64_t> all_states_ = {})
      : tensor(z_),
        z(z_.const_data_ptr()),
        x0(data<int64_t>(x0_)),
        xt(data<int64_t>(xt_)),
        mask(data<bool>(mask_)),
        sigma(data<double>(sigma_)),
        weight(data<double>(weight_)),
        entropy_weight(data<double>(entropy_weight_)),
        extra(data<double>(extra_)),
        traits(functor_named(functor_)),
        mask_index(mask_index_),
        ignore_index(ignore_index_),
        num_states(z_.size(-1)),
        all_states(all_states_.value_or(num_states)),
        rows(x0_.numel()),
        exclude_mask(exclude_mask_),
        scale_by_sigma(scale_by_sigma_),
        penalty(penalty_),
        scored(rows) {}

  bool in_part() const { return all_states != num_states; }

  Functor functor() const { return traits.functor; }

  Apart apart(int64_t row) const { return {traits, x0[row], xt ? xt[row] : -1, mask_index, exclude_mask}; }

  bool moved(int64_t row) const { return xt && xt[row] != x0[row]; }

  double shift(int64_t row) const {
    return scale_by_sigma ? Noise(sigma[row]).log_e1 + std::log(static_cast<double>(all_states - 1)) : 0;
  }

  SoftmaxRow softmax_row(int64_t row) const { return {functor(), sigma ? sigma + row : nullptr, all_states}; }

  ScoresRow scores_row(int64_t row) const { return {functor(), sigma[row], all_states, moved(row)}; }

  AffineRow affine_row(int64_t row, const Conditionals& c) const {
    return {functor(), sigma[row], extra ? extra[row] : 0, penalty, num_states, c};
  }

  double row_weight(int64_t row) const { return weight ? weight[row] * scale : scale; }

  double row_entropy_weight(int64_t row) const { return entropy_weight ? entropy_weight[row] * scale : 0; }

  // Checks every value, fills `scored` and counts it. Before any row is read: nothing may throw in a thread.
  int64_t check() {
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      if (x0[r] == ignore_index) continue;
      check_row(r);
      scored[r] = mask ? mask[r] : traits.noised != Noised::absorb || !xt || xt[r] == mask_index;
      if (scored[r]) check_scored(r);
      count += scored[r];
    }
    return count;
  }

 private:
  void check_row(int64_t r) const {
    const bool any = traits.noised != Noised::absorb;
    if (x0[r] < (in_part() ? -1 : 0) || x0[r] >= num_states)
      bad_value("x0: expected ids in [0, ", num_states, "), got ", x0[r], " at token ", r);
    if (sigma && !(sigma[r] >= 0 && std::isfinite(sigma[r])))
      bad_value("sigma: expected finite numbers >= 0, got ", sigma[r], " at token ", r);
    if (!xt) return;
    if (any && (xt[r] < (in_part() ? -2 : 0) || xt[r] >= num_states))
      bad_value("xt: expected ids in [0, ", num_states, "), got ", xt[r], " at token ", r);
    if (!any && !in_part() && xt[r] != mask_index && xt[r] != x0[r])
      bad_value("xt: expected x0 or the mask ", mask_index, ", got ", xt[r], " where x0 is ", x0[r], " at token ", r,
                " (are xt and x0 swapped?)");
  }

  void check_scored(int64_t r) const {
    if (traits.noised != Noised::uniform && exclude_mask && x0[r] == mask_index)
      bad_value("x0: expected a token, got the mask ", mask_index, " at token ", r);
    const bool may_be_0 = traits.clean && !scale_by_sigma && !(traits.scores && moved(r));
    if (sigma && !may_be_0 && !(sigma[r] > 0))
      bad_value("sigma: expected numbers > 0 where a token was masked or moved, got ", sigma[r], " at token ", r);
    if (traits.extra == Extra::sigma_s && !(extra[r] >= 0 && extra[r] < sigma[r]))
      bad_value("sigma_s: expected numbers in [0, sigma), got ", extra[r], " where sigma is ", sigma[r], " at token ",
                r);
    if (traits.extra == Extra::share && !(extra[r] >= 0 && extra[r] <= 1))
      bad_value("share: expected numbers in [0, 1], got ", extra[r], " at token ", r);
  }
};

}  // namespace fastdiff
