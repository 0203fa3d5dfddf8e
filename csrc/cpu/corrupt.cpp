// The forward process on the CPU: masks, exact-count and harmonic masks, uniform noise. x0 is int64 [B, L].
#include <algorithm>
#include <cmath>
#include <vector>

#include "../philox.h"
#include "isa.h"
#include "operators.h"

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

FASTDIFF_HD void draw_groups(const Stream& stream, int64_t groups, uint32_t* draws) {
#pragma omp simd
  for (int64_t g = 0; g < groups; ++g) {
    const Words words = stream.four(static_cast<uint32_t>(g));
    for (int lane = 0; lane < 4; ++lane) draws[4 * g + lane] = words.w[lane];
  }
}

#define FASTDIFF_DRAWS(SUFFIX, TARGET)                                                      \
  TARGET void draw_groups_##SUFFIX(const Stream& stream, int64_t groups, uint32_t* draws) { \
    draw_groups(stream, groups, draws);                                                     \
  }
FASTDIFF_FOR_EACH_ISA(FASTDIFF_DRAWS)

// Draws 0 .. length - 1 of a stream.
void draw_row(const Stream& stream, int64_t length, std::vector<uint32_t>& draws) {
  static const auto draw = FASTDIFF_FOR_ISA(draw_groups, current_isa());
  const int64_t groups = (length + 3) / 4;
  draws.resize(groups * 4);
  draw(stream, groups, draws.data());
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

// Where each sequence lies in x0: rows of [B, L], or documents of a packed [T] between cu_seqlens [B + 1].
struct Sequences {
  const int64_t* cu_seqlens;
  int64_t count, length;

  Sequences(const Tensor& x0, const std::optional<Tensor>& cu)
      : cu_seqlens(data<int64_t>(cu)),
        count(cu ? cu->numel() - 1 : x0.size(0)),
        length(cu ? x0.numel() / std::max<int64_t>(count, 1) : x0.size(1)) {
    if (!cu) return;
    for (int64_t b = 0; b < count; ++b)
      if (cu_seqlens[b] > cu_seqlens[b + 1]) bad_value("cu_seqlens: expected rising offsets, got a fall at [", b, "]");
    if (cu_seqlens[0] != 0 || cu_seqlens[count] != x0.numel())
      bad_value("cu_seqlens: expected offsets from 0 to ", x0.numel(), ", got ", cu_seqlens[0], " to ",
                cu_seqlens[count]);
  }

  int64_t begin(int64_t b) const { return cu_seqlens ? cu_seqlens[b] : b * length; }
  int64_t size(int64_t b) const { return begin(b + 1) - begin(b); }

  // Calls f(b, scratch for draws) for every sequence, several threads side by side.
  template <typename F>
  void for_each(const F& f) const {
    const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(length, 1));
    torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
      std::vector<uint32_t> draws;
      for (int64_t b = first; b < last; ++b) f(b, draws);
    });
  }
};

Tensor empty_mask(const Tensor& x0) { return torch::stable::new_empty(x0, sizes(x0), ScalarType::Bool); }

// Masks the m maskable positions of a sequence with the smallest (draw, position).
struct SubsetMask {
  Sequences sequences;
  const int64_t* x0;
  const bool* maskable;
  int64_t* xt;
  bool* mask;
  int64_t mask_index;

  SubsetMask(const Tensor& x0_, const std::optional<Tensor>& maskable_, const std::optional<Tensor>& cu_seqlens,
             const Tensor& xt_, const Tensor& mask_, int64_t mask_index_)
      : sequences(x0_, cu_seqlens),
        x0(data<int64_t>(x0_)),
        maskable(data<bool>(maskable_)),
        xt(mutable_data<int64_t>(xt_)),
        mask(mutable_data<bool>(mask_)),
        mask_index(mask_index_) {}

  int64_t num_maskable(int64_t b) const {
    const int64_t begin = sequences.begin(b), size = sequences.size(b);
    return maskable ? std::count(maskable + begin, maskable + begin + size, true) : size;
  }

