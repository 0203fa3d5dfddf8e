// The forward process on the CPU: masks, exact-count and harmonic masks, uniform noise. x0 is int64 [B, L].
#include <algorithm>
#include <cmath>
#include <vector>

#include "operators.h"
#include "../philox.h"

namespace fastdiff {
namespace {

constexpr double kTwo32 = 4294967296.0;

// What names the draws of each sequence.
struct Names {
  const int64_t *seed, *steps, *sample_ids;

  Names(const Tensor& seed_, const Tensor& steps_, const Tensor& sample_ids_)
      : seed(data<int64_t>(seed_)), steps(data<int64_t>(steps_)), sample_ids(data<int64_t>(sample_ids_)) {}

  Stream stream(Purpose purpose, int64_t b) const { return {*seed, purpose, steps[b], sample_ids[b], 0}; }
};

void draw_row(const Stream& stream, int64_t length, std::vector<uint32_t>& draws) {
  const int64_t groups = (length + 3) / 4;
  draws.resize(groups * 4);
  for (int64_t g = 0; g < groups; ++g) {
    const Words words = stream.four(static_cast<uint32_t>(g));
    std::copy(words.w, words.w + 4, draws.data() + 4 * g);
  }
}

// Probabilities [B, L] with any strides, as thresholds on a 32-bit draw; p = 1 is 2^32, above every draw.
struct Thresholds {
  const double* p;
  int64_t length, stride_b, stride_l;

  explicit Thresholds(const Tensor& t)
      : p(data<double>(t)), length(t.size(1)), stride_b(t.stride(0)), stride_l(t.stride(1)) {
    for (int64_t b = 0; b < t.size(0); ++b)
      for (int64_t i = 0; i < (stride_l ? length : std::min<int64_t>(length, 1)); ++i)
        if (const double value = at(b, i); !(value >= 0 && value <= 1))
          bad_value("p: expected probabilities in [0, 1], got ", value, " at [", b, ", ", i, "]");
  }

  double at(int64_t b, int64_t i) const { return p[b * stride_b + i * stride_l]; }
  uint64_t operator()(int64_t b, int64_t i) const { return static_cast<uint64_t>(std::nearbyint(at(b, i) * kTwo32)); }
};

template <typename F>
void for_each_sequence(const Tensor& x0, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(x0.size(1), 1));
  torch::stable::parallel_for(0, x0.size(0), grain, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> draws;
    for (int64_t b = begin; b < end; ++b) f(b, draws);
  });
}

Tensor empty_mask(const Tensor& x0) {
  const auto sizes = x0.sizes();
  return torch::stable::new_empty(x0, std::vector<int64_t>(sizes.begin(), sizes.end()), ScalarType::Bool);
}

// The m maskable positions with the smallest (draw, position).
struct SubsetMask {
  const int64_t* x0;
  const bool* maskable;
  int64_t* xt;
  bool* mask;
  int64_t length, mask_index;

  SubsetMask(const Tensor& x0_, const std::optional<Tensor>& maskable_, const Tensor& xt_, const Tensor& mask_,
             int64_t mask_index_)
      : x0(data<int64_t>(x0_)),
        maskable(data<bool>(maskable_)),
        xt(mutable_data<int64_t>(xt_)),
        mask(mutable_data<bool>(mask_)),
        length(x0_.size(1)),
        mask_index(mask_index_) {}

  int64_t num_maskable(int64_t b) const {
    return maskable ? std::count(maskable + b * length, maskable + (b + 1) * length, true) : length;
  }

