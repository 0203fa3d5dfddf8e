// The fit of estimators/potential.py, which has the formulas and says why, and its gradient. What is many passes over
// tensors there stays in cache here, a sequence and a fold at a time.
#include <algorithm>
#include <array>
#include <tuple>
#include <vector>

#include "fit_problem.h"
#include "isa.h"
#include "operators.h"

namespace fastdiff {
namespace {

template <int64_t N>
using Square = std::array<std::array<double, N>, N>;

// Of a symmetric and positive matrix, in place.
template <int64_t N>
FASTDIFF_HD void invert(Square<N>& a) {
  for (int64_t k = 0; k < N; ++k) {
    const double pivot = 1 / a[k][k];
    a[k][k] = 1;
    for (double& x : a[k]) x *= pivot;
    for (int64_t i = 0; i < N; ++i) {
      if (i == k) continue;
      const double factor = a[i][k];
      a[i][k] = 0;
      for (int64_t j = 0; j < N; ++j) a[i][j] -= factor * a[k][j];
    }
  }
}

// By which the sums over pairs of a kind, of products with losses, give the parameters that these share.
FASTDIFF_HD Square<kPairs> inverse_of_kinds(const Problem& p) {
  Square<kPairs> same{};
  for (const Token& token : p.tokens)
    for (int64_t a = 0; a < kTerms; ++a)
      for (int64_t b = 0; b < kTerms; ++b) same[p.op.pair[a]][p.op.pair[b]] += token.products[a][b];
  for (int64_t kind = 0; kind < kPairs; ++kind) same[kind][kind] += p.observation;
  invert<kPairs>(same);
  return same;
}

// The same for what a token adds on its own, with its ridge.
FASTDIFF_HD Square<kNear> inverse_of_near(const Problem& p, int64_t token) {
  Square<kNear> near;
  for (int64_t a = 0; a < kNear; ++a) {
    for (int64_t b = 0; b < kNear; ++b) near[a][b] = p.tokens[token].products[p.op.near[a]][p.op.near[b]];
    near[a][a] += p.own_ridge();
  }
  invert<kNear>(near);
  return near;
}

template <int64_t N>
FASTDIFF_HD std::array<double, N> times(const Square<N>& a, const std::array<double, N>& x) {
  std::array<double, N> made;
  for (int64_t i = 0; i < N; ++i) made[i] = dot(a[i].data(), x.data(), N);
  return made;
}

// x with (products + ridge) x = b, nearly, by conjugate gradients.
FASTDIFF_HD Pairs solve(const Problem& p, const Pairs& b, const Pairs& diagonal, const Pairs& ridge) {
  const size_t n = b.size();
  Pairs x(n), residual = b, direction(n), scaled(n), made(n);
  double before = 1;
  for (int64_t step = 0; step < p.op.iterations; ++step) {
    for (size_t i = 0; i < n; ++i) scaled[i] = residual[i] / (diagonal[i] + ridge[i]);
    const double size = dot(residual, scaled), kept = size / before;
    for (size_t i = 0; i < n; ++i) direction[i] = scaled[i] + kept * direction[i];
    ahead(p, direction, made);
    for (size_t i = 0; i < n; ++i) made[i] += ridge[i] * direction[i];
    const double far = size / std::max(dot(direction, made), 1e-30);
    for (size_t i = 0; i < n; ++i) x[i] += far * direction[i], residual[i] -= far * made[i];
    before = std::max(size, 1e-30);
  }
  return x;
}

// The parameters of all pairs, by kind and what each adds; of the squares what they leave.
FASTDIFF_HD Pairs fit_pairs(Problem& p) {
  const size_t n = (kReach + p.tokens.size()) * kPairs;
  Pairs told(n), diagonal(n), ridge(n), first(n), made(n);
  for (size_t i = 0; i < p.tokens.size(); ++i) {
    Terms of_itself;
    for (int64_t t = 0; t < kTerms; ++t) of_itself[t] = p.tokens[i].products[t][t];
    add_to_pairs(p, p.tokens[i].with_loss, i, told);
    add_to_pairs(p, of_itself, i, diagonal);
  }
  std::array<double, kPairs> sums{};
  for (size_t i = 0; i < n; ++i) sums[i % kPairs] += told[i];
  const auto alike = times<kPairs>(inverse_of_kinds(p), sums);
  for (size_t i = 0; i < n; ++i) ridge[i] = p.observation * p.op.ridge[i % kPairs], first[i] = alike[i % kPairs];

  Pairs left = told;
  ahead(p, first, made);
  for (size_t i = 0; i < n; ++i) left[i] -= made[i];
  p.squares -= dot(first, told) + dot(first, left);
  const Pairs more = solve(p, left, diagonal, ridge);
  ahead(p, more, made);
  const double explained = dot(more, left), twice = dot(more, made);
  double used = 0;
  for (size_t i = 0; i < n; ++i) used += diagonal[i] / (diagonal[i] + ridge[i]);
  const double share = p.share(explained, p.squares - 2 * explained + twice, used);
  p.squares += share * (share * twice - 2 * explained);
  for (size_t i = 0; i < n; ++i) first[i] += share * more[i];
  return first;
}

// What tokens add on their own to the slopes that pairs give.
FASTDIFF_HD void add_own(const Problem& p, std::vector<Terms>& slopes) {
  std::vector<std::array<double, kNear>> own(slopes.size());
  const double ridge = p.own_ridge();
  double used = 0, explained = 0, least = p.squares;
  for (size_t i = 0; i < slopes.size(); ++i) {
    const Token& token = p.tokens[i];
    std::array<double, kNear> left;
    for (int64_t a = 0; a < kNear; ++a)
      left[a] = token.with_loss[p.op.near[a]] - dot(token.products[p.op.near[a]].data(), slopes[i].data(), kTerms);
    const auto inverse = inverse_of_near(p, i);
    own[i] = times<kNear>(inverse, left);
    for (int64_t a = 0; a < kNear; ++a) {
      used += 1 - ridge * inverse[a][a];
      explained += own[i][a] * left[a];
      least -= own[i][a] * (left[a] + ridge * own[i][a]);  // the products times own are left - ridge own
    }
  }
  const double share = p.share(explained, least, used);
  for (size_t i = 0; i < slopes.size(); ++i)
    for (int64_t a = 0; a < kNear; ++a) slopes[i][p.op.near[a]] += share * own[i][a];
}

FASTDIFF_HD void fit(Problem& p, int64_t chains, double* level, double* slope) {
  centre(p);
  const double squares = p.squares;
  const Pairs pairs = fit_pairs(p);
  std::vector<Terms> slopes(p.tokens.size());
  for (size_t i = 0; i < slopes.size(); ++i) slopes[i] = to_terms(p, pairs, i);
  add_own(p, slopes);
  double explained = 0;
  int64_t seen = 0;
  for (size_t i = 0; i < slopes.size(); ++i) {
    explained += p.tokens[i].weight * p.mean_loss[i] * p.mean_loss[i];
    seen += p.tokens[i].number > 0;
  }
  const double share = p.share(explained, p.number < (chains + kTerms) * seen ? squares : p.squares, seen);
  for (size_t i = 0; i < slopes.size(); ++i) {
    for (int64_t a = 0; a < kTerms; ++a) slopes[i][a] *= p.trust(chains);
    level[i] = p.common + share * (p.mean_loss[i] - dot(slopes[i].data(), p.mean_seen[i].data(), kTerms));
    for (int64_t a = 0; a < kTerms; ++a) slope[i * kTerms + a] = share * slopes[i][a];
  }
}

// From the gradients of sums over the looks of other folds to those of losses.
FASTDIFF_HD void spread(const Problem& p, const std::vector<double>& loss, const std::vector<Terms>& with_loss) {
  const FitControls& op = p.op;
  for (int64_t chain = 0; chain < op.chains; ++chain) {
    if (chain % op.folds == p.fold) continue;
    for (int64_t look = 0; look < op.looks; ++look) {
      const int64_t first = ((p.sequence * op.chains + chain) * op.looks + look) * op.length;
      for (int64_t i = 0; i < op.length; ++i)
        op.grad_loss[first + i] +=
            op.weight[first + i] * (loss[i] + dot(op.table + op.code[first + i] * kTerms, with_loss[i].data(), kTerms));
    }
  }
}

// Adds to the gradient of other folds' losses, in which levels and slopes are linear but for what has none.
FASTDIFF_HD void pull_back(Problem& p, int64_t chains, const double* grad_level, const double* grad_slope) {
  centre(p);
  const size_t length = p.tokens.size();
  std::vector<Terms> with_loss(length);  // gradients
  std::vector<double> loss(length);
  std::array<double, kPairs> kinds{};
  double weight = 0, of_common = 0;
  for (size_t i = 0; i < length; ++i) {
    const Token& token = p.tokens[i];
    Terms slope;
    std::array<double, kNear> near;
    for (int64_t a = 0; a < kTerms; ++a)
      slope[a] = p.trust(chains) * (grad_slope[i * kTerms + a] - grad_level[i] * p.mean_seen[i][a]);
    for (int64_t a = 0; a < kNear; ++a) near[a] = slope[p.op.near[a]];
    near = times<kNear>(inverse_of_near(p, i), near);
    with_loss[i].fill(0);
    for (int64_t a = 0; a < kNear; ++a) {
      with_loss[i][p.op.near[a]] = near[a];
      for (int64_t b = 0; b < kTerms; ++b) slope[b] -= near[a] * token.products[p.op.near[a]][b];
    }
    for (int64_t a = 0; a < kTerms; ++a) kinds[p.op.pair[a]] += slope[a];
    weight += token.weight, of_common += token.weight > 0 ? 0 : grad_level[i];
  }
  kinds = times<kPairs>(inverse_of_kinds(p), kinds);
  for (size_t i = 0; i < length; ++i) {
    for (int64_t a = 0; a < kTerms; ++a) with_loss[i][a] += kinds[p.op.pair[a]];
    const double own = p.tokens[i].weight > 0 ? grad_level[i] : 0;
    loss[i] = of_common / std::max(weight, 1e-30) +
              (own - dot(p.tokens[i].terms.data(), with_loss[i].data(), kTerms)) / std::max(p.tokens[i].weight, 1e-30);
  }
  spread(p, loss, with_loss);
}

FASTDIFF_HD void fit_sequences(const FitControls& op, int64_t begin, int64_t end) {
  Problem p(op);
  std::vector<Token> whole(op.length);
  for (p.sequence = begin; p.sequence < end; ++p.sequence) {
    std::fill(whole.begin(), whole.end(), Token{});
    for (p.fold = 0; p.fold < op.folds; ++p.fold) {
      sum_looks(p);
      for (int64_t i = 0; i < op.length; ++i)
        whole[i].combine(p.own[i], [](double a, double b) __attribute__((always_inline)) { return a + b; });
    }
    for (p.fold = 0; p.fold < op.folds; ++p.fold) {
      sum_looks(p);
      p.tokens = whole;
      for (int64_t i = 0; i < op.length; ++i)
        p.tokens[i].combine(p.own[i], [](double a, double b) __attribute__((always_inline)) { return a - b; });
      const int64_t others = op.chains - (op.chains - p.fold + op.folds - 1) / op.folds;
      const int64_t at = (p.sequence * op.folds + p.fold) * op.length;
      if (op.grad_loss)
        pull_back(p, others, op.grad_level + at, op.grad_slope + at * kTerms);
      else
        fit(p, others, op.level + at, op.slope + at * kTerms);
    }
  }
}

#define FASTDIFF_FIT(SUFFIX, TARGET)                             \
  template <typename Op>                                         \
  TARGET void fit_##SUFFIX(const Op& op, int64_t b, int64_t e) { \
    fit_sequences(op, b, e);                                     \
  }
FASTDIFF_FOR_EACH_ISA(FASTDIFF_FIT)

void run(const FitControls& op) {
  const auto fit = FASTDIFF_FOR_ISA(fit, current_isa(), <FitControls>);
  torch::stable::parallel_for(0, op.sequences, 1, [&](int64_t b, int64_t e) { fit(op, b, e); });
}

}  // namespace