  void operator()(int64_t b, int64_t m, const Stream& stream, std::vector<uint32_t>& draws) const {
    const int64_t begin = sequences.begin(b), size = sequences.size(b);
    draw_row(stream, size, draws);
    std::vector<uint64_t> keys;
    keys.reserve(size);
    for (int64_t i = 0; i < size; ++i)
      if (!maskable || maskable[begin + i]) keys.push_back(uint64_t{draws[i]} << 32 | static_cast<uint64_t>(i));
    std::nth_element(keys.begin(), keys.begin() + m, keys.end());
    std::copy_n(x0 + begin, size, xt + begin);
    std::fill_n(mask + begin, size, false);
    for (int64_t k = 0; k < m; ++k) {
      const int64_t i = begin + static_cast<int64_t>(keys[k] & 0xFFFFFFFF);
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
  Sequences(x0, std::nullopt).for_each([&](int64_t b, std::vector<uint32_t>& draws) {
    draw_row(names.stream(kMask, b), length, draws);
    for (int64_t i = 0; i < length; ++i) {
      const int64_t at = b * length + i;
      masked[at] = draws[i] < threshold(b, i) && (!allowed || allowed[at]);
      to[at] = masked[at] ? mask_index : from[at];
    }
  });
  return {xt, mask};
}

std::tuple<Tensor, Tensor> mask_exactly(Tensor x0, Tensor counts, std::optional<Tensor> maskable,
                                        std::optional<Tensor> cu_seqlens, Tensor seed, Tensor steps, Tensor sample_ids,
                                        int64_t mask_index) {
  Tensor xt = torch::stable::empty_like(x0), mask = empty_mask(x0);
  const Names names(seed, steps, sample_ids);
  const SubsetMask subset(x0, maskable, cu_seqlens, xt, mask, mask_index);
  const int64_t* m = data<int64_t>(counts);
  for (int64_t b = 0; b < subset.sequences.count; ++b)
    if (const int64_t most = subset.num_maskable(b); m[b] < 0 || m[b] > most)
      bad_value("counts: expected numbers in [0, maskable positions], here ", most, ", got ", m[b], " at [", b, "]");
  subset.sequences.for_each(
      [&](int64_t b, std::vector<uint32_t>& draws) { subset(b, m[b], names.stream(kSubset, b), draws); });
  return {xt, mask};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> harmonic_mask(Tensor x0, std::optional<Tensor> maskable,
                                                         std::optional<Tensor> cu_seqlens, Tensor seed, Tensor steps,
                                                         Tensor sample_ids, int64_t mask_index) {
  Tensor xt = torch::stable::empty_like(x0), mask = empty_mask(x0);
  const Names names(seed, steps, sample_ids);
  const SubsetMask subset(x0, maskable, cu_seqlens, xt, mask, mask_index);
  const int64_t batch = subset.sequences.count;
  Tensor counts = torch::stable::new_empty(x0, {batch});
  Tensor weight = torch::stable::new_empty(x0, {batch}, ScalarType::Double);
  int64_t* m = mutable_data<int64_t>(counts);
  double* norm = mutable_data<double>(weight);
  int64_t longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    m[b] = subset.num_maskable(b);  // for now
    if (m[b] == 0) bad_value("maskable: expected at least one position in each sequence, got 0 at [", b, "]");
    longest = std::max(longest, m[b]);
  }
  std::vector<double> harmonic(longest + 1, 0.0);  // H_m
  for (int64_t k = 1; k <= longest; ++k) harmonic[k] = harmonic[k - 1] + 1.0 / static_cast<double>(k);

  subset.sequences.for_each([&](int64_t b, std::vector<uint32_t>& draws) {
    norm[b] = harmonic[m[b]];
    // The first m with draw < round(2^32 H_m / H_L).
    const uint32_t draw = names.stream(kCount, b)(0);
    const auto below = [&](uint32_t d, double h) {
      return d < static_cast<uint64_t>(std::nearbyint(h / norm[b] * kTwo32));
    };
    m[b] = std::upper_bound(harmonic.begin() + 1, harmonic.begin() + m[b], draw, below) - harmonic.begin();
    subset(b, m[b], names.stream(kSubset, b), draws);
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
  Sequences(x0, std::nullopt).for_each([&](int64_t b, std::vector<uint32_t>& draws) {
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
