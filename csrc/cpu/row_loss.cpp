// Row losses on the CPU: a row is read from memory once, and its gradient written once.
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "affine_rows.h"
#include "isa.h"
#include "operators.h"
#include "row_loss_cpu.h"
#include "score_rows.h"
#include "softmax_rows.h"

namespace fastdiff {
namespace {

constexpr int64_t kHugePage = int64_t{2} << 20;

template <typename Family, bool kGrad, typename T>
FASTDIFF_HD void row_loss_rows(const RowLoss& op, int64_t begin, int64_t end) {
  Scratch<T> scratch(op.num_states);
  for (int64_t r = begin; r < end; ++r) {
    T* grad = kGrad ? static_cast<T*>(op.grad) + r * op.num_states : nullptr;
    if (!op.scored[r]) {
      op.loss[r] = 0;
      if constexpr (kGrad) std::memset(static_cast<void*>(grad), 0, op.num_states * sizeof(T));
      continue;
    }
    const T* z = static_cast<const T*>(op.z) + row_offset(op.tensor, r);
    const Row<T> row{z, grad, op.num_states, op.apart(r)};
    const double weight = op.row_weight(r);
    if constexpr (std::is_same_v<Family, Softmax>)
      op.loss[r] = softmax_row<kGrad>(row, op.softmax_row(r), weight, op.row_entropy_weight(r), op.penalty, scratch,
                                      op.stats ? op.stats + r : nullptr);
    else if constexpr (std::is_same_v<Family, Affine>)
      op.loss[r] = affine_row<kGrad>(row, weight, op.moved(r), scratch,
                                     [&](const Conditionals& c) { return op.affine_row(r, c); });
    else
      op.loss[r] = scores_row<Family, kGrad>(row, weight, op.shift(r), op.scores_row(r));
  }
}

#define FASTDIFF_ROWS(SUFFIX, TARGET)                                  \
  template <typename Family, bool kGrad, typename T>                   \
  TARGET void rows_##SUFFIX(const RowLoss& op, int64_t b, int64_t e) { \
    row_loss_rows<Family, kGrad, T>(op, b, e);                         \
  }
FASTDIFF_FOR_EACH_ISA(FASTDIFF_ROWS)

using Rows = void (*)(const RowLoss&, int64_t, int64_t);

template <typename T>
Rows rows_for(const RowLoss& op, Isa isa) {
  return with_family(op.functor(), [&](auto family) -> Rows {
    using Family = decltype(family);
    if (op.grad) return FASTDIFF_FOR_ISA(rows, isa, <Family, true, T>);
    return FASTDIFF_FOR_ISA(rows, isa, <Family, false, T>);
  });
}

Rows rows_for(const RowLoss& op, Isa isa) {
  switch (op.tensor.scalar_type()) {
    case ScalarType::Float:
      return rows_for<float>(op, isa);
    case ScalarType::Double:
      return rows_for<double>(op, isa);
    case ScalarType::BFloat16:
      return rows_for<BFloat16>(op, isa);
    case ScalarType::Half:
      return rows_for<Float16>(op, isa);
    default:
      bad_value("logits: expected float32, float64, bfloat16 or float16");
  }
}

// A new tensor like z, float64 if z is and else float32, of what f gives by index.
template <typename F>
Tensor tensor_of(const Tensor& z, const std::vector<int64_t>& shape, const F& f) {
  const bool is_double = z.scalar_type() == ScalarType::Double;
  Tensor to = torch::stable::new_empty(z, shape, is_double ? ScalarType::Double : ScalarType::Float);
  for (int64_t i = 0; i < to.numel(); ++i)
    is_double ? void(mutable_data<double>(to)[i] = f(i)) : void(mutable_data<float>(to)[i] = static_cast<float>(f(i)));
  return to;
}

struct Results {
  std::vector<double> losses;
  Tensor stats;  // [4, ...], or [0, ...]
};

// The losses of all rows, in double, their statistics if asked for, and their gradient if the call has a place for it.
Results run(RowLoss& op, const Tensor& x0, bool with_stats) {
  std::vector<double> losses(op.rows);
  std::vector<RowStats> stats(with_stats ? op.rows : 0);
  op.loss = losses.data();
  op.stats = with_stats ? stats.data() : nullptr;
  const Rows rows = rows_for(op, current_isa());
  const int64_t grain = std::max<int64_t>(1, 32768 / op.num_states);
  torch::stable::parallel_for(0, op.rows, grain, [&](int64_t b, int64_t e) { rows(op, b, e); });
  std::vector<int64_t> shape = sizes(x0);
  shape.insert(shape.begin(), with_stats ? 4 : 0);
  const Tensor found = tensor_of(op.tensor, shape, [&](int64_t i) {
    const RowStats& s = stats[i % op.rows];
    return std::array{s.logsumexp, s.entropy, s.correct, s.nll}[i / op.rows];
  });
  return {losses, found};
}

}  // namespace

