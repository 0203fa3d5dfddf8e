// Tokens drawn from rows on the CPU: a row is read from memory once; a race of its classes, then of one class.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "isa.h"
#include "row_kept.h"

namespace fastdiff {

// One call, and the ids that no row draws.
struct RowSample {
  const Tensor& tensor;
  int64_t rows, num_states;
  const int64_t* xt;
  const bool* is_live;
  const ReverseLaw* law;
  const int64_t *sample_ids = nullptr, *positions = nullptr;
  int64_t seed = 0, step = 0, top_k = 0;
  double temperature = 1, top_p = 1;
  std::vector<int64_t> excluded, live;
  int64_t *tokens = nullptr, *argmax = nullptr;
  float *stats = nullptr, *probs = nullptr;  // [3, rows]; [rows, V], then no tokens

  RowSample(const Tensor& z, const Tensor& xt_, const Tensor& live_, const std::optional<Tensor>& law_)
      : tensor(z),
        rows(xt_.numel()),
        num_states(z.size(-1)),
        xt(data<int64_t>(xt_)),
        is_live(data<bool>(live_)),
        law(law_ ? static_cast<const ReverseLaw*>(law_->const_data_ptr()) : nullptr) {
    for (int64_t r = 0; r < rows; ++r) {
      if (law && (xt[r] < 0 || xt[r] >= num_states))
        bad_value("xt: expected ids in [0, ", num_states, "), got ", xt[r], " at token ", r);
      if (is_live[r]) live.push_back(r);
    }
  }

  template <typename T>
  const T* row(int64_t r) const {
    return static_cast<const T*>(tensor.const_data_ptr()) + row_offset(tensor, r);
  }
  Stream race_stream(int64_t r) const {
    return {seed, kRace, step, sample_ids[r], static_cast<uint32_t>(positions[r])};
  }
  bool keeps_some() const { return top_k > 0 && top_k < num_states; }
  bool filters() const { return keeps_some() || top_p < 1; }
};

// From the numbers of the token, of the largest and of the second largest.
template <typename C>
FASTDIFF_HD void write_stats(const RowSample& op, const Sums<C>& sums, int64_t r, C drawn, C top, C second) {
  const auto p = [&](double x) { return std::exp(x - sums.shift) / sums.unit; };
  float* to = op.stats + r;
  to[0] = static_cast<float>(p(drawn));
  to[op.rows] = static_cast<float>(p(top) - p(second));
  to[2 * op.rows] = static_cast<float>(sums.dot / sums.unit - std::log(sums.unit));
}

// What a row's law comes to: how much x_t weighs (NaN if the row has no law), the others together, and each of them.
template <typename C>
struct Jumps {
  double stay, jumps;
  JumpWeight<C> weight;
};

// From the sums of a row that was read; they are then those of the jumps at temperature 1.
template <typename T>
FASTDIFF_HD Jumps<Acc<T>> jumps_of(const RowSample& op, Numbers<T>& numbers, Sums<Acc<T>>& sums, int64_t r) {
  using C = Acc<T>;
  const ReverseLaw& law = op.law[r];
  const double log_here = std::isnan(law.log_here) ? load(numbers.z[op.xt[r]]) : law.log_here;
  // What theta takes from each weight is of the size of all together.
  if (law.theta != 0 && log_here > sums.shift) sums.move_shift(static_cast<C>(log_here), 1);
  const double here = std::exp(std::min(log_here - sums.shift, 300.0));  // beyond, it stays, and nothing overflows
  const double all = sums.unit + here;
  const JumpWeight<C> weight(sums.shift, law.theta * all, op.temperature > 0 ? op.temperature : 1);
  // Without a number nothing weighs; a product, so that NaN is not lost.
  double jumps = sums.unit * (sums.shift > -kInfinity<C>);
  if (law.theta != 0) {
    numbers.absent = NAN;
    read_again(numbers, [&](C x) __attribute__((always_inline)) { return weight.jump(x); }, -kInfinity<C>, sums);
    jumps = sums.total();
  }
  return {std::isfinite(all) ? std::max(law.kappa * here - law.lam * all, 0.0) : NAN, jumps, weight};
}

// x_t, or what replaces it; -1 if the row has no law.
template <typename T>
FASTDIFF_HD int64_t jump(const RowSample& op, Numbers<T>& numbers, Sums<Acc<T>>& sums, int64_t r) {
  using C = Acc<T>;
  auto [stay, jumps, weight] = jumps_of(op, numbers, sums, r);
  const double all = stay + jumps;
  if (!std::isfinite(all)) return -1;
  const uint32_t draw = Stream(op.seed, kStep, op.step, op.sample_ids[r], 0)(static_cast<uint32_t>(op.positions[r]));
  if (jumps <= 0 || draw < threshold(stay / all)) return op.xt[r];
  if (op.temperature == 0) return largest(numbers).first;
  const Stream stream = op.race_stream(r);
  if (op.law[r].theta == 0) return race(numbers, Weight<C>(op.temperature, sums.shift), sums, stream);
  if (op.temperature != 1) {
    weight.largest = weight.jump(*std::max_element(numbers.block_max.begin(), numbers.block_max.end()));
    read_again(numbers, weight, -kInfinity<C>, sums);
  }
  return race(numbers, weight, sums, stream);
}

// The weights of what top_k and then top_p keep, and their sums; the row was read.
template <typename T>
FASTDIFF_HD Weight<Acc<T>> keep(const RowSample& op, Threshold<T>& threshold) {
  using C = Acc<T>;
  const Sums<C>& sums = threshold.sums;
  Weight<C> weight(op.temperature, sums.shift);
  double all = op.keeps_some() ? 0 : sums.total();
  weight.kept = std::numeric_limits<C>::lowest();
  threshold.start();
  if (op.keeps_some()) {
    weight.kept = threshold.reach(One<C>(), weight.kept, op.top_k, op.num_states);
    all = threshold.mass(weight, weight.kept);
  }
  if (op.top_p < 1) weight.kept = threshold.reach(weight, weight.kept, op.top_p * all, all);
  threshold.sum(weight);
  return weight;
}

// Whether the row has a law.
template <typename T>
FASTDIFF_HD bool read(const RowSample& op, Numbers<T>& numbers, Sums<Acc<T>>& sums) {
  const double temperature = op.temperature > 0 ? op.temperature : 1;
  if (op.stats || op.law)
    temperature == 1 ? read_row<true, false>(numbers, temperature, sums)
                     : read_row<true, true>(numbers, temperature, sums);
  else if (op.keeps_some())
    return read_largest(numbers, sums);
  else
    read_row<false, false>(numbers, temperature, sums);
  return op.law || (std::isfinite(sums.total()) && sums.shift > -kInfinity<Acc<T>>);
}

template <typename T>
FASTDIFF_HD int64_t sample_row(const RowSample& op, Numbers<T>& numbers, Threshold<T>& threshold, Sums<Acc<T>>& sums,
                               int64_t r) {
  using C = Acc<T>;
  if (!read(op, numbers, sums)) return -1;
  if (op.law) return jump(op, numbers, sums, r);
  const auto [top, second] = largest(numbers);
  int64_t token = top;
  if (op.temperature > 0) {
    const Weight<C> weight = op.filters() ? keep(op, threshold) : Weight<C>(op.temperature, sums.shift);
    token = race(numbers, weight, sums, op.race_stream(r));
  }
  if (op.stats) {
    op.argmax[r] = top;
    write_stats(op, sums, r, load(numbers.z[token]), load(numbers.z[top]), second);
  }
  return token;
}

template <typename T>
FASTDIFF_HD void sample_rows(const RowSample& op, int64_t begin, int64_t end, std::atomic<int64_t>& bad) {
  Numbers<T> numbers(op.num_states, op.excluded);
  Sums<Acc<T>> sums;
  Threshold<T> threshold(numbers, sums, op.filters() ? op.num_states : 0);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t r = op.live[i];
    numbers.start(op.row<T>(r), op.law ? op.xt[r] : -1);
    const int64_t token = sample_row(op, numbers, threshold, sums, r);
    if (token < 0)
      bad = r;
    else
      op.tokens[r] = token;
  }
}

