// The fit of estimators/potential.py, without gradients: that file has the formulas and says why. What is many passes
// over tensors there stays in cache here, a sequence and a fold at a time.
#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <vector>

#include "../philox.h"  // FASTDIFF_HD
#include "isa.h"
#include "operators.h"

namespace fastdiff {
namespace {

constexpr int64_t kTerms = 18, kPairs = 6, kNear = 7, kReach = 4;

using Terms = std::array<double, kTerms>;
using Pairs = std::vector<double>;  // [kReach + L, kPairs], of pairs by their left ends: those beyond the row are 0

// The sums of `Moments` and `products` of a token; once centred, the last two are about the means.
struct Token {
  double number, weight, loss, square;
  Terms terms, with_loss;
  std::array<Terms, kTerms> products;

  template <typename F>
  FASTDIFF_HD void combine(const Token& other, const F& f) {
    number = f(number, other.number), weight = f(weight, other.weight);
    loss = f(loss, other.loss), square = f(square, other.square);
    for (int64_t a = 0; a < kTerms; ++a) {
      terms[a] = f(terms[a], other.terms[a]), with_loss[a] = f(with_loss[a], other.with_loss[a]);
      for (int64_t b = 0; b < kTerms; ++b) products[a][b] = f(products[a][b], other.products[a][b]);
    }
  }
};

// One call: losses, codes and weights [K, R, Q, L], what there is to fit, and where it goes.
struct FitControls {
  int64_t sequences, chains, looks, length, folds;
  const double* loss;
  const int64_t* code;
  const double *weight, *table;  // table: the terms of a code
  const int64_t *pair, *left, *near;
  const double* ridge;
  double own_ridge, noise, doubt;
  int64_t iterations;
  double *level = nullptr, *slope = nullptr;  // [K, folds, L], [K, folds, L, kTerms]
};

// A fold's problem, on the looks of all other chains.
struct Problem {
  const FitControls& op;
  std::vector<Token> tokens, own;
  std::vector<double> mean_loss;
  std::vector<Terms> mean_seen;
  std::array<int64_t, kTerms> at;  // where a term's parameter is, from its token on
  double number, common, observation, squares;

  explicit Problem(const FitControls& op_)
      : op(op_), tokens(op.length), own(op.length), mean_loss(op.length), mean_seen(op.length) {
    for (int64_t t = 0; t < kTerms; ++t) at[t] = (kReach + op.left[t]) * kPairs + op.pair[t];
  }

