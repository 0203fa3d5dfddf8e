// Distillation on the GPU: two rows are read together by a cluster of blocks, once from memory and then from the
// second-level cache. Twin of csrc/cpu/distill.cpp, which says more.
#include <cfloat>

#include "../distill.h"
#include "operators.h"
#include "row.h"
#include "rows.h"

namespace fastdiff {
namespace {

// teacher is as z or, with ids, [rows, many] in double.
struct RowDistill {
  Rows z, teacher;
  const int64_t* ids;
  const bool* mask;
  const double *weight, *share;
  void *loss, *grad;  // float or double; as z
  int many, mask_index;
  double scale;
  bool loss_is_double;
};

// The sum of exp(scale z) is exp(scale m) s, with m the largest z. Scaled are differences alone, as on the CPU.
struct Sum {
  float m = -FLT_MAX, s = 0;  // which subtracts from -inf without NaN

  template <int kMany>
  __device__ void add(const Few<kMany>& few, float scale) {
    float top = m;
    for (const float x : few.x) top = fmaxf(top, x);
    float sum = 0;
    for (const float x : few.x) sum += exp_((x - top) * scale);
    s = fmaf(s, exp_((m - top) * scale), sum);
    m = top;
  }
};

struct Merge {
  float scale;

  __device__ Sum operator()(const Sum& a, const Sum& b) const {
    const bool a_is_high = a.m >= b.m;  // whose sum stays: the same bits in either order
    const float m = a_is_high ? a.m : b.m, low = a_is_high ? b.m : a.m;
    const float high_s = a_is_high ? a.s : b.s, low_s = a_is_high ? b.s : a.s;
    return {m, fmaf(low_s, exp_((low - m) * scale), high_s)};
  }
};

struct TwoSums {
  Sum student, teacher;
};

struct MergeTwo {
  Merge merge;

  __device__ TwoSums operator()(const TwoSums& a, const TwoSums& b) const {
    return {merge(a.student, b.student), merge(a.teacher, b.teacher)};
  }
};

struct Shared {
  uint64_t barriers[Copies::kParts];
  KlRow<float> kl;
  Conditional<float> student;
  Outcome others;
  double excess;
  Room<TwoSums> two;
  Room<Sum> rest, chosen;
  Room<double> sum_p, loss;
};

// A number for each of some of a row's ids, from a row that lies as it likes.
template <typename T>
struct Beside {
  const T* t;
  bool aligned;  // as the other row's groups are

  __device__ Beside(const T* t_, int head) : t(t_), aligned(reinterpret_cast<uintptr_t>(t_ + head) % 16 == 0) {}

