// Drawing from one row: the pass that reads it, the weights that race, and the races.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <type_traits>
#include <utility>
#include <vector>

#include "../row_sample.h"
#include "draws.h"
#include "row.h"

namespace fastdiff {

template <typename C>
struct Range {
  C min, max;
};

template <typename C>
FASTDIFF_HD Range<C> range_of(const C* x, int64_t n) {
  C min = kInfinity<C>, max = -kInfinity<C>;
#pragma omp simd reduction(min : min) reduction(max : max)
  for (int64_t i = 0; i < n; ++i) {
    min = x[i] < min ? x[i] : min;
    max = x[i] > max ? x[i] : max;
  }
  return {min, max};
}

// 16-bit numbers are compared as integers, twice as many at a time: their bits, those after the sign turned over where
// it is set.
template <typename T>
FASTDIFF_HD Range<float> range_of_bits(const T* x, int64_t n) {
  int16_t min = 0x7FFF, max = -0x8000;
#pragma omp simd reduction(min : min) reduction(max : max)
  for (int64_t i = 0; i < n; ++i) {
    const auto bits = static_cast<int16_t>(x[i].bits);
    const auto key = static_cast<int16_t>(bits ^ (bits >> 15 & 0x7FFF));
    min = key < min ? key : min;
    max = key > max ? key : max;
  }
  const auto number = [](int16_t key) { return load(T{static_cast<uint16_t>(key ^ (key >> 15 & 0x7FFF))}); };
  return {number(min), number(max)};
}
FASTDIFF_HD Range<float> range_of(const BFloat16* x, int64_t n) { return range_of_bits(x, n); }
FASTDIFF_HD Range<float> range_of(const Float16* x, int64_t n) { return range_of_bits(x, n); }

// Whether there is NaN among numbers of that range: in the order of bits it is beyond infinity.
template <typename T>
FASTDIFF_HD bool has_nan(const T* x, int64_t n, const Range<Acc<T>>& range) {
  if constexpr (sizeof(T) == 2) return std::isnan(range.min) || std::isnan(range.max);
  int32_t found = 0;
#pragma omp simd reduction(| : found)
  for (int64_t i = 0; i < n; ++i) found |= load(x[i]) != load(x[i]);
  return found != 0;
}

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

  FASTDIFF_HD const T* raw(int64_t b) const { return z + b * kClasses; }

  FASTDIFF_HD const C* block(int64_t b) {
    const C* x = widened(raw(b), size(b), buffer.data());
    return hides(b) ? without_hidden(b, x) : x;
  }

  FASTDIFF_HD bool hides(int64_t b) const {
    bool any = false;
    for (const int64_t id : hidden) any |= id >= 0 && id / kClasses == b;
    return any;
  }

