// Distillation on the CPU: two rows are read from memory together, once, and again while they are in cache.
#include "../distill.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "isa.h"
#include "operators.h"
#include "row.h"

namespace fastdiff {
namespace {

// teacher is as z or, with ids, [rows, k] in double; other tensors are contiguous over the rows.
struct RowDistill {
  const Tensor &z, &teacher;
  const int64_t* ids;
  const bool* mask;
  const double* weight;
  bool reverse;
  int64_t mask_index, num_states, many, rows;
  double scale, share = 1;
  double* loss = nullptr;
  void* grad = nullptr;

  RowDistill(const Tensor& z_, const Tensor& teacher_, const std::optional<Tensor>& ids_,
             const std::optional<Tensor>& mask_, const std::optional<Tensor>& weight_, bool reverse_,
             int64_t mask_index_, double scale_)
      : z(z_),
        teacher(teacher_),
        ids(data<int64_t>(ids_)),
        mask(data<bool>(mask_)),
        weight(data<double>(weight_)),
        reverse(reverse_),
        mask_index(mask_index_),
        num_states(z_.size(-1)),
        many(teacher_.size(-1)),
        rows(z_.numel() / num_states),
        scale(scale_) {
    if (ids)
      for (int64_t r = 0; r < rows; ++r)
        if (scored(r)) check_ids(ids + r * many);
  }

  bool scored(int64_t r) const { return !mask || mask[r]; }

 private:
  // Before any row is read: nothing may throw in a thread.
  void check_ids(const int64_t* row) const {
    for (int64_t j = 0, before = -1; j < many; before = row[j++])
      if (row[j] <= before || row[j] >= num_states || row[j] == mask_index)
        bad_value("teacher_ids: expected rising ids in [0, ", num_states, ") without the mask, got ", row[j]);
  }
};

template <typename C>
struct ScaledExpTerm {
  C shift, scale;

  FASTDIFF_HD Term<C> operator()(C z) const {
    const C e = exp_((z - shift) * scale);
    return {e, e};
  }
};

// The sum of exp(scale (z - shift)). Scaled are differences alone: what rounding does to large numbers would not
// cancel.
template <typename C>
struct ScaledSum {
  double scale;
  C shift = -kInfinity<C>;
  double sum = 0;

  FASTDIFF_HD void add(C other_shift, double other_sum) {
    const C top = other_shift > shift ? other_shift : shift;
    // != rather than <, so that a NaN among the shifts reaches the sum
    if (shift != top) sum *= std::exp((static_cast<double>(shift) - top) * scale);
    if (other_shift != top) other_sum *= std::exp((static_cast<double>(other_shift) - top) * scale);
    shift = top;
    sum += other_sum;
  }
  // With the shift that others took, unless that lets the exponentials grow too large.
  template <typename T>
  FASTDIFF_HD void add_run(const T* z, int64_t n) {
    const C rate = static_cast<C>(scale);
    C from = std::max(shift, std::numeric_limits<C>::lowest());  // never -inf
    Block<C> block = sum_terms<false>(ScaledExpTerm<C>{from, rate}, z, static_cast<C*>(nullptr), n);
    if ((block.max - from) * rate > 60)
      block = sum_terms<false>(ScaledExpTerm<C>{from = block.max, rate}, z, static_cast<C*>(nullptr), n);
    add(from, block.sum);
  }
  FASTDIFF_HD Conditional<C> softmax() const { return {scale, shift, sum}; }
};

// The terms' sum; of the forward one also what they are made of, for the gradient.
template <bool kGrad, bool kReverse, typename C>
FASTDIFF_HD double kl_run(const KlRow<C>& kl, const C* z, const C* t, C* out, int64_t n) {
  C sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t v = 0; v < n; ++v) {
    if constexpr (kReverse) {
      sum += kl.reverse(z[v], t[v]);
    } else {
      const Term<C> term = kl.forward(z[v], t[v]);
      sum += term.value;
      if constexpr (kGrad) out[v] = term.slope;
    }
  }
  return sum;
}

template <typename C>
FASTDIFF_HD void reverse_slopes(const KlRow<C>& kl, const C* z, const C* t, C* out, int64_t n, C loss) {
#pragma omp simd
  for (int64_t v = 0; v < n; ++v) out[v] = kl.reverse_slope(z[v], t[v], loss);
}

template <bool kGrad, bool kReverse, typename T>
FASTDIFF_HD double distill_row(const RowDistill& op, const Row<T>& row, const T* teacher, double weight) {
  using C = Acc<T>;
  ScaledSum<C> student{op.scale}, taught{op.scale};
  C in[kBlock], in_teacher[kBlock], out[kBlock];
  row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
    student.add_run(row.z + first, n);
    taught.add_run(teacher + first, n);
  });
  const KlRow<C> kl(student.softmax(), taught.softmax());
  double loss = 0;
  row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
    const C *z = widened(row.z + first, n, in), *t = widened(teacher + first, n, in_teacher);
    loss += kl_run<kGrad, kReverse>(kl, z, t, out, n);
    if constexpr (kGrad && !kReverse) store_scaled(row.grad + first, out, n, weight * op.scale);
  });
  if constexpr (kGrad && kReverse) {
    row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
      const C *z = widened(row.z + first, n, in), *t = widened(teacher + first, n, in_teacher);
      reverse_slopes(kl, z, t, out, n, static_cast<C>(loss));
      store_scaled(row.grad + first, out, n, weight * op.scale);
    });
  }
  if (kGrad && row.apart.left_out >= 0) store(row.grad + row.apart.left_out, C(0));
  return weight * loss;
}

