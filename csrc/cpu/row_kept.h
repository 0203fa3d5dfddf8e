// What top_k and top_p keep of a row: the numbers from a threshold on.
#pragma once

#include <algorithm>
#include <array>
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

// Some ids of a row, their numbers, and what they weigh.
template <typename C>
struct Some {
  using Key = typename Keys<C>::Key;
  using Unsigned = std::make_unsigned_t<Key>;
  std::vector<C> x, w;
  std::vector<int32_t> ids;
  int64_t n = 0;

  explicit Some(int64_t most) : x(most), w(most), ids(most) {}

  template <typename F>
  FASTDIFF_HD void weigh(const F& weight) {
    const C* xs = x.data();
    C* ws = w.data();
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) ws[i] = weight(xs[i]);
  }

  // What those from a number on weigh.
  FASTDIFF_HD double from(C least) const {
    const C *xs = x.data(), *ws = w.data();
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) {
      const double w = ws[i];
      sum += xs[i] >= least ? w : 0.0;
    }
    return sum;
  }

  FASTDIFF_HD void add_to(std::array<C, kClasses>& classes) const {
    for (int64_t i = 0; i < n; ++i) classes[ids[i] & (kClasses - 1)] += w[i];
  }

  // How far apart two keys are, and the one half way.
  static FASTDIFF_HD Unsigned apart(Key below, Key above) {
    return static_cast<Unsigned>(above) - static_cast<Unsigned>(below);
  }
  static FASTDIFF_HD Key middle(Key below, Key above) {
    return static_cast<Key>(static_cast<Unsigned>(below) + apart(below, above) / 2);
  }

  // The ends of a small range, of which the lower passes a test and the upper does not, as is so of `low` and `high`.
  template <typename F>
  FASTDIFF_HD std::pair<C, C> divide(C low, C high, const F& passes) const {
    constexpr int kDigits = 18;  // of a key that are looked at
    Key below = Keys<C>::key(low), above = Keys<C>::key(high);
    while (apart(below, above) > Unsigned{1} << (8 * sizeof(C) - kDigits)) {
      const Key half = middle(below, above);
      (passes(Keys<C>::number(half)) ? below : above) = half;
    }
    return {Keys<C>::number(below), Keys<C>::number(above)};
  }

  // The largest number from which on they weigh `target`, as they do from `low` on; all are below `high`. The range is
  // halved until there is at most one of them in it.
  template <typename F>
  FASTDIFF_HD C reach(C low, C high, double target, const F& weight) const {
    Key below = Keys<C>::key(low), above = Keys<C>::key(high);
    double from_below = from(low), from_above = 0;
    while (apart(below, above) > 1 && from_below - from_above > 1.5 * weight(Keys<C>::number(below))) {
      const Key half = middle(below, above);
      const double from_half = from(Keys<C>::number(half));
      if (from_half >= target)
        below = half, from_below = from_half;
      else
        above = half, from_above = from_half;
    }
    return Keys<C>::number(below);
  }
};

// Finds thresholds of a row that was read. A sample of the row says about where one is. What is above that range is
// summed, what is in it is collected, and there the threshold is found.
template <typename T>
struct Threshold {
  using C = Acc<T>;
  static constexpr int64_t kSample = 1024;
  static constexpr int32_t kRun = 32;
  static constexpr C kLowest = std::numeric_limits<C>::lowest();
  Numbers<T>& numbers;
  Sums<C>& sums;
  Some<C> sample, near;
  C low, high;  // between which all are near
  C summed;     // from where on sums of classes are of what was last weighed
  C beyond;     // the number after the largest

  Threshold(Numbers<T>& numbers_, Sums<C>& sums_)
      : numbers(numbers_), sums(sums_), sample(kSample), near(numbers.num_states + 4) {}

