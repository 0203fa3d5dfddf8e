// Row losses on the GPU. A row is read from memory once, by a cluster of blocks that holds it in shared memory where
// the loss takes more than one pass, and its gradient is written once. Twin of csrc/cpu/row_bodies.h, which says more.
#include "../functor.h"
#include "../row_loss.h"
#include "online.h"
#include "operators.h"
#include "rows.h"

namespace fastdiff {
namespace {

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
  Functor functor;
  bool exclude_mask, scale_by_sigma, loss_is_double;
  double penalty;
};

// What thread 0 finds out for all: constants of a row, in double.
struct Constants {
  double weight, entropy_weight, shift, k;  // k = N / expm1(sigma)
  DseRow dse;
};

struct Pair {
  double a, b;
  __device__ Pair operator+(const Pair& other) const { return {a + other.a, b + other.b}; }
};

// From the row's sums, for its second and third pass.
struct NelboPass {
  float shift, inv_total, slope, offset, offset_w;
  double c_x0, c_xt, rest_x0, rest_xt, scale, pull_x0, loss_x0, a, dc_xt;
};

struct Shared {
  uint64_t barriers[Copies::kParts];
  Constants constants;
  NelboPass nelbo;
  Room<Online> online;
  Room<Pair> pair;
  Room<double> sum;
};
constexpr size_t kShared = (sizeof(Shared) + 15) / 16 * 16;

// One row: its numbers, where its gradient goes, and the ids that are treated apart; negative if not in the row. What
// concerns one of them alone is done by thread 0 of the block that has it, which writes its gradient when all are done.
template <typename T>
struct Work {
  const Row<T>& row;
  T* grad;
  Shared& shared;
  int x0, excluded;

  __device__ bool leads() const { return threadIdx.x == 0 && Cluster::rank() == 0; }
  __device__ bool minds(int id) const { return threadIdx.x == 0 && row.has(id); }
  __device__ float number(int id) const { return load(row.z[id]); }
};

struct Results {
  double loss, logsumexp = 0, entropy = 0, correct = 0, nll = 0;
};

// ---------------------------------------------------------------------------------------------------------
// Score entropy: a plain sum, so loss and gradient come from one pass.

template <typename F>
__device__ auto term_of(const F& term, float z) {
  return term(z);
}

// phi is for d < 88.3; from there on it is as good as its exponential, which soon leaves float.
__device__ Term<float> term_of(const PhiTerm<float>& term, float z) {
  const float d = z - term.shift;
  if (d < 88) return term(z);
  const float e = exp_(d);
  return {e - d, e};
}

// The sum of a few terms, which make room for scale times their derivatives.
template <typename C, typename F, int kMany>
__device__ C sum_terms(const F& term, C scale, Few<kMany>& few) {
  C sum = 0;
  for (float& x : few.x) {
    const Term<C> t = term_of(term, x);
    sum += t.value;
    x = static_cast<float>(scale * t.slope);
  }
  return sum;
}

// What overflows is computed again in double, with the weight in the exponent; all of it if float has no such weight.
// F<C>(args...) are the terms.
template <bool kGrad, template <typename> class F, typename T, typename... Args>
__device__ Results dse_row(const Work<T>& work, float neutral, Args... args) {
  const Constants& constants = work.shared.constants;
  const DseRow& dse = constants.dse;
  const RowWeight weight(constants.weight * dse.scale);
  Term<double> at_x0{work.x0 < -1 ? NAN : 0.0, 0};  // an id that does not exist
  if (work.minds(work.x0) && work.x0 != work.excluded) {
    const double s = work.number(work.x0) - constants.shift;
    at_x0 = weight.phi(s, s - dse.log_a_x0, dse.a_x0);
  }
  __syncthreads();  // a gradient in the place of its row must not come before this
  const Target<T> grad(work.grad, work.row.head);
  const F<float> term(args...);
  const double scale = constants.weight * dse.scale * term.factor;
  const auto narrow = static_cast<float>(scale);
  const bool holds = scale == 0 || (fabsf(narrow) >= FLT_MIN && fabsf(narrow) < INFINITY);
  const float limit = holds ? INFINITY : 0;
  float sum = 0;
  double overflown = 0;
  work.row.each([&](auto& few) {
    few.set(work.x0, work.excluded, neutral);
    auto numbers = few;
    const float more = sum + sum_terms(term, narrow, few);
    if (fabsf(more) < limit) {
      sum = more;
    } else {
      const F<double> exact(weight, args...);
      overflown += exact.factor * sum_terms(exact, exact.factor, numbers);
      numbers.set(work.excluded, work.excluded, 0);
      few = numbers;
    }
    if constexpr (kGrad) grad.put(few);
  });
  Cluster::wait();
  const double loss = reduce_cluster(scale * sum + overflown + at_x0.value, work.shared.sum, Add());
  if (kGrad && work.minds(work.x0)) store(work.grad + work.x0, static_cast<float>(at_x0.slope));
  return {loss};
}

// ---------------------------------------------------------------------------------------------------------
// Cross-entropy: a sum of exponentials, relative to a running maximum, then the gradient.

// Over all ids but x0 and the excluded one.
template <typename T>
__device__ Online sum_exp(const Work<T>& work) {
  Online all;
  work.row.each([&](auto& few) {
    few.set(work.x0, work.excluded, -INFINITY);
    all.add(few);
  });
  Cluster::wait();
  return reduce_cluster(all, work.shared.online, MergeOnline());
}

// The number of an id, for all threads: before any gradient is written. Elsewhere it is as if it weighed nothing.
template <typename T>
__device__ float number_at(const Work<T>& work, int id) {
  return id >= 0 ? work.number(id) : id == -1 ? -INFINITY : NAN;
}

// log p(x0), and the log-sum-exp. Neither is 1 added to a small sum, nor the shift to log(sum): digits would be lost.
struct LogP {
  double logsumexp, x0;

