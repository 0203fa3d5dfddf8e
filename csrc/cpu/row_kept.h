// What top_k and top_p keep of a row: the numbers from a threshold on.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
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
  static FASTDIFF_HD C after(C x) { return number(key(x + C(0)) + 1); }  // + 0, as 0 is not more than -0
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

  // What those from a number on weigh, the least of them, and the largest of the others.
  struct Parts {
    double from;
    C least, most;
  };
  FASTDIFF_HD Parts parts(C at) const {
    const C *xs = x.data(), *ws = w.data();
    double from = 0;
    C least = kInfinity<C>, most = -kInfinity<C>;
#pragma omp simd reduction(+ : from) reduction(min : least) reduction(max : most)
    for (int64_t i = 0; i < n; ++i) {
      const double w = ws[i];
      const C above = xs[i] >= at ? xs[i] : kInfinity<C>, below = xs[i] >= at ? -kInfinity<C> : xs[i];
      from += xs[i] >= at ? w : 0.0;
      least = above < least ? above : least;
      most = below > most ? below : most;
    }
    return {from, least, most};
  }

  FASTDIFF_HD void add_to(std::array<C, kClasses>& classes) const {
    for (int64_t i = 0; i < n; ++i) classes[ids[i] & (kClasses - 1)] += w[i];
  }

  // The largest of them, or `low`, that passes a test of it and of what those from there on weigh; all are below
  // `high`. The range is halved, and each time narrowed to the numbers in it.
  template <typename F>
  FASTDIFF_HD C last(C low, C high, const F& passes) const {
    Key below = Keys<C>::key(low), above = Keys<C>::key(high);
    for (;;) {
      const auto apart = static_cast<Unsigned>(above) - static_cast<Unsigned>(below);
      if (apart <= 1) return Keys<C>::number(below);
      const auto half = static_cast<Key>(static_cast<Unsigned>(below) + apart / 2);
      const Parts at_half = parts(Keys<C>::number(half));
      if (at_half.least < high && passes(Keys<C>::number(half), at_half.from))
        below = std::max(half, Keys<C>::key(at_half.least));  // which is before it if it is -0
      else
        above = std::max(below, Keys<C>::key(at_half.most) + 1);
    }
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

  Threshold(Numbers<T>& numbers_, Sums<C>& sums_, int64_t most)
      : numbers(numbers_), sums(sums_), sample(kSample), near(most + 4) {}

  FASTDIFF_HD void start() {
    beyond = Keys<C>::after(*std::max_element(numbers.block_max.begin(), numbers.block_max.end()));
    low = high = summed = kInfinity<C>;
  }

  FASTDIFF_HD bool holds(C least) const { return low <= least && high == beyond; }

  // What the numbers from `least` on weigh.
  template <typename F>
  FASTDIFF_HD double mass(const F& weight, C least) {
    if (holds(least)) {
      near.weigh(weight);
      return near.parts(least).from;
    }
    read_again(numbers, [=](C x) __attribute__((always_inline)) { return x < least ? C(0) : weight(x); }, least, sums);
    summed = least;
    return sums.total();
  }

  // The largest number from which on the row weighs `target`, or `least`, from which on it weighs `all`. Where the
  // sample misled, all below the range is taken; a wide range is narrowed once more, by a sample of what is in it.
  template <typename F>
  FASTDIFF_HD C reach(const F& weight, C least, double target, double all) {
    double above = 0;
    const auto enough = [&](C, double from) __attribute__((always_inline)) { return above + from >= target; };
    if (holds(least)) {
      near.weigh(weight);
      return near.last(least, high, enough);
    }
    const int64_t n = numbers.num_states;
    const auto of_row = [this](int64_t id) __attribute__((always_inline)) {
      const C x = load(numbers.z[id]);
      return x < beyond ? x : kLowest;  // one that is left out may be anything
    };
    const auto of_near = [this](int64_t i) __attribute__((always_inline)) {
      return near.x[i + near.n / (2 * kSample)];  // half way between those that the row's sample has if all are near
    };
    bool narrowed = n <= 4 * kSample;
    low = least, high = beyond;
    if (!narrowed) narrow(weight, of_row, n, all - target);
    for (;;) {
      above = high < beyond ? mass(weight, high) : 0;
      if (above >= target) low = high, high = beyond, above = 0;
      collect(weight);
      const double from = near.parts(low).from;
      if (low > least && !enough(low, from)) {
        high = low, low = least;
      } else if (!narrowed && near.n > n / 8) {
        narrow(weight, of_near, near.n, above + from - target);
        narrowed = true;
      } else {
        return near.last(low, high, enough);
      }
    }
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

  // Narrows the ends to where the threshold is, in all likelihood, if of n numbers, those between the ends and others
  // that weigh nothing or are less, so much is below it. In a sample that weighs s, a standard deviation is at most the
  // root of s (w - s / kSample), where its largest weighs w.
  template <typename F, typename G>
  FASTDIFF_HD void narrow(const F& weight, const G& number, int64_t n, double below) {
    sample.n = kSample;
    for (int64_t i = 0; i < kSample; ++i) sample.x[i] = number(i * n / kSample);
    sample.weigh(weight);
    const double expected = below * kSample / n, total = sample.parts(kLowest).from;
    const auto below_it = [&](int sign) {
      return [=](C x, double from) __attribute__((always_inline)) {
        const double w = weight(x), deviation = std::sqrt(expected * std::max(w - expected / kSample, 0.0));
        return total - from + sign * (3 * deviation + 2 * w) <= expected;
      };
    };
    low = sample.last(low, high, below_it(1));
    high = std::min(high, sample.parts(Keys<C>::after(sample.last(low, high, below_it(-1)))).least);
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
        if (found == ~0u) {
          std::iota(to, to + kRun, id + i);
          to += kRun;
          continue;
        }
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
