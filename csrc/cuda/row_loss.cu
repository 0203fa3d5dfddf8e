// Row losses on the GPU. A row is read from memory once, by a cluster of blocks that holds it in shared memory where
// the loss takes more than one pass, and its gradient is written once. Twin of csrc/cpu/row_bodies.h, which says more.
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

struct Shared {
  uint64_t barriers[Copies::kParts];
  Constants constants;
  AffinePass affine;
  Room<Online> online;
  Room<Pair> pair;
  Room<double> sum;
};
constexpr size_t kShared = (sizeof(Shared) + 15) / 16 * 16;

// One row: its numbers, where its gradient goes, and the ids that are treated apart (Apart); negative if not in the
// row. What concerns one of them alone is done by thread 0 of the block that has it, which writes its gradient when all
// are done.
template <typename T>
struct Work {
  const Row<T>& row;
  T* grad;
  Shared& shared;
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

// ---------------------------------------------------------------------------------------------------------
// Scores: a plain sum, so loss and gradient come from one pass.

// The sum of a few terms, which make room for scale times their derivatives; infinite where they have no room in C.
template <typename C, typename F, int kMany>
__device__ C sum_terms(const F& term, C scale, Few<kMany>& few) {
  C sum = 0;
  for (float& x : few.x) {
    const bool fits = std::is_same_v<C, double> || x - static_cast<float>(term.shift) < F::kMost;
    const Term<C> t = term(x);
    sum += fits ? t.value : INFINITY;
    x = static_cast<float>(scale * t.slope);
  }
  return sum;
}

// The same in double, out of the way of the registers.
template <typename F, int kMany>
__device__ __noinline__ double exact_terms(const F& term, Few<kMany>& few) {
  return term.factor * sum_terms(term, term.factor, few);
}

// What overflows is computed again in double, with the weight in the exponent; all of it if float has no such weight.
// neutral is a number whose term is 0.
template <bool kGrad, typename F, template <typename> class Kind, typename T>
__device__ Results scores_pass(const Work<T>& work, float neutral, double a, double log_a) {
  const Constants& constants = work.shared.constants;
  const ScoresRow& scores = constants.scores;
  const double shift = constants.shift;
  const RowWeight weight(constants.weight * scores.scale);
  Term<double> at_x0{work.x0 < -1 ? NAN : 0.0, 0};  // an id that does not exist
  if (work.minds(work.x0) && work.x0 != work.left_out) {
    const typename F::template Near<double> term(weight, shift, scores.a_x0, scores.log_a_x0);
    at_x0 = term(work.number(work.x0));
    at_x0.value *= term.factor, at_x0.slope *= term.factor;
  }
  __syncthreads();  // a gradient in the place of its row must not come before this
  const Target<T> grad(work.grad, work.row.head);
  const Kind<float> term(shift, a, log_a);
  const double scale = constants.weight * scores.scale * term.factor;
  const auto narrow = static_cast<float>(scale);
  const bool holds = scale == 0 || (fabsf(narrow) >= FLT_MIN && fabsf(narrow) < INFINITY);
  const float limit = holds ? INFINITY : 0;
  float sum = 0;
  double overflown = 0;
  work.row.each([&](auto& few) {
    work.set_apart(few, neutral);
    auto numbers = few;
    const float more = sum + sum_terms(term, narrow, few);
    if (fabsf(more) < limit) {
      sum = more;
    } else {
      const Kind<double> exact(weight, shift, a, log_a);
      overflown += exact_terms(exact, numbers);
      numbers.set(work.left_out, work.left_out, 0);
      few = numbers;
    }
    if constexpr (kGrad) grad.put(few);
  });
  Cluster::wait();
  const double loss = reduce_cluster(scale * sum + overflown + at_x0.value, work.shared.sum, Add());
  if (kGrad && work.minds(work.x0)) store(work.grad + work.x0, static_cast<float>(at_x0.slope));
  return {loss};
}

template <typename F, bool kGrad, typename T>
__device__ Results scores_row(const Work<T>& work) {
  const ScoresRow& scores = work.shared.constants.scores;
  if (scores.a == 0) return scores_pass<kGrad, F, F::template Zero>(work, -INFINITY, 0, 0);
  const auto neutral = static_cast<float>(work.shared.constants.shift + scores.log_a);
  return scores_pass<kGrad, F, F::template Near>(work, neutral, scores.a, scores.log_a);
}

// ---------------------------------------------------------------------------------------------------------
// Softmax: a sum of exponentials, relative to a running maximum, then the gradient.

// Over all ids that are not treated apart.
template <typename T>
__device__ Online sum_exp(const Work<T>& work) {
  Online all;
  work.row.each([&](auto& few) {
    work.set_apart(few, -INFINITY);
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

// log p of x0, and the log-sum-exp. Neither is 1 added to a small sum, nor the shift to log(sum): digits would be lost.
struct LogP {
  double logsumexp, x0, xt;

  __device__ LogP(const Online& others, double at_x0, double at_xt, bool elsewhere) {
    const double other = others.m, shift = fmax(fmax(other, at_xt), at_x0);
    double rest = others.s * std::exp(other - shift) + std::exp(at_xt - shift);
    if (shift == INFINITY) rest = NAN;  // inf - inf, as in PyTorch
    const double log_sum = at_x0 == shift ? std::log1p(rest) : std::log(rest + std::exp(at_x0 - shift));
    logsumexp = shift + log_sum;
    x0 = elsewhere ? -logsumexp : (at_x0 - shift) - log_sum;
    xt = (at_xt - shift) - log_sum;
  }
};

// Writes the gradients exp(x) (slope - pull x) of all ids, x = z - shift; the sum of exp(x) x over those that are not
// apart, and how many numbers stand before x0's.
template <bool kGrad, bool kStats, bool kEntropy, typename T>
__device__ Pair softmax_pass(const Work<T>& work, float at_x0, float shift, double slope, double pull) {
  const double excess = fmax(fmax(fabs(slope), fabs(pull)) * 1e-30, 1.0);  // what float has no room for
  const auto a = static_cast<float>(slope / excess), b = static_cast<float>(pull / excess);
  const auto size = static_cast<float>(excess);
  const Target<T> grad(work.grad, work.row.head);
  float dot = 0;
  int ahead = 0;
  work.row.each([&](auto& few) {
    if constexpr (kStats) work.set_apart(few, -INFINITY);
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
__device__ Results softmax_row(const Work<T>& work, double penalty) {
  const double offset = work.shared.constants.offset;
  const double at_x0 = number_at(work, work.x0) + (work.xt < 0 ? offset : 0);  // of x_t, if it is x0
  const double at_xt = number_at(work, work.xt) + offset;
  const bool elsewhere = work.x0 == -1;
  const Online others = sum_exp(work);
  const double weight = work.shared.constants.weight, entropy_weight = work.shared.constants.entropy_weight;

  Results results{};
  double grad_x0 = 0, grad_xt = 0;
  if (work.leads() || work.minds(work.x0) || work.minds(work.xt)) {
    const LogP log_p(others, at_x0, at_xt, elsewhere);
    const double drift = penalty == 0 ? 0 : log_p.logsumexp;  // which may be infinite
    results.logsumexp = log_p.logsumexp;
    results.nll = -log_p.x0;
    results.loss = weight * (penalty * drift * drift - log_p.x0);
    grad_x0 = weight * (std::expm1(log_p.x0) + 2 * penalty * drift * std::exp(log_p.x0));
    grad_xt = weight * (1 + 2 * penalty * drift) * std::exp(log_p.xt);
  }
  if (!kGrad && !kStats) return results;

  // The same in float, for the others.
  const float shift = fmaxf(fmaxf(others.m, static_cast<float>(at_xt)), static_cast<float>(at_x0));
  const auto x_x0 = static_cast<float>(at_x0 - shift), x_xt = static_cast<float>(at_xt - shift);
  const float e_x0 = exp_(x_x0), e_xt = exp_(x_xt);
  const float rest = others.s * exp_(others.m - shift) + e_xt, all = rest + e_x0;
  const float log_all = x_x0 >= 0 ? log1pf(rest) : logf(all);
  const bool is_nothing = elsewhere && all == 0;  // a part of the row without weight
  double slope = weight * (penalty == 0 ? 1 : 1 + 2 * penalty * (shift + log_all)), pull = entropy_weight;
  slope = is_nothing ? 0 : slope / all, pull = is_nothing ? 0 : pull / all;
  constexpr bool kAtOnce = kGrad && !kEntropy;
  const auto narrow = static_cast<float>(at_x0);
  Pair sums = softmax_pass<kAtOnce, kStats, false>(work, narrow, shift, slope, 0);
  if constexpr (kStats) {
    sums = reduce_cluster(sums, work.shared.pair, Add());
    const double mean = (sums.a + (e_x0 > 0 ? e_x0 * x_x0 : 0) + (e_xt > 0 ? e_xt * x_xt : 0)) / all;
    const bool ahead = at_xt > at_x0 || (at_xt == at_x0 && work.xt >= 0 && work.xt < work.x0);
    results.entropy = log_all - mean;
    results.correct = sums.b == 0 && !ahead && all == all;
    if constexpr (kEntropy) {
      const auto pull_of = [&](double p) { return p == 0 ? 0 : entropy_weight * p * (results.entropy + std::log(p)); };
      results.loss += entropy_weight * results.entropy;
      grad_x0 -= pull_of(std::exp(-results.nll)), grad_xt -= pull_of(e_xt / all);
      if constexpr (kGrad)
        softmax_pass<true, false, true>(work, narrow, shift, is_nothing ? 0 : slope + pull * mean, pull);
    }
  }
  if constexpr (kGrad) {
    __syncthreads();
    if (work.minds(work.x0)) store(work.grad + work.x0, static_cast<float>(grad_x0));
    if (work.minds(work.xt)) store(work.grad + work.xt, static_cast<float>(grad_xt));
    if (work.minds(work.left_out)) store(work.grad + work.left_out, 0.0f);
  }
  return results;
}

// ---------------------------------------------------------------------------------------------------------
// Affine: two sums in sequence, then the gradient.

// Not inlined, as its registers would be the kernel's.
__device__ __noinline__ void find(AffinePass& pass, const RowLoss& op, int64_t r, const Online& others, double at_x0,
                                  double at_xt, bool moved, bool apart) {
  const double other = others.m, shift = fmax(fmax(other, at_xt), at_x0);
  const double e_others = others.s * std::exp(other - shift), e_xt = std::exp(at_xt - shift);
  const double e_x0 = std::exp(at_x0 - shift), rest = e_others + e_xt, total = rest + e_x0;
  const double log_sum = at_x0 == shift ? std::log1p(rest) : std::log(total);
  pass.shift = static_cast<float>(shift), pass.inv_total = static_cast<float>(1 / total);
  Conditionals& c = pass.c;
  c.c_x0 = e_x0 / total, c.c_xt = moved ? e_xt / total : c.c_x0;
  c.rest_x0 = rest / total, c.rest_xt = moved ? (e_others + e_x0) / total : c.rest_x0;
  c.nll = log_sum - (at_x0 - shift), c.moved = moved, c.apart = apart;
  pass.row = {op.traits.functor, op.sigma[r], op.extra ? op.extra[r] : 0, op.penalty, op.z.num_states, c};
  pass.slope = static_cast<float>(pass.row.slope), pass.offset = static_cast<float>(pass.row.offset);
  pass.offset_w = static_cast<float>(pass.row.offset_w), pass.in_pairs = pass.row.fits_float();
}

// c, rho and w = rho - 1 of a few numbers.
template <int kMany>
struct AffineFew {
  Few<kMany> c, rho, w;
  bool in_pairs;  // which share a logarithm and a division

  __device__ AffineFew(const Few<kMany>& few, const AffinePass& pass)
      : c(few), rho(few), w(few), in_pairs(kMany > 1 && pass.in_pairs) {
    for (int i = 0; i < kMany; ++i) {
      c.x[i] = exp_(few.x[i] - pass.shift) * pass.inv_total;
      rho.x[i] = fmaf(pass.slope, c.x[i], pass.offset), w.x[i] = fmaf(pass.slope, c.x[i], pass.offset_w);
    }
  }

  // The sum of w - log(rho).
  __device__ float gaps() const {
    float sum = 0;
    if (in_pairs)
      for (int i = 0; i + 1 < kMany; i += 2) sum += log_gaps(w.x[i], rho.x[i], w.x[i + 1], rho.x[i + 1]);
    else
      for (int i = 0; i < kMany; ++i) sum += log_gap(w.x[i], rho.x[i]);
    return sum;
  }

  // 1 - 1/rho in the place of w.
  __device__ void pull() {
    if (in_pairs) {
      for (int i = 0; i + 1 < kMany; i += 2) {
        const float inverse = divide_(1, rho.x[i] * rho.x[i + 1]);
        w.x[i] *= rho.x[i + 1] * inverse, w.x[i + 1] *= rho.x[i] * inverse;
      }
    } else {
      for (int i = 0; i < kMany; ++i) w.x[i] = divide_(w.x[i], rho.x[i]);
    }
  }
};

template <bool kGrad, typename T>
__device__ Results affine_row(const Work<T>& work, const RowLoss& op, int64_t r, bool moved) {
  Shared& shared = work.shared;
  const double at_x0 = number_at(work, work.x0), at_xt = number_at(work, work.xt), weight = shared.constants.weight;
  const Online others = sum_exp(work);
  if (threadIdx.x == 0) find(shared.affine, op, r, others, at_x0, at_xt, moved, work.xt != -1);
  __syncthreads();
  const AffinePass& pass = shared.affine;
  float gaps = 0, pulls = 0;
  work.row.each([&](auto& few) {
    AffineFew terms(few, pass);
    work.set_apart(terms.c, 0);
    work.set_apart(terms.rho, 1);
    work.set_apart(terms.w, 0);
    gaps += terms.gaps();
    terms.pull();
    for (int i = 0; i < few.kSize; ++i) pulls += terms.c.x[i] * terms.w.x[i];
  });
  const Pair sums = reduce_cluster(Pair{gaps, pulls}, shared.pair, Add());
  if constexpr (kGrad) {
    const Target<T> grad(work.grad, work.row.head);
    const Conditionals& c = pass.c;
    const AffineRow& row = pass.row;
    const double mass = row.unit * sums.b, masses = mass + row.mass_x0 + row.mass_xt;
    // c (unit pull - masses), in parts of the larger factor, so that the others fit.
    const double size = fmax(fmax(fabs(row.unit), fabs(masses)), 1e-300);
    const auto a = static_cast<float>(row.unit / size), b = static_cast<float>(masses / size);
    const auto scale = static_cast<float>(weight * size);
    work.row.each([&](auto& few) {
      AffineFew terms(few, pass);
      terms.pull();
      for (int i = 0; i < few.kSize; ++i) few.x[i] = scale * (terms.c.x[i] * fmaf(a, terms.w.x[i], -b));
      grad.put(few);
    });
    __syncthreads();
    // An id's mass less its share of all, where the two nearly cancel if its c is near 1.
    const double x0_grad = row.mass_x0 * c.rest_x0 - c.c_x0 * (mass + row.mass_xt);
    const double xt_grad = row.mass_xt * c.rest_xt - c.c_xt * (mass + row.mass_x0);
    if (work.minds(work.x0)) store(work.grad + work.x0, static_cast<float>(weight * x0_grad));
    if (work.minds(work.xt)) store(work.grad + work.xt, static_cast<float>(weight * xt_grad));
    if (work.minds(work.left_out)) store(work.grad + work.left_out, 0.0f);
  }
  return {weight * (pass.row.a * sums.a + pass.row.value)};
}

// ---------------------------------------------------------------------------------------------------------
// The kernel.

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
  Shared& shared = *reinterpret_cast<Shared*>(memory);
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
