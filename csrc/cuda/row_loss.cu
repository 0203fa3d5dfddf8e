// Row losses on the GPU. A row is read from memory once, by a cluster of blocks that holds it in shared memory where
// the loss takes more than one pass, and its gradient is written once. Twin of csrc/cpu/row_loss.cpp, which says more.
#include "affine_rows.h"
#include "operators.h"
#include "score_rows.h"
#include "softmax_rows.h"

namespace fastdiff {
namespace {

template <typename Family>
__device__ Constants constants_of(const RowLoss& op, int64_t r, bool moved) {
  const double scale = *op.scale;
  Constants constants{op.weight ? op.weight[r] * scale : scale, op.entropy_weight ? op.entropy_weight[r] * scale : 0};
  if constexpr (std::is_same_v<Family, Softmax>) {
    const SoftmaxRow row(op.traits.functor, op.sigma ? op.sigma + r : nullptr, op.all_states);
    constants.weight *= row.weight, constants.offset = row.offset;
  } else if constexpr (!std::is_same_v<Family, Affine>) {
    if (op.scale_by_sigma)
      constants.shift = Noise(op.sigma[r]).log_e1 + std::log(static_cast<double>(op.all_states - 1));
    constants.scores = {op.traits.functor, op.sigma[r], op.all_states, moved};
  }
  return constants;
}

template <typename T, typename Family, bool kGrad, bool kStats, bool kEntropy = false>
__global__ void __launch_bounds__(512, 1) row_loss_kernel(const __grid_constant__ RowLoss op) {
  FASTDIFF_SHARED(memory);
  LossShared& shared = *reinterpret_cast<LossShared*>(memory);
  const int64_t r = blockIdx.x / Cluster::size();
  const int64_t x0 = op.x0[r], xt = op.xt ? op.xt[r] : -1;
  const bool all = op.traits.noised != Noised::absorb || !op.xt;
  const bool scored = x0 != op.ignore_index && (op.mask ? op.mask[r] : all || xt == op.mask_index);
  const T* z = op.z.row<T>(r);
  T* to = kGrad ? static_cast<T*>(op.grad) + r * op.z.num_states : nullptr;

  Results results{};
  if (scored) {
    const Copies copies(shared.barriers);
    const Row<T> row(z, op.z.num_states, copies, reinterpret_cast<uint4*>(memory + kShared), op.units);
    Cluster::arrive();
    const Apart apart(op.traits, x0, xt, op.mask_index, op.exclude_mask);
    const bool moved = x0 != xt;
    const int64_t least = op.all_states == op.z.num_states ? 0 : -1;
    const auto id = [&](int64_t id, int64_t least, int otherwise) {
      return id >= least && id < op.z.num_states ? static_cast<int>(id) : otherwise;
    };
    if (threadIdx.x == 0) shared.constants = constants_of<Family>(op, r, moved);
    __syncthreads();
    const Work<T> work{row, to, shared, id(apart.x0, least, -2), id(apart.left_out, -1, -3), id(apart.xt, -1, -3)};
    if constexpr (std::is_same_v<Family, Softmax>)
      results = softmax_row<kGrad, kStats, kEntropy>(work, op.penalty);
    else if constexpr (std::is_same_v<Family, Affine>)
      results = affine_row<kGrad>(work, op, r, moved);
    else
      results = scores_row<Family, kGrad>(work);
  } else if (kGrad) {
    const Copies copies(shared.barriers);
    const Row<T> row(z, op.z.num_states, copies, nullptr, -1);
    const Target<T> grad(to, row.head);
    row.each_unread([&](const auto& few) { grad.put(few); });
  }
  if (threadIdx.x != 0 || Cluster::rank() != 0) return;
  if (op.loss_is_double)
    static_cast<double*>(op.loss)[r] = results.loss;
  else
    static_cast<float*>(op.loss)[r] = static_cast<float>(results.loss);
  if (kStats && op.stats) {
    op.stats[r] = static_cast<float>(results.logsumexp);
    op.stats[op.rows + r] = static_cast<float>(results.entropy);
    op.stats[2 * op.rows + r] = static_cast<float>(results.correct);
    op.stats[3 * op.rows + r] = static_cast<float>(results.nll);
  }
}

template <typename T, typename Family>
void launch_as(const RowLoss& op, const Tensor& z, const Grid& grid) {
  if constexpr (std::is_same_v<Family, Softmax>) {
    if (op.entropy_weight) {
      const auto kernel =
          op.grad ? row_loss_kernel<T, Family, true, true, true> : row_loss_kernel<T, Family, false, true, true>;
      return launch(kernel, z, grid, op);
    }
    if (op.stats) {
      const auto kernel = op.grad ? row_loss_kernel<T, Family, true, true> : row_loss_kernel<T, Family, false, true>;
      return launch(kernel, z, grid, op);
    }
  }
  launch(op.grad ? row_loss_kernel<T, Family, true, false> : row_loss_kernel<T, Family, false, false>, z, grid, op);
}

}  // namespace

void launch_row_loss(Tensor z, Tensor x0, std::optional<Tensor> xt, std::optional<Tensor> mask,
                     std::optional<Tensor> sigma, std::optional<Tensor> weight, std::optional<Tensor> entropy_weight,
                     std::optional<Tensor> extra, Tensor scale, Tensor loss, std::optional<Tensor> grad,
                     std::optional<Tensor> stats, std::string functor, int64_t mask_index, bool exclude_mask,
                     int64_t ignore_index, bool scale_by_sigma, double penalty, int64_t all_states) {
  RowLoss op{Rows(z), x0.numel(), data<int64_t>(x0), data<int64_t>(xt), data<bool>(mask)};
  op.sigma = data<double>(sigma), op.weight = data<double>(weight), op.entropy_weight = data<double>(entropy_weight),
  op.extra = data<double>(extra), op.scale = data<double>(scale);
  op.loss = loss.mutable_data_ptr(), op.loss_is_double = loss.scalar_type() == ScalarType::Double;
  op.grad = grad ? grad->mutable_data_ptr() : nullptr, op.stats = stats ? mutable_data<float>(*stats) : nullptr;
  op.all_states = all_states, op.mask_index = mask_index, op.ignore_index = ignore_index;
  op.traits = functor_named(functor), op.exclude_mask = exclude_mask, op.scale_by_sigma = scale_by_sigma;
  op.penalty = penalty;
  with_family(op.traits.functor, [&](auto family) {
    using Family = decltype(family);
    const Shape shape = shape_of(z.size(-1) * z.element_size(), Family::kPasses == 1 ? 0 : limits().shared - kShared);
    op.units = shape.units;
    const Grid grid{op.rows * shape.cluster, shape.threads, kShared + shape.room(), shape.cluster};
    with_type(z, [&](auto number) { launch_as<decltype(number), Family>(op, z, grid); });
  });
}

}  // namespace fastdiff
