// The forward process on the CPU: masks, exact-count and harmonic masks, uniform noise. x0 is int64 [B, L].
#include <algorithm>
#include <vector>

#include "draws.h"
#include "isa.h"
#include "operators.h"

namespace fastdiff {
namespace {

constexpr int64_t kBlock = 1024;  // draws made together, a multiple of 4

// What names the draws of each sequence.
struct Names {
  const int64_t *seed, *steps, *sample_ids;

  Names(const Tensor& seed_, const Tensor& steps_, const Tensor& sample_ids_)
      : seed(data<int64_t>(seed_)), steps(data<int64_t>(steps_)), sample_ids(data<int64_t>(sample_ids_)) {}

  Stream stream(Purpose purpose, int64_t b) const { return {*seed, purpose, steps[b], sample_ids[b], 0}; }
};

// Noise for each token by itself, with probabilities p [B, L] of any strides; a null mask is not wanted. Loops over
// bool do not vectorise, so masks are bytes of 0 and 1.
struct TokenNoise {
  Names names;
  int64_t length, stride_b, stride_l;
  const int64_t* x0;
  const double* p;
  const uint8_t* maskable;
  int64_t* xt;
  uint8_t* mask;

  TokenNoise(const Names& names_, const Tensor& x0_, const Tensor& p_, const std::optional<Tensor>& maskable_,
             const Tensor& xt_, const std::optional<Tensor>& mask_)
      : names(names_),
        length(x0_.size(1)),
        stride_b(p_.stride(0)),
        stride_l(p_.stride(1)),
        x0(data<int64_t>(x0_)),
        p(data<double>(p_)),
        maskable(data<uint8_t>(maskable_)),
        xt(mutable_data<int64_t>(xt_)),
        mask(mask_ ? mutable_data<uint8_t>(*mask_) : nullptr) {
    for (int64_t b = 0; b < x0_.size(0); ++b)
      for (int64_t i = 0; i < (stride_l ? length : std::min<int64_t>(length, 1)); ++i)
        if (const double value = p[b * stride_b + i * stride_l]; !(value >= 0 && value <= 1))
          bad_value("p: expected probabilities in [0, 1], got ", value, " at [", b, ", ", i, "]");
  }

  // hit[i] = draws[i] < p of token first + i
  FASTDIFF_HD void compare(const uint32_t* draws, int64_t b, int64_t first, int64_t n, uint8_t* hit) const {
    const double* from = p + b * stride_b + first * stride_l;
    if (stride_l == 0) {
      const uint64_t below = threshold(*from);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) hit[i] = draws[i] < below;
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) hit[i] = draws[i] < threshold(from[i * stride_l]);
    }
  }
};

FASTDIFF_HD void mask_row(const TokenNoise& op, int64_t b, int64_t mask_index) {
  const Stream stream = op.names.stream(kMask, b);
  uint32_t draws[kBlock];
  for (int64_t first = 0; first < op.length; first += kBlock) {
    const int64_t n = std::min(kBlock, op.length - first), at = b * op.length + first;
    draw_block(stream, first, n, draws);
    const int64_t* x0 = op.x0 + at;
    int64_t* xt = op.xt + at;
    uint8_t* mask = op.mask + at;
    op.compare(draws, b, first, n, mask);
    if (op.maskable) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) mask[i] &= op.maskable[at + i];
    }
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) xt[i] = mask[i] ? mask_index : x0[i];
  }
}

FASTDIFF_HD void redraw_row(const TokenNoise& op, int64_t b, int64_t num_states) {
  const Stream stream = op.names.stream(kMask, b), replace = op.names.stream(kReplace, b);
  uint32_t draws[kBlock];
  uint8_t hit[kBlock];
  for (int64_t first = 0; first < op.length; first += kBlock) {
    const int64_t n = std::min(kBlock, op.length - first), at = b * op.length + first;
    const int64_t* x0 = op.x0 + at;
    int64_t* xt = op.xt + at;
    draw_block(stream, first, n, draws);
    op.compare(draws, b, first, n, hit);
    draw_block(replace, first, n, draws);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) xt[i] = hit[i] ? scaled(draws[i], num_states) : x0[i];
  }
}

#define FASTDIFF_CORRUPT(SUFFIX, TARGET)                                                                               \
  TARGET void draw_row_##SUFFIX(const Stream& stream, int64_t n, uint32_t* draws) { draw_block(stream, 0, n, draws); } \
  TARGET void mask_row_##SUFFIX(const TokenNoise& op, int64_t b, int64_t mask_index) { mask_row(op, b, mask_index); }  \
  TARGET void redraw_row_##SUFFIX(const TokenNoise& op, int64_t b, int64_t num_states) {                               \
    redraw_row(op, b, num_states);                                                                                     \
  }
FASTDIFF_FOR_EACH_ISA(FASTDIFF_CORRUPT)

// Calls f(first, last) for ranges of sequences of about this length, several threads side by side.
template <typename F>
void for_each_range(int64_t count, int64_t length, const F& f) {
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(length, 1));
  torch::stable::parallel_for(0, count, grain, f);
}

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

  void operator()(int64_t b, int64_t m, const Stream& stream) const {
    const int64_t begin = sequences.begin(b), size = sequences.size(b);
    std::vector<uint32_t> draws((size + 3) / 4 * 4);
    FASTDIFF_FOR_ISA(draw_row, current_isa())(stream, size, draws.data());
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
  const TokenNoise op({seed, steps, sample_ids}, x0, p, maskable, xt, mask);
  const auto row = FASTDIFF_FOR_ISA(mask_row, current_isa());
  for_each_range(x0.size(0), op.length, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) row(op, b, mask_index);
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
  for_each_range(subset.sequences.count, subset.sequences.length, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) subset(b, m[b], names.stream(kSubset, b));
  });
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

  for_each_range(batch, subset.sequences.length, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) {
      norm[b] = harmonic[m[b]];
      // The first m with draw < H_m / H_L.
      const auto below = [&](uint32_t draw, double h) { return draw < threshold(h / norm[b]); };
      const uint32_t draw = names.stream(kCount, b)(0);
      m[b] = std::upper_bound(harmonic.begin() + 1, harmonic.begin() + m[b], draw, below) - harmonic.begin();
      subset(b, m[b], names.stream(kSubset, b));
    }
  });
  return {xt, mask, counts, weight};
}

// With probability p a token is redrawn from all num_states; it may stay.
Tensor uniform_tokens(Tensor x0, Tensor p, Tensor seed, Tensor steps, Tensor sample_ids, int64_t num_states) {
  Tensor xt = torch::stable::empty_like(x0);
  const TokenNoise op({seed, steps, sample_ids}, x0, p, std::nullopt, xt, std::nullopt);
  const auto row = FASTDIFF_FOR_ISA(redraw_row, current_isa());
  for_each_range(x0.size(0), op.length, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) row(op, b, num_states);
  });
  return xt;
}

}  // namespace fastdiff