std::tuple<Tensor, Tensor> fit_controls(Tensor loss, Tensor code, Tensor weight, int64_t folds, Tensor table,
                                        Tensor pair, Tensor left, Tensor near, Tensor ridge, double own_ridge,
                                        double noise, double doubt, int64_t iterations) {
  FitControls op(loss, code, weight, folds, table, pair, left, near, ridge);
  op.own_ridge = own_ridge, op.noise = noise, op.doubt = doubt, op.iterations = iterations;
  Tensor level = torch::stable::new_empty(loss, {op.sequences, folds, op.length});
  Tensor slope = torch::stable::new_empty(loss, {op.sequences, folds, op.length, kTerms});
  op.level = mutable_data<double>(level), op.slope = mutable_data<double>(slope);
  run(op);
  return {level, slope};
}

Tensor fit_controls_backward(Tensor grad_level, Tensor grad_slope, Tensor loss, Tensor code, Tensor weight,
                             int64_t folds, Tensor table, Tensor pair, Tensor left, Tensor near, Tensor ridge,
                             double own_ridge, double doubt) {
  FitControls op(loss, code, weight, folds, table, pair, left, near, ridge);
  op.own_ridge = own_ridge, op.doubt = doubt;
  op.grad_level = data<double>(grad_level), op.grad_slope = data<double>(grad_slope);
  Tensor grad_loss = torch::stable::new_empty(loss, sizes(loss));
  op.grad_loss = mutable_data<double>(grad_loss);
  std::fill_n(op.grad_loss, loss.numel(), 0.0);
  run(op);
  return grad_loss;
}

}  // namespace fastdiff
