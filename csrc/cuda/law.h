// What the law of a reverse step makes of a row.
#pragma once

#include "../row_sample.h"
#include "online.h"

namespace fastdiff {

// In units of exp(shift). An id other than x_t weighs (exp(z) - cut)+.
struct LawTerms {
  float shift;
  double top;     // exp(m), with m of the sum over the other ids
  double others;  // that sum
  double stay;    // what x_t weighs
  double total, cut;
};

// From z at x_t, for which log_here may stand, and the sum over the other ids. NaN if x_t is no id, or the row has NaN.
inline __device__ LawTerms law_terms(const ReverseLaw& law, bool exists, double at_xt, const Online& others) {
  const double log_here = law.log_here == law.log_here ? law.log_here : at_xt;
  const double here = exists ? log_here : NAN, m = others.m;
  LawTerms terms;
  terms.shift = static_cast<float>(here > m ? here : m);
  terms.top = std::exp(m - terms.shift);
  terms.others = others.s * terms.top;
  const double e_here = std::exp(here - terms.shift);
  terms.total = terms.others + e_here;
  terms.cut = law.theta * terms.total;
  const double stay = law.kappa * e_here - law.lam * terms.total;
  terms.stay = stay < 0 ? 0 : stay;
  return terms;
}

}  // namespace fastdiff
