// A row loss as the blocks of a row share it out: its tensors, what lies in shared memory, and one row's work.
#pragma once

#include <cstdint>

#include "../row_loss.h"
#include "online.h"
#include "reduce.h"
#include "rows.h"

namespace fastdiff {

// Where z holds a part of a row of all_states numbers, ids count from its first, x0 is -1 if it lies elsewhere, and x_t
// -1 or, if it is not x0, -2.
struct RowLoss {
  Rows z;
  int64_t rows;
  const int64_t *x0, *xt;
  const bool* mask;
  const double *sigma, *weight, *entropy_weight, *extra, *scale;
  void *loss, *grad;  // float or double; as z
  float* stats;       // [4, rows]
  int units;
  int64_t all_states, mask_index, ignore_index;
  Traits traits;
  bool exclude_mask, scale_by_sigma, loss_is_double;
  double penalty;
};

// What thread 0 finds out for all: constants of a row, in double.
struct Constants {
  double weight, entropy_weight, shift, offset;
  ScoresRow scores;
};

struct Pair {
  double a, b;
  __device__ Pair operator+(const Pair& other) const { return {a + other.a, b + other.b}; }
};

// From the row's sums, for its second and third pass.
struct AffinePass {
  float shift, inv_total, slope, offset, offset_w;
  bool in_pairs;
  Conditionals c;
  AffineRow row;
};

struct LossShared {
  uint64_t barriers[Copies::kParts];
  Constants constants;
  AffinePass affine;
  Room<Online> online;
  Room<Pair> pair;
  Room<double> sum;
};
constexpr size_t kShared = (sizeof(LossShared) + 15) / 16 * 16;

// One row: its numbers, where its gradient goes, and the ids that are treated apart (Apart); negative if not in the
// row. What concerns one of them alone is done by thread 0 of the block that has it, which writes its gradient when all
// are done.
template <typename T>
struct Work {
  const Row<T>& row;
  T* grad;
  LossShared& shared;
  int x0, left_out, xt;

  __device__ bool leads() const { return threadIdx.x == 0 && Cluster::rank() == 0; }
  __device__ bool minds(int id) const { return threadIdx.x == 0 && row.has(id); }
  __device__ float number(int id) const { return load(row.z[id]); }

  // A value in the places of the ids that are treated apart.
  template <int kMany>
  __device__ void set_apart(Few<kMany>& few, float value) const {
    few.set(x0, left_out, value);
    if (xt >= 0) few.set(xt, xt, value);
  }
};

struct Results {
  double loss, logsumexp = 0, entropy = 0, correct = 0, nll = 0;
};

}  // namespace fastdiff
