// A row in memory, and sums over its numbers.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../row_loss.h"

namespace fastdiff {

// Numbers summed in the working type before a sum goes into double. Loops with sanitizers have no lanes to share a sum.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kBlock = 64;
#else
constexpr int64_t kBlock = 1024;
#endif

// The type that numbers stored as T are computed in.
template <typename T>
using Acc = decltype(load(T()));

template <typename C>
constexpr C kInfinity = std::numeric_limits<C>::infinity();

// A row, the place of its gradient, which may be its own, and the ids that are treated apart.
template <typename T>
struct Row {
  const T* z;
  T* grad;
  int64_t num_states;
  Apart apart;

  FASTDIFF_HD double number(int64_t id) const { return load(z[id]); }

  // Calls f(first, n) for runs of at most kBlock of the other ids, in rising order.
  template <typename F>
  FASTDIFF_HD void for_each_run(const F& f) const {
    const int64_t a = apart.x0, b = apart.left_out, c = apart.xt;
    const int64_t low = std::min({a, b, c}), high = std::max({a, b, c});
    const int64_t mid = std::max(std::min(a, b), std::min(std::max(a, b), c)), ids[] = {low, mid, high, num_states};
    int64_t first = 0;
    for (const int64_t id : ids) {
      for (; first < id; first += kBlock) f(first, std::min(kBlock, id - first));
      first = std::max<int64_t>(id + 1, 0);
    }
  }
};

// A block in the type it is computed in: itself, or a copy in the buffer.
template <typename C, typename T>
FASTDIFF_HD const C* widened(const T* from, int64_t n, C* buffer) {
  if constexpr (std::is_same_v<C, T>) {
    return from;
  } else {
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) buffer[v] = load(from[v]);
    return buffer;
  }
}

// to = scale * from, where both may be one place; in double if the scale leaves the range of float.
template <typename C, typename T>
FASTDIFF_HD void store_scaled(T* to, const C* from, int64_t n, double scale) {
  const auto narrow = static_cast<C>(scale);
  if (std::isnormal(narrow) || scale == 0) {
#pragma omp simd
    for (int64_t v = 0; v < n; ++v) store(to + v, static_cast<Acc<T>>(narrow * from[v]));
  } else {
    for (int64_t v = 0; v < n; ++v) store(to + v, static_cast<Acc<T>>(scale * from[v]));
  }
}

template <typename C>
struct Block {
  C sum, max;  // of the terms, and of the numbers themselves
};

// Numbers that one load gives, side by side in a row: two BFloat16 are halves of a word, which no shuffle takes apart.
template <typename T>
constexpr int64_t kLoaded = std::is_same_v<T, BFloat16> ? 2 : 1;

// The j-th of them. A struct of both would be kept in memory, lane by lane, where GCC gives up on taking it apart.
template <typename T>
FASTDIFF_HD Acc<T> load_one_of(const T* from, int64_t) {
  return load(*from);
}

FASTDIFF_HD float load_one_of(const BFloat16* from, int64_t j) {
  uint32_t word;
  std::memcpy(&word, from, sizeof(word));
  return bit_cast<float>(j == 0 ? word << 16 : word & 0xFFFF0000);
}

// The sum of term(x) of a block; with kKeep also their derivatives.
template <bool kKeep, typename F, typename T, typename C>
FASTDIFF_HD Block<C> sum_terms(const F& term, const T* from, C* kept, int64_t n) {
  if constexpr (std::is_same_v<T, Float16>) {  // which is widened in more steps, of 16 bits each where they can be
    float in[kBlock];
    return sum_terms<kKeep>(term, widened(from, n, in), kept, n);
  }
  constexpr int64_t kMany = kLoaded<T>;
  C sum = 0, least = kInfinity<C>;  // of the negatives: GCC takes no maximum of floats that are made from a word
#pragma omp simd reduction(+ : sum) reduction(min : least)
  for (int64_t v = 0; v < n / kMany; ++v) {
    for (int64_t j = 0; j < kMany; ++j) {
      const C x = static_cast<C>(load_one_of(from + kMany * v, j));
      const Term<C> t = term(x);
      sum += t.value;
      least = -x < least ? -x : least;  // std::min would not vectorise
      if constexpr (kKeep) kept[kMany * v + j] = t.slope;
    }
  }
  Block<C> block{sum, -least};
  if constexpr (kMany > 1) {
    if (n % kMany) {
      const C last = load(from[n - 1]);
      const Block<C> rest = sum_terms<kKeep>(term, &last, kKeep ? kept + n - 1 : kept, 1);
      block.sum += rest.sum, block.max = rest.max > block.max ? rest.max : block.max;
    }
  }
  return block;
}

}  // namespace fastdiff