// The law of each token as a row of probabilities; a token that is not live stays.
template <typename T>
FASTDIFF_HD void write_rows(const RowSample& op, int64_t begin, int64_t end, std::atomic<int64_t>& bad) {
  Numbers<T> numbers(op.num_states, op.excluded);
  Sums<Acc<T>> sums;
  for (int64_t r = begin; r < end; ++r) {
    float* to = op.probs + r * op.num_states;
    if (!op.is_live[r]) {
      std::fill_n(to, op.num_states, 0.0f);
      to[op.xt[r]] = 1;
      continue;
    }
    numbers.start(op.row<T>(r), op.xt[r]);
    read_row<true, false>(numbers, 1, sums);
    auto [stay, jumps, weight] = jumps_of(op, numbers, sums, r);
    const double all = stay + jumps;
    if (!std::isfinite(all)) bad = r;
    const auto scale = static_cast<Acc<T>>(all > 0 ? 1 / all : 0);
    for (size_t b = 0; b < numbers.block_max.size(); ++b) {
      const Acc<T>* x = numbers.block(b);
      const int64_t n = numbers.size(b);
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) to[b * kClasses + j] = static_cast<float>(weight.jump(x[j]) * scale);
    }
    to[op.xt[r]] = static_cast<float>(all > 0 ? stay / all : 1);
  }
}

#define FASTDIFF_SAMPLE(SUFFIX, TARGET)                                                               \
  template <typename T>                                                                               \
  TARGET void sample_##SUFFIX(const RowSample& op, int64_t b, int64_t e, std::atomic<int64_t>& bad) { \
    op.probs ? write_rows<T>(op, b, e, bad) : sample_rows<T>(op, b, e, bad);                          \
  }
FASTDIFF_FOR_EACH_ISA(FASTDIFF_SAMPLE)

using Sample = void (*)(const RowSample&, int64_t, int64_t, std::atomic<int64_t>&);

// For rows of T. A file each for wide and for narrow numbers instantiates it, so that they compile side by side.
template <typename T>
Sample sampler_of(Isa isa);

#define FASTDIFF_SAMPLER_OF(T)                 \
  template <>                                  \
  Sample sampler_of<T>(Isa isa) {              \
    return FASTDIFF_FOR_ISA(sample, isa, <T>); \
  }

}  // namespace fastdiff