  __device__ Few<1> of(const Few<1>& few) const { return {{load(t[few.first])}, few.first}; }
  __device__ Few<Row<T>::kVec> of(const Few<Row<T>::kVec>& few) const {
    Few<Row<T>::kVec> other;
    if (aligned) {
      other = Row<T>::unpacked(*reinterpret_cast<const uint4*>(t + few.first));
    } else {
#pragma unroll
      for (int i = 0; i < other.kSize; ++i) other.x[i] = load(t[few.first + i]);
    }
    other.first = few.first;
    return other;
  }
};

template <bool kReverse, bool kGrad, typename T>
__device__ double distill_row(const RowDistill& op, const Row<T>& row, const T* t, T* to, Shared& shared,
                              double weight) {
  const Beside<T> beside(t, row.head);
  const int mask = op.mask_index;
  const auto scale = static_cast<float>(op.scale);
  TwoSums sums;
  row.each([&](auto& few) {
    auto other = beside.of(few);
    few.set(mask, mask, -INFINITY);
    other.set(mask, mask, -INFINITY);
    sums.student.add(few, scale);
    sums.teacher.add(other, scale);
  });
  Cluster::wait();
  sums = reduce_cluster(sums, shared.two, MergeTwo{{scale}});
  if (threadIdx.x == 0) {
    const Conditional<float> student(op.scale, sums.student.m, sums.student.s);
    shared.kl = KlRow<float>(student, Conditional<float>(op.scale, sums.teacher.m, sums.teacher.s));
  }
  __syncthreads();
  const KlRow<float> kl = shared.kl;
  const Target<T> grad(to, row.head);
  const auto size = static_cast<float>(weight * op.scale);
  float sum = 0;
  row.each([&](auto& few) {
    auto other = beside.of(few);
    few.set(mask, mask, -INFINITY);
    other.set(mask, mask, -INFINITY);
    for (int i = 0; i < few.kSize; ++i) {
      if constexpr (kReverse) {
        sum += kl.reverse(few.x[i], other.x[i]);
      } else {
        const Term<float> term = kl.forward(few.x[i], other.x[i]);
        sum += term.value;
        few.x[i] = size * term.slope;
      }
    }
    if constexpr (kGrad && !kReverse) grad.put(few);
  });
  const double loss = reduce_cluster(static_cast<double>(sum), shared.loss, Add());
  if constexpr (kGrad && kReverse) {
    row.each([&](auto& few) {
      auto other = beside.of(few);
      few.set(mask, mask, -INFINITY);
      other.set(mask, mask, -INFINITY);
      for (int i = 0; i < few.kSize; ++i)
        few.x[i] = size * kl.reverse_slope(few.x[i], other.x[i], static_cast<float>(loss));
      grad.put(few);
    });
  }
  return weight * loss;
}

// Calls f(j) for the ids in rising order, ids[j], that are among few's.
template <int kMany, typename F>
__device__ void each_chosen(const int64_t* ids, int many, const Few<kMany>& few, const F& f) {
  int j = 0;
  for (int step = many; step > 0;) {  // the first that is not below few's
    const int half = step / 2;
    if (ids[j + half] < few.first)
      j += half + 1, step -= half + 1;
    else
      step = half;
  }
  for (; j < many && ids[j] < few.first + kMany; ++j) f(j);
}

template <bool kReverse, bool kGrad, typename T>
__device__ double distill_row_at(const RowDistill& op, const Row<T>& row, const int64_t* ids, const double* log_p,
                                 T* to, Shared& shared, double weight) {
  const int mask = op.mask_index;
  const auto scale = static_cast<float>(op.scale);
  const auto number = [&](int j) {
    const bool exists = ids[j] >= 0 && ids[j] < row.num_states;
    return exists ? load(row.z[ids[j]]) : NAN;
  };
  Sum rest, chosen;
  row.each([&](auto& few) {
    few.set(mask, mask, -INFINITY);
    each_chosen(ids, op.many, few, [&](int j) {
      const int id = static_cast<int>(ids[j]);
      few.set(id, id, -INFINITY);
    });
    rest.add(few, scale);
  });
  double sum_p = 0;
  for (int j = threadIdx.x; j < op.many; j += blockDim.x) {
    chosen.add(Few<1>{{number(j)}, 0}, scale);
    sum_p += std::exp(log_p[j]);
  }
  const Merge merge{scale};
  Cluster::wait();
  rest = reduce_cluster(rest, shared.rest, merge);
  chosen = reduce_block(chosen, shared.chosen, merge);
  sum_p = reduce_block(sum_p, shared.sum_p, Add());
  if (threadIdx.x == 0) {
    const bool are_all = op.many == row.num_states - (mask >= 0);
    const Sum all = merge(rest, chosen);
    shared.student = Conditional<float>(op.scale, all.m, all.s);
    const double log_rest = shared.student.log(rest.m) + std::log(static_cast<double>(rest.s));
    shared.others = {log_left(sum_p, are_all), log_rest};
    shared.excess = log_excess(sum_p, are_all);
  }
  __syncthreads();
  const Conditional<float> student = shared.student;
  const Outcome others = shared.others;
  const double excess = shared.excess;
  const auto outcome = [&](int j) { return Outcome{log_p[j] - excess, student.log(number(j))}; };
  double loss = threadIdx.x == 0 ? others.term(kReverse) : 0;
  for (int j = threadIdx.x; j < op.many; j += blockDim.x) loss += outcome(j).term(kReverse);
  loss = reduce_block(loss, shared.loss, Add());
  Cluster::arrive();
  Cluster::wait();  // until no block needs what others may write over
  if constexpr (kGrad) {
    const Target<T> grad(to, row.head);
    const double size = weight * op.scale;
    const auto share = static_cast<float>(rest.s == 0 ? 0 : size * others.slope(kReverse, loss) / rest.s);
    row.each([&](auto& few) {
      few.set(mask, mask, -INFINITY);
      for (float& x : few.x) x = share * exp_((x - rest.m) * scale);
      each_chosen(ids, op.many, few, [&](int j) {
        const int id = static_cast<int>(ids[j]);
        few.set(id, id, static_cast<float>(size * outcome(j).slope(kReverse, loss)));
      });
      grad.put(few);
    });
  }
  return weight * loss;
}

template <typename T, bool kAt, bool kReverse, bool kGrad>
__global__ void __launch_bounds__(512, 1) row_distill_kernel(const __grid_constant__ RowDistill op) {
  FASTDIFF_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int64_t r = blockIdx.x / Cluster::size();
  T* to = kGrad ? static_cast<T*>(op.grad) + r * op.z.num_states : nullptr;
  const Copies copies(shared.barriers);
  const Row<T> row(op.z.row<T>(r), op.z.num_states, copies, nullptr, -1);
  double loss = 0;
  if (!op.mask || op.mask[r]) {
    Cluster::arrive();
    const double weight = op.weight ? op.weight[r] * *op.share : *op.share;
    if constexpr (kAt) {
      const double* log_p = static_cast<const double*>(op.teacher.z) + r * op.many;
      loss = distill_row_at<kReverse, kGrad>(op, row, op.ids + r * op.many, log_p, to, shared, weight);
    } else {
      loss = distill_row<kReverse, kGrad>(op, row, op.teacher.row<T>(r), to, shared, weight);
    }
  } else if (kGrad) {
    const Target<T> grad(to, row.head);
    row.each_unread([&](const auto& few) { grad.put(few); });
  }
  if (threadIdx.x != 0 || Cluster::rank() != 0) return;
  if (op.loss_is_double)
    static_cast<double*>(op.loss)[r] = loss;
  else
    static_cast<float*>(op.loss)[r] = static_cast<float>(loss);
}

template <typename T, bool kAt, bool kReverse>
void launch_as(const RowDistill& op, const Tensor& z, const Grid& grid) {
  const auto kernel =
      op.grad ? row_distill_kernel<T, kAt, kReverse, true> : row_distill_kernel<T, kAt, kReverse, false>;
  launch(kernel, z, grid, op);
}

template <typename T>
void launch_of(const RowDistill& op, bool reverse, const Tensor& z, const Grid& grid) {
  if (op.ids) return reverse ? launch_as<T, true, true>(op, z, grid) : launch_as<T, true, false>(op, z, grid);
  return reverse ? launch_as<T, false, true>(op, z, grid) : launch_as<T, false, false>(op, z, grid);
}

}  // namespace

void launch_row_distill(Tensor z, Tensor teacher, std::optional<Tensor> ids, std::optional<Tensor> mask,
                        std::optional<Tensor> weight, Tensor share, Tensor loss, std::optional<Tensor> grad,
                        bool reverse, int64_t mask_index, double scale) {
  RowDistill op{Rows(z),          Rows(teacher),        data<int64_t>(ids),
                data<bool>(mask), data<double>(weight), data<double>(share)};
  op.loss = loss.mutable_data_ptr(), op.loss_is_double = loss.scalar_type() == ScalarType::Double;
  op.grad = grad ? grad->mutable_data_ptr() : nullptr;
  op.many = static_cast<int>(teacher.size(-1));
  op.mask_index = static_cast<int>(mask_index), op.scale = scale;
  const Shape shape = shape_of(z.size(-1) * z.element_size(), 0);
  const Grid grid{loss.numel() * shape.cluster, shape.threads, sizeof(Shared), shape.cluster};
  with_type(z, [&](auto number) { launch_of<decltype(number)>(op, reverse, z, grid); });
}

}  // namespace fastdiff
