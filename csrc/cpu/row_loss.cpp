// Row losses on the CPU: a row is read from memory once, and its gradient written once.
#include "../row_loss.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "isa.h"
#include "operators.h"
#include "row_loss_cpu.h"

namespace fastdiff {
namespace {

constexpr int64_t kBlock = 1024;  // numbers summed in the working type before a sum goes into double
constexpr int64_t kHugePage = int64_t{2} << 20;

template <typename T>
using Acc = decltype(load(T()));

template <typename T>
struct MaxSum {
  T max = -std::numeric_limits<T>::infinity();
  double sum = 0;  // of exp(z - max)

  FASTDIFF_HD void add(T other_max, double other_sum) {
    const T top = other_max > max ? other_max : max;
    // != rather than <, so that a NaN among the maxima reaches the sum
    if (max != top) sum *= std::exp(static_cast<double>(max) - top);
    if (other_max != top) other_sum *= std::exp(static_cast<double>(other_max) - top);
    max = top;
    sum += other_sum;
  }
};

template <typename T>
FASTDIFF_HD MaxSum<Acc<T>> max_sum_exp(const T* z, int64_t n) {
  MaxSum<Acc<T>> total;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t size = std::min(kBlock, n - start);
    const T* block = z + start;
    Acc<T> top = -std::numeric_limits<Acc<T>>::infinity(), sum = 0;
#pragma omp simd reduction(max : top)
    for (int64_t v = 0; v < size; ++v) top = std::max(top, load(block[v]));
    // With every number -inf (or NaN) there is no finite maximum to subtract; 0 keeps exp well defined.
    const Acc<T> shift = std::isinf(top) && top < 0 ? Acc<T>(0) : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = 0; v < size; ++v) sum += exp_(load(block[v]) - shift);
    total.add(shift == top ? top : -std::numeric_limits<Acc<T>>::infinity(), sum);
  }
  return total;
}

// sum of exp(z - shift); the gradient is scale * exp(z - shift).
template <bool kGrad, typename T>
FASTDIFF_HD double exp_terms(const T* z, T* grad, int64_t n, Acc<T> shift, Acc<T> scale) {
  double total = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(start + kBlock, n);
    Acc<T> sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = start; v < end; ++v) {
      const Acc<T> e = exp_(load(z[v]) - shift);
      sum += e;
      if constexpr (kGrad) store(grad + v, scale * e);
    }
    total += sum;
  }
  return total;
}

// sum of a phi(s - log a), s = z - shift, shift_a = shift + log a; the gradient is scale * (exp(s) - a).
template <bool kGrad, typename T>
FASTDIFF_HD double phi_terms(const T* z, T* grad, int64_t n, Acc<T> shift, Acc<T> scale, Acc<T> a, Acc<T> shift_a) {
  double total = 0;
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = std::min(start + kBlock, n);
    Acc<T> sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t v = start; v < end; ++v) {
      const Term<Acc<T>> term = scaled_phi<Acc<T>>(load(z[v]) - shift, load(z[v]) - shift_a, a);
      sum += term.value;
      if constexpr (kGrad) store(grad + v, scale * term.slope);
    }
    total += sum;
  }
  return total;
}

// The ids other than x0 and the excluded one, as up to three ranges.
struct Ranges {
  int64_t begin[3], end[3];

  FASTDIFF_HD Ranges(int64_t x0, int64_t excluded, int64_t num_states) {
    const int64_t low = excluded < 0 ? x0 : std::min(x0, excluded), high = std::max(x0, excluded);
    begin[0] = 0, end[0] = low;
    begin[1] = low + 1, end[1] = high;
    begin[2] = high + 1, end[2] = num_states;
  }
};

template <bool kGrad, typename T>
FASTDIFF_HD double dce_row(const T* z, T* grad, int64_t num_states, int64_t x0, int64_t excluded, double weight) {
  const Ranges ranges(x0, excluded, num_states);
  MaxSum<Acc<T>> others;
  for (int k = 0; k < 3; ++k) {
    const auto part = max_sum_exp(z + ranges.begin[k], ranges.end[k] - ranges.begin[k]);
    others.add(part.max, part.sum);
  }
  const Acc<T> at_x0 = load(z[x0]);
  MaxSum<Acc<T>> all = others;
  all.add(at_x0, 1);
  if (all.max == std::numeric_limits<Acc<T>>::infinity()) all.sum = NAN;  // inf - inf, as in PyTorch
  // log p(x0). The maximum is never added to log(sum): beside a large one the sum's digits would be lost.
  const double log_p = (static_cast<double>(at_x0) - all.max) - std::log(all.sum);
  if constexpr (kGrad) {
    const Acc<T> scale = static_cast<Acc<T>>(weight / all.sum);
    for (int k = 0; k < 3; ++k)
      exp_terms<true>(z + ranges.begin[k], grad + ranges.begin[k], ranges.end[k] - ranges.begin[k], all.max, scale);
    store(grad + x0, static_cast<Acc<T>>(weight * std::expm1(log_p)));
  }
  return -weight * log_p;
}

