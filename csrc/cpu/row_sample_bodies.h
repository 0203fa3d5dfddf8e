// Drawing from one row: the pass that reads it, the weights that race, the races, and what top_k and top_p keep.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>
#include <vector>

#include "../row_sample.h"
#include "draws.h"
#include "row_bodies.h"

namespace fastdiff {

constexpr double kLog2E = 1.4426950408889634;

// A row, a block of kClasses ids at a time, with `absent` in the place of those that are not drawn.
template <typename T>
struct Numbers {
  using C = Acc<T>;
  const T* z = nullptr;
  C absent = -kInfinity<C>;
  int64_t num_states;
  std::vector<int64_t> hidden;
  std::vector<C> block_max;
  std::array<C, kClasses> buffer;

  Numbers(int64_t num_states_, const std::vector<int64_t>& excluded)
      : num_states(num_states_), hidden(excluded), block_max((num_states + kClasses - 1) / kClasses) {
    hidden.push_back(-1);  // room for x_t
  }

  FASTDIFF_HD void start(const T* row, int64_t here) {
    z = row;
    hidden.back() = here;
    absent = -kInfinity<C>;
  }

  FASTDIFF_HD int64_t size(int64_t b) const { return std::min(kClasses, num_states - b * kClasses); }

  FASTDIFF_HD const C* block(int64_t b) {
    const int64_t first = b * kClasses, n = size(b);
    const C* x = widened(z + first, n, buffer.data());
    for (const int64_t id : hidden) {
      if (id < first || id >= first + n) continue;
      if (x != buffer.data()) x = std::copy_n(x, n, buffer.data()) - n;
      buffer[id - first] = absent;
    }
    return x;
  }

  // The numbers of a class: ids c, c + kClasses, ...
  FASTDIFF_HD int64_t members(int64_t c, C* x) const {
    int64_t n = 0;
    for (int64_t id = c; id < num_states; id += kClasses) x[n++] = load(z[id]);
    for (const int64_t id : hidden)
      if (id >= 0 && id % kClasses == c) x[id / kClasses] = absent;
    return n;
  }
};

template <typename C>
FASTDIFF_HD C max_of(const C* x, int64_t n) {
  C max = -kInfinity<C>;
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) max = x[i] > max ? x[i] : max;
  return max;
}

// The weights that race: exp((z - shift) / temperature), those of numbers below `least` aside.
template <typename C>
struct Weight {
  C scale, shift, least;

  FASTDIFF_HD Weight(double temperature, C shift_, C least_ = -kInfinity<C>)
      : scale(static_cast<C>(kLog2E / temperature)), shift(shift_), least(least_) {}
  FASTDIFF_HD C operator()(C x) const {
    const C e = exp2_((x - shift) * scale);
    return x < least ? C(0) : e;
  }
};

// (exp(z - shift) - subtracted)+, and that to the power 1 / temperature; nothing for NaN. Where less than nothing is
// subtracted, a number of -inf has a weight, so that what is absent must be told apart.
template <typename C>
struct JumpWeight {
  Weight<C> whole;
  C subtracted, power;

  FASTDIFF_HD JumpWeight(C shift, double subtracted_, double temperature)
      : whole(1, shift), subtracted(static_cast<C>(subtracted_)), power(static_cast<C>(1 / temperature)) {}
  FASTDIFF_HD C jump(C x) const {
    const C w = whole(x) - subtracted;
    return w > 0 ? w : C(0);
  }
  FASTDIFF_HD C operator()(C x) const { return power == 1 ? jump(x) : std::pow(jump(x), power); }
};

// Sums over a row: of each class's weights, and at temperature 1 of e = exp(z - shift) and e (z - shift).
template <typename C>
struct Sums {
  C shift = -kInfinity<C>;
  std::array<C, kClasses> classes;
  double unit = 0, dot = 0;

  // All weights so far were relative to a smaller shift.
  FASTDIFF_HD void move_shift(C to, double temperature) {
    const auto factor = static_cast<C>(std::exp((static_cast<double>(shift) - to) / temperature));
    for (C& sum : classes) sum *= factor;
    const double d = static_cast<double>(shift) - to, unit_factor = std::exp(d);
    dot = unit == 0 ? 0 : (dot + d * unit) * unit_factor;
    unit *= unit_factor;
    shift = to;
  }

  template <bool kUnit, bool kTempered>
  FASTDIFF_HD void add(const C* x, int64_t n, const Weight<C>& weight) {
    const Weight<C> at_one(1, shift);
    C unit_part = 0, dot_part = 0;
    C* sum = classes.data();
#pragma omp simd reduction(+ : unit_part, dot_part)
    for (int64_t j = 0; j < n; ++j) {
      const C d = x[j] - weight.shift, w = exp2_(d * weight.scale);
      sum[j] += w;
      if constexpr (kUnit) {
        const C e = kTempered ? exp2_(d * at_one.scale) : w;
        unit_part += e;
        dot_part += e * (d < C(-87) ? C(-87) : d);
      }
    }
    unit += unit_part;
    dot += dot_part;
  }

  FASTDIFF_HD double total() const {
    double all = 0;
    for (const C sum : classes) all += sum;
    return all;
  }
};

