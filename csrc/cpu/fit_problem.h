// A fold's least squares problem: the sums over the looks of all other chains, about their means.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "../philox.h"  // FASTDIFF_HD
#include "../tensor.h"

namespace fastdiff {

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
  double own_ridge = 0, noise = 0, doubt = 0;
  int64_t iterations = 0;
  double *level = nullptr, *slope = nullptr;  // [K, folds, L], [K, folds, L, kTerms]
  const double *grad_level = nullptr, *grad_slope = nullptr;
  double* grad_loss = nullptr;  // then it is this that is made

  FitControls(const Tensor& loss_, const Tensor& code_, const Tensor& weight_, int64_t folds_, const Tensor& table_,
              const Tensor& pair_, const Tensor& left_, const Tensor& near_, const Tensor& ridge_)
      : sequences(loss_.size(0)),
        chains(loss_.size(1)),
        looks(loss_.size(2)),
        length(loss_.size(3)),
        folds(folds_),
        loss(data<double>(loss_)),
        code(data<int64_t>(code_)),
        weight(data<double>(weight_)),
        table(data<double>(table_)),
        pair(data<int64_t>(pair_)),
        left(data<int64_t>(left_)),
        near(data<int64_t>(near_)),
        ridge(data<double>(ridge_)) {
    if (table_.size(1) != kTerms || near_.size(0) != kNear || ridge_.size(0) != kPairs ||
        table_.size(0) != 1 << 2 * kReach)
      bad_value("table: expected ", kTerms, " terms of ", kPairs, " kinds that reach ", kReach, " tokens, ", kNear,
                " of them near");
  }
};

// A fold's problem, on the looks of all other chains.
struct Problem {
  const FitControls& op;
  std::vector<Token> tokens, own;
  std::vector<double> mean_loss;
  std::vector<Terms> mean_seen;
  std::array<int64_t, kTerms> at;  // where a term's parameter is, from its token on
  int64_t sequence = 0, fold = 0;
  double number, common, observation, squares;

  explicit Problem(const FitControls& op_)
      : op(op_), tokens(op.length), own(op.length), mean_loss(op.length), mean_seen(op.length) {
    for (int64_t t = 0; t < kTerms; ++t) at[t] = (kReach + op.left[t]) * kPairs + op.pair[t];
  }

  FASTDIFF_HD double own_ridge() const { return op.own_ridge * observation; }

  FASTDIFF_HD double trust(int64_t others) const { return others / (others + op.doubt); }

  // The share of slopes to take: all but what `used` parameters would explain of noise.
  FASTDIFF_HD double share(double explained, double left, double used) const {
    const double of_noise = std::max(left, 0.0) / std::max(number - used, 1.0);
    return std::clamp(1 - op.noise * used * of_noise / std::max(explained, 1e-30), 0.0, 1.0);
  }
};

// Of the fold itself.
FASTDIFF_HD void sum_looks(Problem& p) {
  const FitControls& op = p.op;
  std::fill(p.own.begin(), p.own.end(), Token{});
  for (int64_t chain = p.fold; chain < op.chains; chain += op.folds)
    for (int64_t look = 0; look < op.looks; ++look) {
      const int64_t first = ((p.sequence * op.chains + chain) * op.looks + look) * op.length;
      for (int64_t i = 0; i < op.length; ++i) {
        const double w = op.weight[first + i], loss = op.loss[first + i];
        if (!(w > 0)) continue;
        const double* seen = op.table + op.code[first + i] * kTerms;
        Token& token = p.own[i];
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

}  // namespace fastdiff