template <bool kGrad, typename T>
FASTDIFF_HD double dse_row(const T* z, T* grad, int64_t num_states, int64_t x0, int64_t excluded, double weight,
                           double shift, const DseRow& row) {
  const Ranges ranges(x0, excluded, num_states);
  const Acc<T> scale = static_cast<Acc<T>>(weight * row.scale), a = static_cast<Acc<T>>(row.a);
  double sum = 0;
  for (int k = 0; k < 3; ++k) {
    const T* from = z + ranges.begin[k];
    T* to = kGrad ? grad + ranges.begin[k] : nullptr;
    const int64_t n = ranges.end[k] - ranges.begin[k];
    const Acc<T> shift_ = static_cast<Acc<T>>(shift);
    sum += a > 0 ? phi_terms<kGrad>(from, to, n, shift_, scale, a, static_cast<Acc<T>>(shift + row.log_a))
                 : exp_terms<kGrad>(from, to, n, shift_, scale);
  }
  if (x0 != excluded) {
    const Term<double> term = scaled_phi<double>(load(z[x0]) - shift, load(z[x0]) - (shift + row.log_a_x0), row.a_x0);
    sum += term.value;
    if constexpr (kGrad) store(grad + x0, static_cast<Acc<T>>(weight * row.scale * term.slope));
  }
  return weight * row.scale * sum;
}

template <bool kGrad, typename T>
FASTDIFF_HD void row_loss_rows(const RowLoss& op, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    T* grad = kGrad ? static_cast<T*>(op.grad) + r * op.num_states : nullptr;
    if (!op.scored[r]) {
      op.loss[r] = 0;
      if constexpr (kGrad) std::memset(static_cast<void*>(grad), 0, op.num_states * sizeof(T));
      continue;
    }
    const T* z = static_cast<const T*>(op.z) + op.row_offset(r);
    const int64_t x0 = op.x0[r], excluded = op.excluded(r);
    const double weight = op.row_weight(r);
    if (op.functor == Functor::dce)
      op.loss[r] = dce_row<kGrad>(z, grad, op.num_states, x0, excluded, weight);
    else
      op.loss[r] = dse_row<kGrad>(z, grad, op.num_states, x0, excluded, weight, op.shift(r), op.dse_row(r));
    if (kGrad && excluded >= 0) store(grad + excluded, Acc<T>(0));
  }
}

#define FASTDIFF_ROWS(SUFFIX, TARGET)                                  \
  template <bool kGrad, typename T>                                    \
  TARGET void rows_##SUFFIX(const RowLoss& op, int64_t b, int64_t e) { \
    row_loss_rows<kGrad, T>(op, b, e);                                 \
  }
FASTDIFF_FOR_EACH_ISA(FASTDIFF_ROWS)

using Rows = void (*)(const RowLoss&, int64_t, int64_t);

template <typename T>
Rows rows_for(Isa isa, bool grad) {
  if (grad) return FASTDIFF_FOR_ISA(rows, isa, <true, T>);
  return FASTDIFF_FOR_ISA(rows, isa, <false, T>);
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

// A fresh buffer costs a page fault every 4 KB unless the kernel is told, before the first touch, to use 2 MB ones.
void advise_huge_pages(void* start, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  const auto address = reinterpret_cast<uintptr_t>(start);
  const uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (address + bytes) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

// Per-token losses (reduction "none") or their sum or mean, and the gradient of the sum or mean if asked for.
std::tuple<Tensor, Tensor> row_loss(Tensor z, Tensor x0, std::optional<Tensor> xt, std::optional<Tensor> mask,
                                    std::optional<Tensor> sigma, std::optional<Tensor> weight,
                                    std::optional<Tensor> num_items, std::string functor, int64_t mask_index,
                                    bool exclude_mask, int64_t ignore_index, bool scale_by_sigma, std::string reduction,
                                    bool with_grad) {
  RowLoss op(z, x0, xt, mask, sigma, weight, functor, mask_index, exclude_mask, ignore_index, scale_by_sigma);
  const int64_t count = op.check();
  if (reduction == "mean") op.scale = 1.0 / std::max<int64_t>(count, 1);
  if (num_items) op.scale = 1.0 / *data<double>(*num_items);

  Tensor grad = torch::stable::new_empty(z, with_grad ? sizes(z) : std::vector<int64_t>{0});
  if (with_grad) advise_huge_pages(op.grad = grad.mutable_data_ptr(), grad.numel() * z.element_size());
  std::vector<double> losses(op.rows);
  op.loss = losses.data();
  const Rows rows = rows_for(z.scalar_type(), current_isa(), with_grad);
  const int64_t grain = std::max<int64_t>(1, 32768 / op.num_states);
  torch::stable::parallel_for(0, op.rows, grain, [&](int64_t b, int64_t e) { rows(op, b, e); });

  if (reduction != "none") {
    double sum = 0;
    for (double l : losses) sum += l;
    losses.assign(1, sum);
  }
  const bool is_double = z.scalar_type() == ScalarType::Double;
  const std::vector<int64_t> shape = reduction == "none" ? sizes(x0) : std::vector<int64_t>{};
  Tensor loss = torch::stable::new_empty(z, shape, is_double ? ScalarType::Double : ScalarType::Float);
  if (is_double)
    std::copy(losses.begin(), losses.end(), mutable_data<double>(loss));
  else
    std::transform(losses.begin(), losses.end(), mutable_data<float>(loss), [](double l) { return float(l); });
  return {loss, grad};
}

}  // namespace fastdiff