// The one pass over a row. The shift is the largest number so far, or at most 60 (of what is exponentiated) below it.
template <bool kUnit, bool kTempered, typename T>
FASTDIFF_HD void read_row(Numbers<T>& numbers, double temperature, Sums<Acc<T>>& sums) {
  using C = Acc<T>;
  const auto room = static_cast<C>(60 * std::min(temperature, 1.0));
  sums.classes.fill(0);
  sums.shift = -kInfinity<C>;
  sums.unit = sums.dot = 0;
  for (size_t b = 0; b < numbers.block_max.size(); ++b) {
    const int64_t n = numbers.size(b);
    const C *x = numbers.block(b), max = numbers.block_max[b] = max_of(x, n);
    if (max > sums.shift + room) sums.move_shift(max, temperature);
    // A block of NaN has no maximum.
    sums.template add<kUnit, kTempered>(x, n, Weight<C>(temperature, sums.shift == -kInfinity<C> ? C(0) : sums.shift));
  }
}

// The classes' sums once more, of other weights, and the sum of jumps; the row is in cache.
template <typename T, typename F>
FASTDIFF_HD void read_again(Numbers<T>& numbers, const F& weight, Acc<T> least, Sums<Acc<T>>& sums) {
  sums.classes.fill(0);
  for (size_t b = 0; b < numbers.block_max.size(); ++b) {
    if (numbers.block_max[b] < least) continue;
    const Acc<T>* x = numbers.block(b);
    Acc<T>* sum = sums.classes.data();
    const int64_t n = numbers.size(b);
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sum[j] += weight(x[j]);
  }
}

// The first of the smallest E_i / weight_i.
template <typename C>
FASTDIFF_HD int64_t winner(const uint32_t* draws, C* weights, int64_t n) {
  C best = kInfinity<C>;
#pragma omp simd reduction(min : best)
  for (int64_t i = 0; i < n; ++i) {
    weights[i] = exponential<C>(draws[i]) / weights[i];
    best = weights[i] < best ? weights[i] : best;
  }
  return std::find(weights, weights + n, best) - weights;
}

template <typename T, typename F>
FASTDIFF_HD int64_t race(const Numbers<T>& numbers, const F& weight, Sums<Acc<T>>& sums, const Stream& stream) {
  using C = Acc<T>;
  uint32_t draws[kClasses];
  draw_block(stream, 0, kClasses, draws);
  const int64_t c = winner(draws, sums.classes.data(), kClasses);
  if (c == kClasses) return -1;
  const auto most = static_cast<int64_t>(numbers.block_max.size());
  std::vector<C> x(most);
  const int64_t n = numbers.members(c, x.data());
  if (n == 1) return c;
  std::vector<uint32_t> theirs(n);
  const Stream copy = stream;
  const auto lane = static_cast<uint32_t>(c & 3), group = static_cast<uint32_t>(c >> 2);
#pragma omp simd
  for (int32_t k = 0; k < static_cast<int32_t>(n); ++k) {
    const Words words = copy.four(group + static_cast<uint32_t>(k + 1) * static_cast<uint32_t>(kClasses / 4));
    theirs[k] = lane == 0 ? words.w[0] : lane == 1 ? words.w[1] : lane == 2 ? words.w[2] : words.w[3];
  }
  for (int64_t k = 0; k < n; ++k) x[k] = weight(x[k]);
  return c + kClasses * winner(theirs.data(), x.data(), n);
}

// The smallest number that top_k and top_p keep. Those above ever lower limits are gathered until they must hold it.
template <typename T>
FASTDIFF_HD Acc<T> least_kept(Numbers<T>& numbers, const Sums<Acc<T>>& sums, double temperature, int64_t top_k,
                              double top_p) {
  using C = Acc<T>;
  const Weight<C> weight(temperature, sums.shift);
  const int64_t most = top_k > 0 ? std::min(top_k, numbers.num_states) : numbers.num_states;
  const C top = max_of(numbers.block_max.data(), static_cast<int64_t>(numbers.block_max.size()));
  const double all = sums.total();
  std::vector<C> kept;
  for (double depth = 4 * std::max(temperature, 1.0);; depth *= 2) {
    const C limit = depth > 1e30 ? std::numeric_limits<C>::lowest() : static_cast<C>(top - depth);
    kept.clear();
    double mass = 0;
    for (size_t b = 0; b < numbers.block_max.size(); ++b) {
      if (numbers.block_max[b] < limit) continue;
      const C* x = numbers.block(b);
      for (int64_t j = 0; j < numbers.size(b); ++j)
        if (x[j] >= limit) kept.push_back(x[j]), mass += weight(x[j]);
    }
    const bool enough = top_k > 0 ? static_cast<int64_t>(kept.size()) >= most : mass >= top_p * all;
    if (enough || limit == std::numeric_limits<C>::lowest()) break;
  }
  std::sort(kept.begin(), kept.end(), std::greater<C>());
  // With ties of the most-th
  const C least = kept[std::min<int64_t>(most, kept.size()) - 1];
  while (kept.back() < least) kept.pop_back();
  if (top_p == 1) return least;
  double mass = 0, part = 0;
  for (const C x : kept) mass += weight(x);
  if (top_k == 0) mass = all;
  size_t n = 0;
  while (n < kept.size() && part < top_p * mass) part += weight(kept[n++]);
  return kept[n - 1];
}

// The first of the largest numbers, and the second largest.
template <typename T>
FASTDIFF_HD std::pair<int64_t, Acc<T>> largest(Numbers<T>& numbers) {
  using C = Acc<T>;
  const auto b = std::max_element(numbers.block_max.begin(), numbers.block_max.end()) - numbers.block_max.begin();
  const C *x = numbers.block(b), *first = std::find(x, x + numbers.size(b), numbers.block_max[b]);
  C second = std::max(max_of(x, first - x), max_of(first + 1, x + numbers.size(b) - first - 1));
  for (size_t other = 0; other < numbers.block_max.size(); ++other)
    if (static_cast<int64_t>(other) != b) second = std::max(second, numbers.block_max[other]);
  return {b * kClasses + (first - x), second};
}

}  // namespace fastdiff