// The same where the teacher gives log_p at some ids, in rising order, and all others are one outcome.
template <bool kGrad, typename T>
FASTDIFF_HD double distill_row_at(const RowDistill& op, const Row<T>& row, const int64_t* ids, const double* log_p,
                                  double weight) {
  using C = Acc<T>;
  ScaledSum<C> rest{op.scale};
  C in[kBlock], out[kBlock];
  int64_t next = 0;
  row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
    const C* z = widened(row.z + first, n, in);
    if (next < op.many && ids[next] < first + n) {
      if (z != in) z = std::copy(z, z + n, in) - n;
      for (; next < op.many && ids[next] < first + n; ++next) in[ids[next] - first] = -kInfinity<C>;
    }
    rest.add_run(z, n);
  });
  ScaledSum<C> all = rest;
  double sum_p = 0;
  for (int64_t j = 0; j < op.many; ++j) {
    const C z = load(row.z[ids[j]]);
    if (z != -kInfinity<C>) all.add(z, 1);
    sum_p += std::exp(log_p[j]);
  }
  const Conditional<C> student = all.softmax();
  const bool are_all = op.many == op.num_states - (op.mask_index >= 0);
  const Outcome others{log_left(sum_p, are_all), student.log(rest.shift) + std::log(rest.sum)};
  std::vector<Outcome> outcomes(op.many);
  double loss = others.term(op.reverse);
  for (int64_t j = 0; j < op.many; ++j) {
    outcomes[j] = {log_p[j] - log_excess(sum_p, are_all), student.log(load(row.z[ids[j]]))};
    loss += outcomes[j].term(op.reverse);
  }
  if constexpr (kGrad) {
    const double factor = weight * op.scale,
                 slope = rest.sum == 0 ? 0 : factor * others.slope(op.reverse, loss) / rest.sum;
    const ScaledExpTerm<C> term{rest.shift, static_cast<C>(op.scale)};
    row.for_each_run([&](int64_t first, int64_t n) __attribute__((always_inline)) {
      sum_terms<true>(term, row.z + first, out, n);
      store_scaled(row.grad + first, out, n, slope);
    });
    for (int64_t j = 0; j < op.many; ++j)
      store(row.grad + ids[j], static_cast<C>(factor * outcomes[j].slope(op.reverse, loss)));
    if (row.apart.left_out >= 0) store(row.grad + row.apart.left_out, C(0));
  }
  return weight * loss;
}

template <bool kGrad, typename T>
FASTDIFF_HD void distill_rows(const RowDistill& op, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    T* grad = kGrad ? static_cast<T*>(op.grad) + r * op.num_states : nullptr;
    if (!op.scored(r)) {
      op.loss[r] = 0;
      if constexpr (kGrad) std::memset(static_cast<void*>(grad), 0, op.num_states * sizeof(T));
      continue;
    }
    const Row<T> row{data<T>(op.z) + row_offset(op.z, r), grad, op.num_states, Apart(op.mask_index)};
    const double weight = op.weight ? op.weight[r] * op.share : op.share;
    if (op.ids) {
      const double* log_p = data<double>(op.teacher) + r * op.many;
      op.loss[r] = distill_row_at<kGrad>(op, row, op.ids + r * op.many, log_p, weight);
      continue;
    }
    const T* teacher = data<T>(op.teacher) + row_offset(op.teacher, r);
    op.loss[r] = op.reverse ? distill_row<kGrad, true>(op, row, teacher, weight)
                            : distill_row<kGrad, false>(op, row, teacher, weight);
  }
}