  __device__ LogP(const Online& others, float at_x0, bool elsewhere) {
    const double x = at_x0, other = others.m, shift = x > other ? x : other;
    double rest = others.s * std::exp(other - shift);
    if (shift == INFINITY) rest = NAN;  // inf - inf, as in PyTorch
    const double log_sum = x == shift ? std::log1p(rest) : std::log(rest + std::exp(x - shift));
    logsumexp = shift + log_sum;
    x0 = elsewhere ? -logsumexp : (x - shift) - log_sum;
  }
};

// Writes the gradients exp(x) (slope - pull x) of all ids, x = z - shift; the sum of exp(x) x over those that are not
// apart, and how many numbers stand before x0's.
template <bool kGrad, bool kStats, bool kEntropy, typename T>
__device__ Pair dce_pass(const Work<T>& work, float at_x0, float shift, double slope, double pull) {
  const double excess = fmax(fmax(fabs(slope), fabs(pull)) * 1e-30, 1.0);  // what float has no room for
  const auto a = static_cast<float>(slope / excess), b = static_cast<float>(pull / excess);
  const auto size = static_cast<float>(excess);
  const Target<T> grad(work.grad, work.row.head);
  float dot = 0;
  int ahead = 0;
  work.row.each([&](auto& few) {
    if constexpr (kStats) few.set(work.x0, work.excluded, -INFINITY);
    for (int i = 0; i < few.kSize; ++i) {
      const float z = few.x[i], x = z - shift, e = exp_(x);
      if constexpr (kStats) {
        dot += x < -86 ? 0.0f : e * x;
        ahead += z > at_x0 || (z == at_x0 && few.first + i < work.x0);
      }
      few.x[i] = (kEntropy ? a - b * fmaxf(x, -1000) : a) * e * size;  // no NaN where e is 0
    }
    if constexpr (kGrad) grad.put(few);
  });
  return {dot, static_cast<double>(ahead)};
}

template <bool kGrad, bool kStats, bool kEntropy, typename T>
__device__ Results dce_row(const Work<T>& work, double penalty) {
  const float at_x0 = number_at(work, work.x0);
  const bool elsewhere = work.x0 == -1;
  const Online others = sum_exp(work);
  const double weight = work.shared.constants.weight, entropy_weight = work.shared.constants.entropy_weight;

  Results results{};
  double grad_x0 = 0;
  if (work.leads() || work.minds(work.x0)) {
    const LogP log_p(others, at_x0, elsewhere);
    const double drift = penalty == 0 ? 0 : log_p.logsumexp;  // which may be infinite
    results.logsumexp = log_p.logsumexp;
    results.nll = -log_p.x0;
    results.loss = weight * (penalty * drift * drift - log_p.x0);
    grad_x0 = weight * (std::expm1(log_p.x0) + 2 * penalty * drift * std::exp(log_p.x0));
  }
  if (!kGrad && !kStats) return results;

  // The same in float, for the others.
  const float shift = fmaxf(others.m, at_x0), e_x0 = exp_(at_x0 - shift);
  const float rest = others.s * exp_(others.m - shift), all = rest + e_x0;
  const float log_all = at_x0 == shift ? log1pf(rest) : logf(all);
  const bool is_nothing = elsewhere && all == 0;  // a part of the row without weight
  double slope = weight * (penalty == 0 ? 1 : 1 + 2 * penalty * (shift + log_all)), pull = entropy_weight;
  slope = is_nothing ? 0 : slope / all, pull = is_nothing ? 0 : pull / all;
  constexpr bool kAtOnce = kGrad && !kEntropy;
  Pair sums = dce_pass<kAtOnce, kStats, false>(work, at_x0, shift, slope, 0);
  if constexpr (kStats) {
    sums = reduce_cluster(sums, work.shared.pair, Add());
    const double mean = (sums.a + (e_x0 > 0 ? e_x0 * (at_x0 - shift) : 0)) / all;
    results.entropy = log_all - mean;
    results.correct = sums.b == 0 && all == all;
    if constexpr (kEntropy) {
      const double p = std::exp(-results.nll);
      results.loss += entropy_weight * results.entropy;
      grad_x0 -= p == 0 ? 0 : entropy_weight * p * (results.entropy - results.nll);
      if constexpr (kGrad) dce_pass<true, false, true>(work, at_x0, shift, is_nothing ? 0 : slope + pull * mean, pull);
    }
  }
  if constexpr (kGrad) {
    __syncthreads();
    if (work.minds(work.x0)) store(work.grad + work.x0, static_cast<float>(grad_x0));
    if (work.minds(work.excluded)) store(work.grad + work.excluded, 0.0f);
  }
  return results;
}

// ---------------------------------------------------------------------------------------------------------
// Score entropy of the uniform graph from conditionals: two sums in sequence, then the gradient.

__device__ NelboPass nelbo_pass(const Online& others, double at_x0, double at_xt, bool moved, double num_states,
                                const Constants& constants) {
  const double other = others.m;
  double shift = at_x0 > other ? at_x0 : other;
  shift = at_xt > shift ? at_xt : shift;
  const double e_others = others.s * std::exp(other - shift), e_xt = std::exp(at_xt - shift);
  const double e_x0 = moved ? std::exp(at_x0 - shift) : 0, total = e_others + e_x0 + e_xt;
  NelboPass pass;
  pass.c_x0 = e_x0 / total, pass.c_xt = e_xt / total;
  pass.rest_x0 = (e_others + e_xt) / total, pass.rest_xt = (e_others + e_x0) / total;
  const NelboRow row(constants.k, static_cast<int64_t>(num_states), moved, pass.c_xt, pass.c_x0, pass.rest_xt,
                     pass.rest_x0);
  pass.shift = static_cast<float>(shift), pass.inv_total = static_cast<float>(1 / total);
  pass.slope = static_cast<float>(row.slope), pass.offset = static_cast<float>(row.offset);
  pass.offset_w = static_cast<float>(row.offset_w);
  pass.scale = constants.weight * constants.k / (num_states * row.b);
  pass.pull_x0 = row.w_x0 / row.rho_x0, pass.loss_x0 = row.a_x0 * log_gap(row.w_x0, row.rho_x0);
  pass.a = row.a, pass.dc_xt = row.dc_xt;
  return pass;
}

// c, w - log(rho) and 1 - 1/rho of a number.
struct NelboTerms {
  float c, gap, pull;