  // The share of slopes to take: all but what `used` parameters would explain of noise.
  FASTDIFF_HD double share(double explained, double left, double used) const {
    const double of_noise = std::max(left, 0.0) / std::max(number - used, 1.0);
    return std::clamp(1 - op.noise * used * of_noise / std::max(explained, 1e-30), 0.0, 1.0);
  }
};

FASTDIFF_HD void sum_looks(const FitControls& op, int64_t sequence, int64_t fold, std::vector<Token>& tokens) {
  std::fill(tokens.begin(), tokens.end(), Token{});
  for (int64_t chain = fold; chain < op.chains; chain += op.folds)
    for (int64_t look = 0; look < op.looks; ++look) {
      const int64_t first = ((sequence * op.chains + chain) * op.looks + look) * op.length;
      for (int64_t i = 0; i < op.length; ++i) {
        const double w = op.weight[first + i], loss = op.loss[first + i];
        if (!(w > 0)) continue;
        const double* seen = op.table + op.code[first + i] * kTerms;
        Token& token = tokens[i];
        token.number += 1, token.weight += w, token.loss += w * loss, token.square += w * loss * loss;
        for (int64_t a = 0; a < kTerms; ++a) {
          if (seen[a] == 0) continue;
          token.terms[a] += w * seen[a], token.with_loss[a] += seen[a] * (w * loss);
          for (int64_t b = 0; b < kTerms; ++b) token.products[a][b] += w * seen[a] * seen[b];
        }
      }
    }
}

FASTDIFF_HD void centre(Problem& p) {
  double weight = 0, loss = 0;
  p.number = p.squares = 0;
  for (const Token& token : p.tokens) p.number += token.number, weight += token.weight, loss += token.loss;
  p.common = loss / std::max(weight, 1e-30);
  p.observation = p.number > 0 ? weight / p.number : 1;
  for (size_t i = 0; i < p.tokens.size(); ++i) {
    Token& token = p.tokens[i];
    const double per_weight = 1 / std::max(token.weight, 1e-30);
    p.mean_loss[i] = token.weight > 0 ? token.loss * per_weight - p.common : 0;
    p.squares += token.square - token.loss * (p.mean_loss[i] + p.common);
    for (int64_t a = 0; a < kTerms; ++a) p.mean_seen[i][a] = token.terms[a] * per_weight;
    for (int64_t a = 0; a < kTerms; ++a) {
      token.with_loss[a] -= token.terms[a] * (p.mean_loss[i] + p.common);
      for (int64_t b = 0; b < kTerms; ++b) token.products[a][b] -= token.terms[a] * p.mean_seen[i][b];
    }
  }
}

FASTDIFF_HD double dot(const double* a, const double* b, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += a[i] * b[i];
  return sum;
}
FASTDIFF_HD double dot(const Pairs& a, const Pairs& b) { return dot(a.data(), b.data(), a.size()); }

FASTDIFF_HD Terms to_terms(const Problem& p, const Pairs& pairs, int64_t token) {
  Terms terms;
  for (int64_t t = 0; t < kTerms; ++t) terms[t] = pairs[token * kPairs + p.at[t]];
  return terms;
}

FASTDIFF_HD void add_to_pairs(const Problem& p, const Terms& terms, int64_t token, Pairs& pairs) {
  for (int64_t t = 0; t < kTerms; ++t) pairs[token * kPairs + p.at[t]] += terms[t];
}

// What the products of all tokens make of pairs' parameters.
FASTDIFF_HD void ahead(const Problem& p, const Pairs& pairs, Pairs& to) {
  std::fill(to.begin(), to.end(), 0);
  for (size_t i = 0; i < p.tokens.size(); ++i) {
    const Terms terms = to_terms(p, pairs, i);
    Terms made{};
    for (int64_t a = 0; a < kTerms; ++a)  // symmetric
#pragma omp simd
      for (int64_t b = 0; b < kTerms; ++b) made[b] += terms[a] * p.tokens[i].products[a][b];
    add_to_pairs(p, made, i, to);
  }
}

// Of a symmetric and positive matrix, in place.
template <int64_t N>
FASTDIFF_HD void invert(std::array<std::array<double, N>, N>& a) {
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

// The parameters that pairs of a kind share.
FASTDIFF_HD std::array<double, kPairs> fit_alike(const Problem& p, const Pairs& told) {
  std::array<std::array<double, kPairs>, kPairs> same{};
  std::array<double, kPairs> sums{}, alike{};
  for (const Token& token : p.tokens)
    for (int64_t a = 0; a < kTerms; ++a)
      for (int64_t b = 0; b < kTerms; ++b) same[p.op.pair[a]][p.op.pair[b]] += token.products[a][b];
  for (int64_t kind = 0; kind < kPairs; ++kind) same[kind][kind] += p.observation;
  for (size_t i = 0; i < told.size(); ++i) sums[i % kPairs] += told[i];
  invert<kPairs>(same);
  for (int64_t a = 0; a < kPairs; ++a) alike[a] = dot(same[a].data(), sums.data(), kPairs);
  return alike;
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
  const auto alike = fit_alike(p, told);
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
  const double ridge = p.op.own_ridge * p.observation;
  double used = 0, explained = 0, least = p.squares;
  for (size_t i = 0; i < slopes.size(); ++i) {
    std::array<std::array<double, kNear>, kNear> products, inverse;
    std::array<double, kNear> left;
    for (int64_t a = 0; a < kNear; ++a) {
      const Terms& row = p.tokens[i].products[p.op.near[a]];
      for (int64_t b = 0; b < kNear; ++b) products[a][b] = row[p.op.near[b]];
      left[a] = p.tokens[i].with_loss[p.op.near[a]] - dot(row.data(), slopes[i].data(), kTerms);
    }
    inverse = products;
    for (int64_t a = 0; a < kNear; ++a) inverse[a][a] += ridge;
    invert<kNear>(inverse);
    for (int64_t a = 0; a < kNear; ++a) {
      own[i][a] = dot(inverse[a].data(), left.data(), kNear);
      used += 1 - ridge * inverse[a][a];
    }
    for (int64_t a = 0; a < kNear; ++a) {
      explained += own[i][a] * left[a];
      least -= own[i][a] * (2 * left[a] - dot(products[a].data(), own[i].data(), kNear));
    }
  }
  const double share = p.share(explained, least, used);
  for (size_t i = 0; i < slopes.size(); ++i)
    for (int64_t a = 0; a < kNear; ++a) slopes[i][p.op.near[a]] += share * own[i][a];
}

FASTDIFF_HD void fit(Problem& p, int64_t chains, double* level, double* slope) {
  centre(p);
  const double squares = p.squares, trusted = chains / (chains + p.op.doubt);
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
    for (int64_t a = 0; a < kTerms; ++a) slopes[i][a] *= trusted;
    level[i] = p.common + share * (p.mean_loss[i] - dot(slopes[i].data(), p.mean_seen[i].data(), kTerms));
    for (int64_t a = 0; a < kTerms; ++a) slope[i * kTerms + a] = share * slopes[i][a];
  }
}

FASTDIFF_HD void fit_sequences(const FitControls& op, int64_t begin, int64_t end) {
  Problem p(op);
  std::vector<Token> whole(op.length);
  for (int64_t k = begin; k < end; ++k) {
    std::fill(whole.begin(), whole.end(), Token{});
    for (int64_t fold = 0; fold < op.folds; ++fold) {
      sum_looks(op, k, fold, p.own);
      for (int64_t i = 0; i < op.length; ++i)
        whole[i].combine(p.own[i], [](double a, double b) __attribute__((always_inline)) { return a + b; });
    }
    for (int64_t fold = 0; fold < op.folds; ++fold) {
      sum_looks(op, k, fold, p.own);
      p.tokens = whole;
      for (int64_t i = 0; i < op.length; ++i)
        p.tokens[i].combine(p.own[i], [](double a, double b) __attribute__((always_inline)) { return a - b; });
      const int64_t others = op.chains - (op.chains - fold + op.folds - 1) / op.folds,
                    at = (k * op.folds + fold) * op.length;
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

}  // namespace

std::tuple<Tensor, Tensor> fit_controls(Tensor loss, Tensor code, Tensor weight, int64_t folds, Tensor table,
                                        Tensor pair, Tensor left, Tensor near, Tensor ridge, double own_ridge,
                                        double noise, double doubt, int64_t iterations) {
  if (table.size(1) != kTerms || near.size(0) != kNear || ridge.size(0) != kPairs || table.size(0) != 1 << 2 * kReach)
    bad_value("table: expected ", kTerms, " terms of ", kPairs, " kinds that reach ", kReach, " tokens, ", kNear,
              " of them near");
  const int64_t sequences = loss.size(0), length = loss.size(3);
  Tensor level = torch::stable::new_empty(loss, {sequences, folds, length});
  Tensor slope = torch::stable::new_empty(loss, {sequences, folds, length, kTerms});
  FitControls op{sequences, loss.size(1), loss.size(2), length, folds};
  op.loss = data<double>(loss), op.code = data<int64_t>(code), op.weight = data<double>(weight);
  op.table = data<double>(table), op.ridge = data<double>(ridge);
  op.pair = data<int64_t>(pair), op.left = data<int64_t>(left), op.near = data<int64_t>(near);
  op.own_ridge = own_ridge, op.noise = noise, op.doubt = doubt, op.iterations = iterations;
  op.level = mutable_data<double>(level), op.slope = mutable_data<double>(slope);
  const auto fit = FASTDIFF_FOR_ISA(fit, current_isa(), <FitControls>);
  torch::stable::parallel_for(0, sequences, 1, [&](int64_t b, int64_t e) { fit(op, b, e); });
  return {level, slope};
}

}  // namespace fastdiff