#define FASTDIFF_DISTILL(SUFFIX, TARGET)                                     \
  template <bool kGrad, typename T>                                          \
  TARGET void distill_##SUFFIX(const RowDistill& op, int64_t b, int64_t e) { \
    distill_rows<kGrad, T>(op, b, e);                                        \
  }
FASTDIFF_FOR_EACH_ISA(FASTDIFF_DISTILL)

using Rows = void (*)(const RowDistill&, int64_t, int64_t);

template <typename T>
Rows rows_for(Isa isa, bool grad) {
  if (grad) return FASTDIFF_FOR_ISA(distill, isa, <true, T>);
  return FASTDIFF_FOR_ISA(distill, isa, <false, T>);
}

Rows rows_for(ScalarType dtype, Isa isa, bool grad) {
  switch (dtype) {
    case ScalarType::Float:
      return rows_for<float>(isa, grad);
    case ScalarType::Double:
      return rows_for<double>(isa, grad);
    case ScalarType::BFloat16:
      return rows_for<BFloat16>(isa, grad);
    case ScalarType::Half:
      return rows_for<Float16>(isa, grad);
    default:
      bad_value("logits: expected float32, float64, bfloat16 or float16");
  }
}

std::vector<double> run(RowDistill& op) {
  std::vector<double> losses(op.rows);
  op.loss = losses.data();
  const Rows rows = rows_for(op.z.scalar_type(), current_isa(), op.grad != nullptr);
  const int64_t grain = std::max<int64_t>(1, 32768 / op.num_states);
  torch::stable::parallel_for(0, op.rows, grain, [&](int64_t b, int64_t e) { rows(op, b, e); });
  return losses;
}

std::vector<int64_t> token_shape(const Tensor& z) { return {z.sizes().begin(), z.sizes().end() - 1}; }

}  // namespace

// Per-token losses (reduction "none") or their sum or mean, and the gradient of the sum or mean if asked for.
std::tuple<Tensor, Tensor> row_distill(Tensor z, Tensor teacher, std::optional<Tensor> ids, std::optional<Tensor> mask,
                                       std::optional<Tensor> weight, std::optional<Tensor> num_items, bool reverse,
                                       int64_t mask_index, double scale, std::string reduction, bool with_grad) {
  RowDistill op(z, teacher, ids, mask, weight, reverse, mask_index, scale);
  if (reduction == "mean") {
    const int64_t count = mask ? std::count(op.mask, op.mask + op.rows, true) : op.rows;
    op.share = 1 / (num_items ? *data<double>(*num_items) : static_cast<double>(std::max<int64_t>(count, 1)));
  }
  Tensor grad = torch::stable::new_empty(z, with_grad ? sizes(z) : std::vector<int64_t>{0});
  advise_huge_pages(grad);
  if (with_grad) op.grad = grad.mutable_data_ptr();
  std::vector<double> losses = run(op);

  const bool none = reduction == "none", is_double = z.scalar_type() == ScalarType::Double;
  if (!none) losses.assign(1, std::accumulate(losses.begin(), losses.end(), 0.0));
  const ScalarType dtype = is_double ? ScalarType::Double : ScalarType::Float;
  Tensor loss = torch::stable::new_empty(z, none ? token_shape(z) : std::vector<int64_t>{}, dtype);
  if (is_double)
    std::copy(losses.begin(), losses.end(), mutable_data<double>(loss));
  else
    std::copy(losses.begin(), losses.end(), mutable_data<float>(loss));
  return {loss, grad};
}

// Per-token losses in float64; if asked for, the gradient of their sum replaces z, which is contiguous.
Tensor row_distill_(Tensor z, Tensor teacher, std::optional<Tensor> ids, std::optional<Tensor> mask,
                    std::optional<Tensor> weight, bool reverse, int64_t mask_index, double scale, bool with_grad) {
  RowDistill op(z, teacher, ids, mask, weight, reverse, mask_index, scale);
  if (with_grad) op.grad = z.mutable_data_ptr();
  const std::vector<double> losses = run(op);
  Tensor loss = torch::stable::new_empty(z, token_shape(z), ScalarType::Double);
  std::copy(losses.begin(), losses.end(), mutable_data<double>(loss));
  return loss;
}

}  // namespace fastdiff