void advise_huge_pages(Tensor fresh) {
#ifdef MADV_HUGEPAGE
  const auto address = reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr());
  const uintptr_t first = (address + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (address + fresh.numel() * fresh.element_size()) / kHugePage * kHugePage;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

// Per-token losses (reduction "none") or their sum or mean; the gradient of the sum or mean if asked for; and if asked
// for, [4, ...] per token, the log-sum-exp, the entropy, 1 where x0 has the largest number, and x0's -log p.
std::tuple<Tensor, Tensor, Tensor> row_loss(Tensor z, Tensor x0, std::optional<Tensor> xt, std::optional<Tensor> mask,
                                            std::optional<Tensor> sigma, std::optional<Tensor> weight,
                                            std::optional<Tensor> entropy_weight, std::optional<Tensor> extra,
                                            std::optional<Tensor> num_items, std::string functor, int64_t mask_index,
                                            bool exclude_mask, int64_t ignore_index, bool scale_by_sigma,
                                            double penalty, std::string reduction, bool with_grad, bool with_stats) {
  RowLoss op(z, x0, xt, mask, sigma, weight, entropy_weight, extra, functor, mask_index, exclude_mask, ignore_index,
             scale_by_sigma, penalty);
  const int64_t count = op.check();
  if (reduction == "mean") op.scale = 1.0 / std::max<int64_t>(count, 1);
  if (num_items) op.scale = 1.0 / *data<double>(*num_items);

  Tensor grad = torch::stable::new_empty(z, with_grad ? sizes(z) : std::vector<int64_t>{0});
  advise_huge_pages(grad);
  if (with_grad) op.grad = grad.mutable_data_ptr();
  Results found = run(op, x0, with_stats);

  const bool none = reduction == "none";
  std::vector<double>& losses = found.losses;
  if (!none) losses.assign(1, std::accumulate(losses.begin(), losses.end(), 0.0));
  const std::vector<int64_t> shape = none ? sizes(x0) : std::vector<int64_t>{};
  return {tensor_of(z, shape, [&](int64_t r) { return losses[r]; }), grad, found.stats};
}

// Per-token losses in float64, and the same statistics; if asked for, the gradient of the losses' sum replaces z, which
// is contiguous.
std::tuple<Tensor, Tensor> row_loss_(Tensor z, Tensor x0, std::optional<Tensor> xt, std::optional<Tensor> mask,
                                     std::optional<Tensor> sigma, std::optional<Tensor> weight,
                                     std::optional<Tensor> entropy_weight, std::optional<Tensor> extra,
                                     std::string functor, int64_t mask_index, bool exclude_mask, int64_t ignore_index,
                                     bool scale_by_sigma, double penalty, int64_t all_states, bool with_grad,
                                     bool with_stats) {
  RowLoss op(z, x0, xt, mask, sigma, weight, entropy_weight, extra, functor, mask_index, exclude_mask, ignore_index,
             scale_by_sigma, penalty, all_states);
  op.check();
  if (with_grad) op.grad = z.mutable_data_ptr();
  const auto [losses, stats] = run(op, x0, with_stats);
  Tensor loss = torch::stable::new_empty(z, sizes(x0), ScalarType::Double);
  std::copy(losses.begin(), losses.end(), mutable_data<double>(loss));
  return {loss, stats};
}

}  // namespace fastdiff
