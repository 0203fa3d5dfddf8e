// The sum of a row's exponentials, which are kept, relative to shifts that may change from run to run.
#pragma once

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "row.h"

namespace fastdiff {

struct ExpSum {
  double shift, sum;  // of exp(z - shift)

  FASTDIFF_HD void add(double other_shift, double other_sum) {
    const double top = other_shift > shift ? other_shift : shift;
    // != rather than <, so that a NaN among the shifts reaches the sum
    if (shift != top) sum *= std::exp(shift - top);
    if (other_shift != top) other_sum *= std::exp(other_shift - top);
    shift = top;
    sum += other_sum;
  }
};

// The log of a sum over exp(all.shift), and -log of x0's share in it. Neither is 1 added to a small sum, nor the shift
// to the log: digits would be lost.
struct LogSum {
  double value, nll;

  FASTDIFF_HD LogSum(const ExpSum& others, const ExpSum& all, double at_x0) {
    const double ratio = others.sum * std::exp(others.shift - at_x0), ahead = at_x0 - all.shift;
    value = ratio < 1 ? ahead + std::log1p(ratio) : std::log(all.sum);
    nll = ratio < 1 ? std::log1p(ratio) : value - ahead;
  }
};

// exp(z - shift)
template <typename C>
struct Relative {
  C shift;

  FASTDIFF_HD Term<C> operator()(C z) const {
    const C e = exp_(z - shift);
    return {e, e};
  }
};

// What an exponential of a run with this shift is of the whole sum. Few shifts differ.
struct Shares {
  ExpSum all;
  double shift = NAN, share = 0;

  FASTDIFF_HD double of(double its_shift) {
    if (its_shift != shift) shift = its_shift, share = std::exp(shift - all.shift) / all.sum;
    return share;
  }
};

// Room for a row between the passes: the exponentials, unless the gradient can hold them (which it cannot in the row's
// own place), what else goes with them, and each run's shift.
template <typename T>
struct Scratch {
  std::vector<Acc<T>> exponentials, pulls, shifts;

  explicit Scratch(int64_t num_states) : shifts(num_states / kBlock + 4) {}

  FASTDIFF_HD Acc<T>* kept(const Row<T>& row) {
    if constexpr (std::is_same_v<Acc<T>, T>) {
      if (row.grad && row.grad != row.z) return row.grad;
    }
    exponentials.resize(row.num_states);
    return exponentials.data();
  }
};

// Adds a run to the sum and gives the shift it took: what others took, unless that lets the exponentials grow too
// large.
template <bool kKeep, typename T>
FASTDIFF_HD Acc<T> add_run(ExpSum& all, const T* z, Acc<T>* kept, int64_t n, Acc<T>& max) {
  using C = Acc<T>;
  C shift = std::max(static_cast<C>(all.shift), std::numeric_limits<C>::lowest());  // never -inf
  Block<C> block = sum_terms<kKeep>(Relative<C>{shift}, z, kept, n);
  if (block.max > shift + 60) block = sum_terms<kKeep>(Relative<C>{shift = block.max}, z, kept, n);
  all.add(shift, block.sum);
  max = block.max;
  return shift;
}

}  // namespace fastdiff
