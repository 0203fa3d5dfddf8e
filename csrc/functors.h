// Which row losses there are, what of a row each treats apart, and functions of its noise.
#pragma once

#include <string>

#include "elementary.h"
#include "tensor.h"

namespace fastdiff {

enum class Functor {
  dce,
  loo,
  dse_absorb,
  dse_uniform,
  csm_absorb,
  csm_uniform,
  dse_uniform_logits,
  d3pm_uniform,
  mixture,
};

// What x_t may be: x0 or the mask, of which only masks are scored; any id; or any id, where the mask is one of its own.
enum class Noised { absorb, uniform, mixture };

// What a row's one more number is, and must be.
enum class Extra { none, sigma_s, share };

struct Traits {
  Functor functor;
  const char* name;
  Noised noised;
  bool scores;         // rows are log scores, where x_t has no part
  bool clean = false;  // sigma may be 0: everywhere, or of scores where x_t is x0
  Extra extra = Extra::none;
};

constexpr Traits kFunctors[] = {
    {Functor::dce, "dce", Noised::absorb, false},
    {Functor::loo, "loo", Noised::uniform, false},
    {Functor::dse_absorb, "dse_absorb", Noised::absorb, true},
    {Functor::dse_uniform, "dse_uniform", Noised::uniform, true, true},
    {Functor::csm_absorb, "csm_absorb", Noised::absorb, true},
    {Functor::csm_uniform, "csm_uniform", Noised::uniform, true, true},
    {Functor::dse_uniform_logits, "dse_uniform_logits", Noised::uniform, false},
    {Functor::d3pm_uniform, "d3pm_uniform", Noised::uniform, false, false, Extra::sigma_s},
    {Functor::mixture, "mixture", Noised::mixture, false, true, Extra::share},
};

inline const Traits& functor_named(const std::string& name) {
  std::string names;
  for (const Traits& traits : kFunctors) {
    if (name == traits.name) return traits;
    names += (names.empty() ? "" : ", ") + std::string(traits.name);
  }
  bad_value("functor: expected one of ", names, ", got ", name);
}

// The ids of a row that are treated apart; negative if they are not in it. left_out has no part in the loss; x_t is
// here where it has a part of its own, and is not x0.
struct Apart {
  int64_t x0, left_out, xt;

  FASTDIFF_HD explicit Apart(int64_t left_out_) : x0(-1), left_out(left_out_), xt(-1) {}
  // exclude: the mask has no part.
  FASTDIFF_HD Apart(const Traits& traits, int64_t x0_, int64_t xt_, int64_t mask_index, bool exclude)
      : x0(x0_), left_out(-1), xt(-1) {
    if (traits.noised != Noised::uniform && exclude) left_out = mask_index;
    if (traits.noised == Noised::uniform && traits.scores) left_out = xt_;
    if (traits.noised != Noised::absorb && !traits.scores && xt_ != x0 && xt_ != left_out) xt = xt_;
  }
};

// Functions of the total noise sigma, safe from 1e-6 to 700: e1 = expm1(sigma) is never formed.
struct Noise {
  double alpha, rest;  // exp(-sigma), and 1 less it
  double inv_e1, log_e1;

  FASTDIFF_HD explicit Noise(double sigma)
      : alpha(std::exp(-sigma)), rest(-std::expm1(-sigma)), inv_e1(alpha / rest), log_e1(sigma + std::log(rest)) {}
};

}  // namespace fastdiff
