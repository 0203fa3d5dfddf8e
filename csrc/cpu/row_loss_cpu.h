// One call of the row loss: where its rows are, which are scored, and the constants of each.
#pragma once

#include <string>
#include <vector>

#include "../functor.h"
#include "../tensor.h"
#include "row_bodies.h"

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
  Functor functor;
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
        functor(functor_named(functor_)),
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

  bool uniform() const { return functor == Functor::dse_uniform || functor == Functor::dse_uniform_logits; }

  // The id that is treated apart, or -1.
  int64_t excluded(int64_t row) const {
    if (uniform()) return xt[row];
    return exclude_mask ? mask_index : -1;
  }

  double shift(int64_t row) const {
    return scale_by_sigma ? Noise(sigma[row]).log_e1 + std::log(static_cast<double>(all_states - 1)) : 0;
  }

  DseRow dse_row(int64_t row) const {
    if (functor == Functor::dse_absorb) return DseRow::absorb(sigma[row]);
    return DseRow::uniform(sigma[row], all_states, xt[row] != x0[row]);
  }

  // A sigma given to dce turns conditionals into scores: DSE of log c - log e1 is DCE / e1.
  double row_weight(int64_t row) const {
    const double given = weight ? weight[row] * scale : scale;
    return functor == Functor::dce && sigma ? given * Noise(sigma[row]).inv_e1 : given;
  }

  // Checks every value, fills `scored` and counts it. Before any row is read: nothing may throw in a thread.
  int64_t check() {
    int64_t count = 0;
    for (int64_t r = 0; r < rows; ++r) {
      if (x0[r] == ignore_index) continue;
      check_row(r);
      scored[r] = mask ? mask[r] : uniform() || !xt || xt[r] == mask_index;
      if (scored[r]) check_scored(r);
      count += scored[r];
    }
    return count;
  }

 private:
  void check_row(int64_t r) const {
    if (x0[r] < (in_part() ? -1 : 0) || x0[r] >= num_states)
      bad_value("x0: expected ids in [0, ", num_states, "), got ", x0[r], " at token ", r);
    if (sigma && !(sigma[r] >= 0 && std::isfinite(sigma[r])))
      bad_value("sigma: expected finite numbers >= 0, got ", sigma[r], " at token ", r);
    if (!xt) return;
    if (uniform() && (xt[r] < (in_part() ? -2 : 0) || xt[r] >= num_states))
      bad_value("xt: expected ids in [0, ", num_states, "), got ", xt[r], " at token ", r);
    if (!uniform() && !in_part() && xt[r] != mask_index && xt[r] != x0[r])
      bad_value("xt: expected x0 or the mask ", mask_index, ", got ", xt[r], " where x0 is ", x0[r], " at token ", r,
                " (are xt and x0 swapped?)");
  }

  void check_scored(int64_t r) const {
    if (!uniform() && exclude_mask && x0[r] == mask_index)
      bad_value("x0: expected a token, got the mask ", mask_index, " at token ", r);
    const bool moved = functor != Functor::dse_uniform || scale_by_sigma || xt[r] != x0[r];
    if (sigma && moved && !(sigma[r] > 0))
      bad_value("sigma: expected numbers > 0 where a token was masked or moved, got ", sigma[r], " at token ", r);
  }
};

}  // namespace fastdiff
