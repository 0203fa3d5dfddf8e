// One call of the row loss on a GPU.
#pragma once

#include "../functor.h"
#include "../row_loss.h"
#include "launch.h"
#include "online.h"
#include "reduce.h"

namespace fastdiff {

// Row r of z begins at (r / inner) * outer_stride + (r % inner) * inner_stride; all else is contiguous. Where z holds a
// part of a row of all_states numbers, ids count from its first, x0 is -1 if it lies elsewhere, and x_t -1 or, if it is
// not x0, -2.
struct RowLoss {
  const void* z;
  int64_t inner, outer_stride, inner_stride, rows;
  const int64_t *x0, *xt;
  const bool* mask;
  const double *sigma, *weight, *scale;
  void *loss, *grad;  // float or double; as z
  float* stats;       // [3, rows]
  int num_states, units;
  int64_t all_states, mask_index, ignore_index;
  Functor functor;
  bool exclude_mask, scale_by_sigma, loss_is_double;
  double z_loss;
};

}  // namespace fastdiff