  FASTDIFF_HD const C* without_hidden(int64_t b, const C* x) {
    if (x != buffer.data()) std::copy_n(x, size(b), buffer.data());
    for (const int64_t id : hidden)
      if (id >= 0 && id / kClasses == b) buffer[id % kClasses] = absent;
    return buffer.data();
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

// The weights that race: exp((z - shift) / temperature), those of numbers below `kept` aside.
template <typename C>
struct Weight {
  Exp<C> exp;
  C shift, kept = -kInfinity<C>;

  FASTDIFF_HD Weight(double temperature, C shift_) : exp(temperature), shift(shift_) {}
  FASTDIFF_HD C operator()(C x) const {
    if (std::is_same_v<C, double> && x < kept) return 0;  // what is not vectorised need not be computed
    const C e = exp(x - shift);
    return x < kept ? C(0) : e;
  }
};

// (exp(z - shift) - subtracted)+, and its share of the largest to the power 1 / temperature; nothing for NaN. Where
// less than nothing is subtracted, a number of -inf has a weight, so that what is absent must be told apart.
template <typename C>
struct JumpWeight {
  Weight<C> whole;
  C subtracted, power, largest = 1;

  FASTDIFF_HD JumpWeight(C shift, double subtracted_, double temperature)
      : whole(1, shift), subtracted(static_cast<C>(subtracted_)), power(static_cast<C>(1 / temperature)) {}
  FASTDIFF_HD C jump(C x) const {
    const C w = whole(x) - subtracted;
    return w > 0 ? w : C(0);
  }
  FASTDIFF_HD C operator()(C x) const { return power == 1 ? jump(x) : std::pow(jump(x) / largest, power); }
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
    dot = (dot + (std::isinf(d) ? 0 : d * unit)) * unit_factor;
    unit *= unit_factor;
    shift = to;
  }

  template <bool kRaise, typename T>
  FASTDIFF_HD void add(const T* x, int64_t n, const Weight<C>& weight) {
    C* sum = classes.data();
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sum[j] += weight.exp.template of<kRaise>(load(x[j]) - weight.shift);
  }

  // The same, and to what is summed at temperature 1.
  template <bool kRaise, bool kTempered>
  FASTDIFF_HD void add_unit(const C* x, int64_t n, const Weight<C>& weight) {
    const Exp<C> at_one(1);
    C unit_part = 0, dot_part = 0;
    C* sum = classes.data();
#pragma omp simd reduction(+ : unit_part, dot_part)
    for (int64_t j = 0; j < n; ++j) {
      const C d = x[j] - weight.shift, w = weight.exp.template of<kRaise>(d);
      const C e = kTempered ? at_one.template of<kRaise>(d) : w;
      sum[j] += w;
      unit_part += e;
      dot_part += e * (kRaise && d < at_one.least ? at_one.least : d);
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
    const C* visible = numbers.hides(b) ? numbers.block(b) : nullptr;
    const Range<C> range = visible ? range_of(visible, n) : range_of(numbers.raw(b), n);
    numbers.block_max[b] = range.max;
    if (range.max > sums.shift + room) sums.move_shift(range.max, temperature);
    // A block of NaN, or of nothing, has no maximum.
    const Weight<C> weight(temperature, sums.shift == -kInfinity<C> ? C(0) : sums.shift);
    // Where there is nothing to raise it is left out: one operation of the eight that decide.
    const bool raise = range.min - weight.shift < std::max(weight.exp.least, Exp<C>(1).least);
    if constexpr (kUnit) {
      const C* x = visible ? visible : numbers.block(b);
      raise ? sums.template add_unit<true, kTempered>(x, n, weight)
            : sums.template add_unit<false, kTempered>(x, n, weight);
    } else if (visible) {
      sums.template add<true>(visible, n, weight);
    } else {
      raise ? sums.template add<true>(numbers.raw(b), n, weight) : sums.template add<false>(numbers.raw(b), n, weight);
    }
  }
}

// The same without the sums: block_max, and the shift is the largest. Whether a number can be drawn, and none is NaN.
template <typename T>
FASTDIFF_HD bool read_largest(Numbers<T>& numbers, Sums<Acc<T>>& sums) {
  sums.shift = -kInfinity<Acc<T>>;
  bool valid = true;
  for (size_t b = 0; b < numbers.block_max.size(); ++b) {
    const int64_t n = numbers.size(b);
    const auto read = [&](const auto* x) __attribute__((always_inline)) {
      const auto range = range_of(x, n);
      valid &= !has_nan(x, n, range);
      numbers.block_max[b] = range.max;
    };
    numbers.hides(b) ? read(numbers.block(b)) : read(numbers.raw(b));
    sums.shift = std::max(sums.shift, numbers.block_max[b]);
  }
  return valid && std::isfinite(sums.shift);
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

// The first of the largest numbers, and the second largest.
template <typename T>
FASTDIFF_HD std::pair<int64_t, Acc<T>> largest(Numbers<T>& numbers) {
  using C = Acc<T>;
  const auto b = std::max_element(numbers.block_max.begin(), numbers.block_max.end()) - numbers.block_max.begin();
  const C *x = numbers.block(b), *first = std::find(x, x + numbers.size(b), numbers.block_max[b]);
  C second = std::max(range_of(x, first - x).max, range_of(first + 1, x + numbers.size(b) - first - 1).max);
  for (size_t other = 0; other < numbers.block_max.size(); ++other)
    if (static_cast<int64_t>(other) != b) second = std::max(second, numbers.block_max[other]);
  return {b * kClasses + (first - x), second};
}

}  // namespace fastdiff