  FASTDIFF_HD void start() {
    const C top = *std::max_element(numbers.block_max.begin(), numbers.block_max.end());
    beyond = Keys<C>::number(Keys<C>::key(top) + 1);
    low = high = summed = kInfinity<C>;
  }

  FASTDIFF_HD bool holds(C least) const { return low <= least && high == beyond; }

  // What the numbers from `least` on weigh.
  template <typename F>
  FASTDIFF_HD double mass(const F& weight, C least) {
    if (holds(least)) {
      near.weigh(weight);
      return near.from(least);
    }
    read_again(
        numbers, [=](C x) __attribute__((always_inline)) { return x < least ? C(0) : weight(x); }, least, sums);
    summed = least;
    return sums.total();
  }

  // The largest number from which on the row weighs `target`, or `least`, from which on it weighs `all`.
  template <typename F>
  FASTDIFF_HD C reach(const F& weight, C least, double target, double all) {
    double above = 0;
    if (holds(least)) {
      near.weigh(weight);
      return near.reach(least, high, target, weight);
    }
    std::tie(low, high) = range(weight, least, all - target);
    if (high < beyond) above = mass(weight, high);
    if (above >= target) low = high, high = beyond, above = 0;
    for (;; high = low, low = least) {
      collect(weight);
      const double in = near.from(low);
      if (low == least || above + in >= target) break;
      above += in;
    }
    return near.reach(low, high, target - above, weight);
  }

  // The sums of classes of what is kept, from weight.kept on.
  FASTDIFF_HD void sum(const Weight<C>& weight) {
    const C least = weight.kept;
    if (low <= least && (high == beyond || high == summed)) {
      if (high == beyond) sums.classes.fill(0);
      near.weigh(weight);
      near.add_to(sums.classes);
    } else if (least != summed) {
      read_again(numbers, weight, least, sums);
    }
  }

  // Ends between which the threshold is, in all likelihood, if what is below it and not below `least` weighs so much. In
  // a sample that weighs s, give or take the root of s (w - s / kSample), where the largest of it weighs w.
  template <typename F>
  FASTDIFF_HD std::pair<C, C> range(const F& weight, C least, double below) {
    const int64_t n = numbers.num_states;
    if (n <= 4 * kSample) return {least, beyond};
    sample.n = kSample;
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
    const C from = sample.divide(least, beyond, [&](C x) __attribute__((always_inline)) {
      return !exceeds(x, 1);
    }).first;
    const C to = sample.divide(from, beyond, [&](C x) __attribute__((always_inline)) {
      return !exceeds(x, -1);
    }).second;
    return {from, to};
  }

  // The numbers between the ends. As nobody can foretell which those are, there are no branches on them
  // but after every four of a run.
  template <typename F>
  FASTDIFF_HD void collect(const F& weight) {
    int32_t* to = near.ids.data();
    const C first = low, last = high;
    for (size_t b = 0; b < numbers.block_max.size(); ++b) {
      if (numbers.block_max[b] < first) continue;
      const C* x = numbers.block(b);
      const auto n = static_cast<int32_t>(numbers.size(b)), id = static_cast<int32_t>(b * kClasses);
      int32_t i = 0;
      for (; i + kRun <= n; i += kRun) {
        const C* run = x + i;
        uint32_t found = 0;
#pragma omp simd reduction(| : found)
        for (int32_t j = 0; j < kRun; ++j) found |= static_cast<uint32_t>(run[j] >= first && run[j] < last) << j;
        do {
          for (int k = 0; k < 4; ++k, found &= found - 1) {
            *to = id + i + __builtin_ctz(found | 1u << 31);
            to += found != 0;
          }
        } while (found);
      }
      for (; i < n; ++i) {
        *to = id + i;
        to += x[i] >= first && x[i] < last;
      }
    }
    near.n = to - near.ids.data();
    for (int64_t k = 0; k < near.n; ++k) near.x[k] = load(numbers.z[near.ids[k]]);
    near.weigh(weight);
  }
};

}  // namespace fastdiff
