// What top_k and top_p keep of a row: the numbers from a threshold on.
#pragma once

#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "row_sample_bodies.h"

namespace fastdiff {

// For top_k.
template <typename C>
struct One {
  FASTDIFF_HD C operator()(C) const { return 1; }
};

// Numbers as integers in the same order, and back.
template <typename C>
struct Keys {
  using Key = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
  static constexpr Key kMost = std::numeric_limits<Key>::max();
  static FASTDIFF_HD Key ordered(Key bits) { return bits ^ (bits < 0 ? kMost : 0); }
  static FASTDIFF_HD Key key(C x) { return ordered(bit_cast<Key>(x)); }
  static FASTDIFF_HD C number(Key key) { return bit_cast<C>(ordered(key)); }
};

// Some numbers of a row, and what they weigh.
template <typename C>
struct Some {
  std::vector<C> x, w;
  int64_t n;

  explicit Some(int64_t most) : x(most), w(most), n(most) {}

  template <typename F>
  FASTDIFF_HD void weigh(const F& weight) {
    const C* xs = x.data();
    C* ws = w.data();
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) ws[i] = weight(xs[i]);
  }

  // What those from a number on weigh.
  FASTDIFF_HD double from(C least) const {
    double sum = 0;
    for (int64_t first = 0; first < n; first += kBlock) {
      const C *xs = x.data() + first, *ws = w.data() + first;
      const int64_t m = std::min(kBlock, n - first);
      C part = 0;
#pragma omp simd reduction(+ : part)
      for (int64_t j = 0; j < m; ++j) {
        const C w = ws[j];
        part += xs[j] >= least ? w : C(0);
      }
      sum += part;
    }
    return sum;
  }

  // The largest number below `high` that passes a test, as `low` does and all between.
  template <typename F>
  FASTDIFF_HD C last(C low, C high, const F& passes) const {
    auto below = Keys<C>::key(low), above = Keys<C>::key(high);
    using Unsigned = std::make_unsigned_t<decltype(below)>;
    for (Unsigned apart; (apart = static_cast<Unsigned>(above) - static_cast<Unsigned>(below)) > 1;) {
      const auto middle = static_cast<decltype(below)>(static_cast<Unsigned>(below) + apart / 2);
      (passes(Keys<C>::number(middle)) ? below : above) = middle;
    }
    return Keys<C>::number(below);
  }
};

// Finds thresholds of a row that was read. A sample of the row says about where one is. What is above that range is
// summed, what is in it is collected, and there the threshold is found.
template <typename T>
struct Threshold {
  using C = Acc<T>;
  static constexpr int64_t kSample = 1024, kRun = 32;
  static constexpr C kLowest = std::numeric_limits<C>::lowest();
  Numbers<T>& numbers;
  Some<C> sample, near;
  C held, beyond;  // all from `held` on are near; and the number after the largest

  explicit Threshold(Numbers<T>& numbers_) : numbers(numbers_), sample(kSample), near(numbers.num_states + 4) {}

  FASTDIFF_HD void start() {
    held = kInfinity<C>;
    beyond = after(*std::max_element(numbers.block_max.begin(), numbers.block_max.end()));
  }

  static FASTDIFF_HD C after(C x) { return Keys<C>::number(Keys<C>::key(x) + 1); }

  // What the numbers from `least` on weigh; sums of classes may be lost.
  template <typename F>
  FASTDIFF_HD double mass(const F& weight, C least, Sums<C>& sums) {
    if (held <= least) {
      near.weigh(weight);
      return near.from(least);
    }
    read_again(
        numbers, [=](C x) __attribute__((always_inline)) { return x < least ? C(0) : weight(x); }, least, sums);
    return sums.total();
  }

  // The largest number from which on the row weighs `target`, or `least`, from which on it weighs `all`.
  template <typename F>
  FASTDIFF_HD C reach(const F& weight, C least, double target, double all, Sums<C>& sums) {
    C low = least, high = beyond;
    double above = 0;
    if (held <= least) {
      near.weigh(weight);
    } else {
      std::tie(low, high) = range(weight, least, all - target);
      above = high < beyond ? mass(weight, high, sums) : 0;
      if (above >= target) low = high, high = beyond, above = 0;
      for (;; high = low, low = least) {
        collect(weight, low, high);
        const double in = near.from(low);
        if (low == least || above + in >= target) break;
        above += in;
      }
      held = high == beyond ? low : kInfinity<C>;
    }
    return near.last(low, high, [&](C x) __attribute__((always_inline)) { return above + near.from(x) >= target; });
  }

  // Ends between which the threshold is, in all likelihood, if what is below it and not below `least` weighs so much. In
  // a sample that weighs s, give or take the root of s (w - s / kSample), where the largest of it weighs w.
  template <typename F>
  FASTDIFF_HD std::pair<C, C> range(const F& weight, C least, double below) {
    const int64_t n = numbers.num_states;
    if (n <= 4 * kSample) return {least, beyond};
    for (int64_t i = 0; i < kSample; ++i) {
      const C x = load(numbers.z[i * n / kSample]);
      sample.x[i] = x < beyond ? x : kLowest;  // one that is left out may be anything
    }
    sample.weigh(weight);
    const double expected = below * kSample / n, total = sample.from(kLowest);
    const auto exceeds = [&](C x, int sign) __attribute__((always_inline)) {
      const double w = weight(x), some = 3 * std::sqrt(expected * std::max(w - expected / kSample, 0.0)) + 2 * w;
      return total - sample.from(x) + sign * some > expected;
    };
    const C low = sample.last(least, beyond, [&](C x) __attribute__((always_inline)) { return !exceeds(x, 1); });
    const C high = sample.last(low, beyond, [&](C x) __attribute__((always_inline)) { return !exceeds(x, -1); });
    return {low, after(high)};
  }

  // The numbers from `low` on and below `high`. As nobody can foretell which those are, there are no branches on them
  // but after every four of a run.
  template <typename F>
  FASTDIFF_HD void collect(const F& weight, C low, C high) {
    C* to = near.x.data();
    for (size_t b = 0; b < numbers.block_max.size(); ++b) {
      if (numbers.block_max[b] < low) continue;
      const C* x = numbers.block(b);
      const int64_t n = numbers.size(b);
      int64_t i = 0;
      for (; i + kRun <= n; i += kRun) {
        uint32_t found = 0;
#pragma omp simd reduction(| : found)
        for (int32_t j = 0; j < kRun; ++j) found |= static_cast<uint32_t>(x[i + j] >= low && x[i + j] < high) << j;
        do {
          for (int k = 0; k < 4; ++k, found &= found - 1) {
            *to = x[i + __builtin_ctz(found | 1u << 31)];
            to += found != 0;
          }
        } while (found);
      }
      for (; i < n; ++i) {
        *to = x[i];
        to += x[i] >= low && x[i] < high;
      }
    }
    near.n = to - near.x.data();
    near.weigh(weight);
  }
};

}  // namespace fastdiff