  __device__ NelboTerms(float z, const NelboPass& pass) {
    c = exp_(z - pass.shift) * pass.inv_total;
    const float rho = fmaf(pass.slope, c, pass.offset), w = fmaf(pass.slope, c, pass.offset_w);
    gap = log_gap(w, rho);
    pull = divide_(w, rho);
  }
};

template <bool kGrad, typename T>
__device__ Results nelbo_row(const Work<T>& work) {
  Shared& shared = work.shared;
  const double at_x0 = number_at(work, work.x0), at_xt = number_at(work, work.excluded);
  const bool moved = work.x0 != work.excluded;
  const double num_states = work.row.num_states, weight = shared.constants.weight;
  const Online others = sum_exp(work);
  if (threadIdx.x == 0) shared.nelbo = nelbo_pass(others, at_x0, at_xt, moved, num_states, shared.constants);
  __syncthreads();
  const NelboPass& pass = shared.nelbo;
  float gaps = 0, pulls = 0;
  work.row.each([&](auto& few) {
    for (int i = 0; i < few.kSize; ++i) {
      const NelboTerms terms(few.x[i], pass);
      const bool apart = few.first + i == work.x0 || few.first + i == work.excluded;
      gaps += apart ? 0 : terms.gap;
      pulls += apart ? 0 : terms.c * terms.pull;
    }
  });
  const Pair sums = reduce_cluster(Pair{gaps, pulls}, shared.pair, Add());
  if constexpr (kGrad) {
    const Target<T> grad(work.grad, work.row.head);
    const double mean = sums.b + pass.c_xt * pass.dc_xt + pass.c_x0 * pass.pull_x0;
    const auto scale = static_cast<float>(pass.scale), mean_pull = static_cast<float>(mean);
    work.row.each([&](auto& few) {
      for (float& x : few.x) {
        const NelboTerms terms(x, pass);
        x = scale * terms.c * (terms.pull - mean_pull);
      }
      grad.put(few);
    });
    __syncthreads();
    // pull - mean, where the two nearly cancel if c is near 1
    const double xt_pull = pass.dc_xt * pass.rest_xt - (sums.b + pass.c_x0 * pass.pull_x0);
    const double x0_pull = pass.pull_x0 * pass.rest_x0 - (mean - pass.c_x0 * pass.pull_x0);
    if (work.minds(work.x0)) store(work.grad + work.x0, static_cast<float>(pass.scale * pass.c_x0 * x0_pull));
    if (work.minds(work.excluded)) {
      store(work.grad + work.excluded, static_cast<float>(pass.scale * pass.c_xt * xt_pull));
    }
  }
  return {weight / num_states * (pass.a * sums.a + pass.loss_x0)};
}

// ---------------------------------------------------------------------------------------------------------
// The kernel.

__device__ Constants constants_of(const RowLoss& op, int64_t r, bool moved) {
  const double scale = *op.scale;
  Constants constants{op.weight ? op.weight[r] * scale : scale, op.entropy_weight ? op.entropy_weight[r] * scale : 0};
  if (!op.sigma) return constants;
  const Noise noise(op.sigma[r]);
  const double states = static_cast<double>(op.all_states);
  if (op.scale_by_sigma) constants.shift = noise.log_e1 + std::log(states - 1);
  constants.k = states * noise.inv_e1;
  if (op.functor == Functor::dce) constants.weight *= noise.inv_e1;  // DSE of log c - log e1 is DCE / e1
  if (op.functor == Functor::dse_absorb) constants.dse = DseRow::absorb(op.sigma[r]);
  if (op.functor == Functor::dse_uniform) constants.dse = DseRow::uniform(op.sigma[r], op.all_states, moved);
  return constants;
}

template <Functor kFunctor, bool kGrad, bool kStats, bool kEntropy, typename T>
__device__ Results row_results(const Work<T>& work, const RowLoss& op) {
  const Constants& constants = work.shared.constants;
  const double shift = constants.shift;
  if constexpr (kFunctor == Functor::dce) {
    return dce_row<kGrad, kStats, kEntropy>(work, op.penalty);
  } else if constexpr (kFunctor == Functor::dse_absorb) {
    return dse_row<kGrad, ExpTerm>(work, -INFINITY, shift);
  } else if constexpr (kFunctor == Functor::dse_uniform) {
    const DseRow& dse = constants.dse;
    if (dse.a == 0) return dse_row<kGrad, ExpTerm>(work, -INFINITY, shift);  // sigma is 0
    return dse_row<kGrad, PhiTerm>(work, static_cast<float>(shift + dse.log_a), shift, dse.a, dse.log_a);
  } else {
    return nelbo_row<kGrad>(work);
  }
}

template <typename T, Functor kFunctor, bool kGrad, bool kStats, bool kEntropy = false>
__global__ void __launch_bounds__(512, 1) row_loss_kernel(const __grid_constant__ RowLoss op) {
  FASTDIFF_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  constexpr bool kUniform = kFunctor == Functor::dse_uniform || kFunctor == Functor::dse_uniform_logits;
  const int64_t r = blockIdx.x / Cluster::size();
  const int64_t x0 = op.x0[r], xt = op.xt ? op.xt[r] : -1;
  const bool scored = x0 != op.ignore_index && (op.mask ? op.mask[r] : kUniform || !op.xt || xt == op.mask_index);
  const T* z = op.z.row<T>(r);
  T* to = kGrad ? static_cast<T*>(op.grad) + r * op.z.num_states : nullptr;

  Results results{};
  if (scored) {
    const Copies copies(shared.barriers);
    const Row<T> row(z, op.z.num_states, copies, reinterpret_cast<uint4*>(memory + kShared), op.units);
    Cluster::arrive();
    const int64_t excluded = kUniform ? xt : op.exclude_mask ? op.mask_index : -1;
    const int64_t least = op.all_states == op.z.num_states ? 0 : -1;
    const bool exists = x0 >= least && x0 < op.z.num_states, other = excluded >= -1 && excluded < op.z.num_states;
    if (threadIdx.x == 0) shared.constants = constants_of(op, r, x0 != xt);
    __syncthreads();
    const Work<T> work{row, to, shared, exists ? static_cast<int>(x0) : -2, other ? static_cast<int>(excluded) : -3};
    results = row_results<kFunctor, kGrad, kStats, kEntropy>(work, op);
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

template <typename T, Functor kFunctor>
void launch_as(const RowLoss& op, const Tensor& z, const Grid& grid) {
  if constexpr (kFunctor == Functor::dce) {
    if (op.entropy_weight) {
      const auto kernel =
          op.grad ? row_loss_kernel<T, kFunctor, true, true, true> : row_loss_kernel<T, kFunctor, false, true, true>;
      return launch(kernel, z, grid, op);
    }
    if (op.stats) {
      const auto kernel =
          op.grad ? row_loss_kernel<T, kFunctor, true, true> : row_loss_kernel<T, kFunctor, false, true>;
      return launch(kernel, z, grid, op);
    }
  }
  launch(op.grad ? row_loss_kernel<T, kFunctor, true, false> : row_loss_kernel<T, kFunctor, false, false>, z, grid, op);
}

template <typename T>
void launch_of(const RowLoss& op, const Tensor& z, const Grid& grid) {
  switch (op.functor) {
    case Functor::dce:
      return launch_as<T, Functor::dce>(op, z, grid);
    case Functor::dse_absorb:
      return launch_as<T, Functor::dse_absorb>(op, z, grid);
    case Functor::dse_uniform:
      return launch_as<T, Functor::dse_uniform>(op, z, grid);
    case Functor::dse_uniform_logits:
      return launch_as<T, Functor::dse_uniform_logits>(op, z, grid);
  }
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
  op.functor = functor_named(functor), op.exclude_mask = exclude_mask, op.scale_by_sigma = scale_by_sigma;
  op.penalty = penalty;
  const bool one_pass = op.functor == Functor::dse_absorb || op.functor == Functor::dse_uniform;
  const Shape shape = shape_of(z.size(-1) * z.element_size(), one_pass ? 0 : limits().shared - kShared);
  op.units = shape.units;
  const Grid grid{op.rows * shape.cluster, shape.threads, kShared + shape.room(), shape.cluster};
  with_type(z, [&](auto number) { launch_of<decltype(number)>(op, z, grid); });
}

}  // namespace fastdiff
