// All that the kernels know of each row loss, for host and device. Twin of fastdiff/reference/.
//
// A row is V numbers z. A few ids are treated apart, in double (Apart). All others share one formula, of a family:
//   softmax  loss = -log p_x0,  p = softmax(z), an offset added to z at x_t before
//            and with a weight of its own -sum_y p_y log p_y
//   scores   loss = scale sum_y term(s_y),  s = z - shift, at the ratio a_y = p(y | x0) / p(x_t | x0):
//            score entropy a phi(s - log a), phi(d) = expm1(d) - d, or concrete score matching (exp(s) - a)^2 / 2
//   affine   loss = a sum_y gap(rho_y) + what x0 and x_t add,  rho_y = slope c_y + offset,  c = softmax(z),
//            gap(rho) = rho - 1 - log(rho)
// A functor is an entry of kFunctors (functors.h), and a branch of its family's constants: SoftmaxRow, ScoresRow
// (scores.h) or AffineRow (affine.h).
#pragma once

#include "affine.h"
#include "scores.h"

namespace fastdiff {

struct SoftmaxRow {
  double weight = 1, offset = 0;

  // sigma is null if none is given.
  FASTDIFF_HD SoftmaxRow(Functor functor, const double* sigma, int64_t num_states) {
    if (!sigma) return;
    const double inv_e1 = Noise(*sigma).inv_e1;
    if (functor == Functor::dce) weight = inv_e1;  // turns conditionals into scores: DSE of log c - log e1 is DCE / e1
    if (functor == Functor::loo) offset = std::log1p(static_cast<double>(num_states) * inv_e1);
  }
};

struct Softmax {
  static constexpr int kPasses = 2;
};
struct Affine {
  static constexpr int kPasses = 3;
};

// Calls f with a functor's family.
template <typename F>
auto with_family(Functor functor, const F& f) {
  switch (functor) {
    case Functor::dce:
    case Functor::loo:
      return f(Softmax());
    case Functor::dse_absorb:
    case Functor::dse_uniform:
      return f(ScoreEntropy());
    case Functor::csm_absorb:
    case Functor::csm_uniform:
      return f(ScoreMatching());
    default:
      return f(Affine());
  }
}

}  // namespace fastdiff