  void operator()(int64_t b, int64_t m, const Stream& stream, std::vector<uint32_t>& draws) const {
    draw_row(stream, length, draws);
    std::vector<uint64_t> keys;
    keys.reserve(length);
    for (int64_t i = 0; i < length; ++i)
      if (!maskable || maskable[b * length + i]) keys.push_back(uint64_t{draws[i]} << 32 | static_cast<uint64_t>(i));
    std::nth_element(keys.begin(), keys.begin() + m, keys.end());
    std::copy_n(x0 + b * length, length, xt + b * length);
    std::fill_n(mask + b * length, length, false);
    for (int64_t k = 0; k < m; ++k) {
      const int64_t i = b * length + static_cast<int64_t>(keys[k] & 0xFFFFFFFF);
      xt[i] = mask_index;
      mask[i] = true;
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor> mask_tokens(Tensor x0, Tensor p, std::optional<Tensor> maskable, Tensor seed, Tensor steps,
                                       Tensor sample_ids, int64_t mask_index) {
  Tensor xt = torch::stable::empty_like(x0), mask = empty_mask(x0);
  const Names names(seed, steps, sample_ids);
  const Thresholds threshold(p);
  const int64_t length = x0.size(1), *from = data<int64_t>(x0);
  const bool* allowed = data<bool>(maskable);
  int64_t* to = mutable_data<int64_t>(xt);
  bool* masked = mutable_data<bool>(mask);
  for_each_sequence(x0, [&](int64_t b, std::vector<uint32_t>& draws) {
    draw_row(names.stream(kMask, b), length, draws);
    for (int64_t i = 0; i < length; ++i) {
      const int64_t at = b * length + i;
      masked[at] = draws[i] < threshold(b, i) && (!allowed || allowed[at]);
      to[at] = masked[at] ? mask_index : from[at];
    }
  });
  return {xt, mask};
}

std::tuple<Tensor, Tensor> mask_exactly(Tensor x0, Tensor counts, std::optional<Tensor> maskable, Tensor seed,
                                        Tensor steps, Tensor sample_ids, int64_t mask_index) {
  Tensor xt = torch::stable::empty_like(x0), mask = empty_mask(x0);
  const Names names(seed, steps, sample_ids);
  const SubsetMask subset(x0, maskable, xt, mask, mask_index);
  const int64_t* m = data<int64_t>(counts);
  for (int64_t b = 0; b < x0.size(0); ++b)
    if (const int64_t most = subset.num_maskable(b); m[b] < 0 || m[b] > most)
      bad_value("counts: expected numbers in [0, maskable positions], here ", most, ", got ", m[b], " at [", b, "]");
  for_each_sequence(
      x0, [&](int64_t b, std::vector<uint32_t>& draws) { subset(b, m[b], names.stream(kSubset, b), draws); });
  return {xt, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> harmonic_mask(Tensor x0, std::optional<Tensor> maskable, Tensor seed,
                                                         Tensor steps, Tensor sample_ids, int64_t mask_index) {
  Tensor xt = torch::stable::empty_like(x0), mask = empty_mask(x0);
  Tensor counts = torch::stable::new_empty(x0, {x0.size(0)});
  Tensor weight = torch::stable::new_empty(x0, {x0.size(0)}, ScalarType::Double);
  const Names names(seed, steps, sample_ids);
  const SubsetMask subset(x0, maskable, xt, mask, mask_index);
  std::vector<double> harmonic(x0.size(1) + 1, 0.0);  // H_m
  for (size_t m = 1; m < harmonic.size(); ++m) harmonic[m] = harmonic[m - 1] + 1.0 / static_cast<double>(m);
  for (int64_t b = 0; b < x0.size(0); ++b)
    if (subset.num_maskable(b) == 0) bad_value("maskable: expected at least one position in each sequence, got 0 at [", b, "]");

  for_each_sequence(x0, [&](int64_t b, std::vector<uint32_t>& draws) {
    const double norm = harmonic[subset.num_maskable(b)];
    const uint32_t draw = names.stream(kCount, b)(0);
    // The first m with draw < round(2^32 H_m / H_L).
    const auto found = std::upper_bound(harmonic.begin() + 1, harmonic.end(), draw, [norm](uint32_t d, double h) {
      return d < static_cast<uint64_t>(std::nearbyint(h / norm * kTwo32));
    });
    const int64_t m = found - harmonic.begin();
    mutable_data<int64_t>(counts)[b] = m;
    mutable_data<double>(weight)[b] = norm;
    subset(b, m, names.stream(kSubset, b), draws);
  });
  return {xt, mask, counts, weight};
}

// With probability p a token is redrawn from all num_states; it may stay.
Tensor uniform_tokens(Tensor x0, Tensor p, Tensor seed, Tensor steps, Tensor sample_ids, int64_t num_states) {
  Tensor xt = torch::stable::empty_like(x0);
  const Names names(seed, steps, sample_ids);
  const Thresholds threshold(p);
  const int64_t length = x0.size(1), *from = data<int64_t>(x0);
  int64_t* to = mutable_data<int64_t>(xt);
  for_each_sequence(x0, [&](int64_t b, std::vector<uint32_t>& draws) {
    std::vector<uint32_t> replacements;
    draw_row(names.stream(kMask, b), length, draws);
    draw_row(names.stream(kReplace, b), length, replacements);
    for (int64_t i = 0; i < length; ++i) {
      const auto redrawn = static_cast<int64_t>(uint64_t{replacements[i]} * static_cast<uint64_t>(num_states) >> 32);
      to[b * length + i] = draws[i] < threshold(b, i) ? redrawn : from[b * length + i];
    }
  });
  return xt;
}

}  // namespace fastdiff
