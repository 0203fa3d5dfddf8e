// Reads of a row that follow the first, from the second-level cache: what its numbers weigh in the race.
#pragma once

#include <cfloat>
#include <cmath>
#include <type_traits>

#include "survey.h"

namespace fastdiff {

// What a number weighs in the race: e = 2^((z - top) scale), and nothing if it is below `least` or NaN, which stands
// for no id. Under a law that cuts it is ((e - cut)+ / 2^log_largest)^power.
struct Weight {
  float scale, top, least = -INFINITY, cut = 0, log_largest = 0, power = 1;

  __device__ float operator()(float z) const {
    const float w = fmaxf(exp2_((z - top) * scale) - cut, 0.0f);
    if (!(z >= least)) return 0;
    return power == 1 ? w : exp2_((log2f(w) - log_largest) * power);
  }
};

template <typename T>
__device__ float mass(const Walk<T>& row, const Weight& weight, Room<float>& room) {
  float sum = 0;
  row.each(NAN, [&](const auto& few) {
    for (const float z : few.x) sum += weight(z);
  });
  __syncthreads();  // the last sum has been read
  return reduce_block(sum, room, Add());
}

template <typename T>
__device__ void sum_classes(const Walk<T>& row, const Weight& weight, const Classes<T>& classes) {
  constexpr int kVec = Walk<T>::kVec;
  float s[kVec] = {};
  row.each(NAN, [&](const Few<kVec>& few) {
    for (int i = 0; i < kVec; ++i) s[i] += weight(few.x[i]);
  });
  classes.gather(s, 1);
}

// Numbers of a type as integers in the same order: their bits as floats, less those that are always 0.
template <typename T>
struct Keys {
  static constexpr int kZeros = std::is_same_v<T, float> ? 0 : std::is_same_v<T, BFloat16> ? 16 : 13;

  static __device__ int ordered(int bits) { return bits ^ (bits >> 31 & 0x7FFFFFFF); }
  static __device__ int key(float x) { return ordered(bit_cast<int>(x)) >> kZeros; }
  static __device__ float number(int key) { return bit_cast<float>(ordered(key * (1 << kZeros))); }
};

// What numbers weigh by a digit of their keys, in integers, whose sums are the same in any order: of two words each, as
// shared memory adds them. Then what is found there.
struct Digits {
  static constexpr int kBits = 11, kMany = 1 << kBits;
  uint32_t low[kMany], high[kMany];
  uint64_t parts[kThreads];
  uint64_t rest;
  uint32_t found;

  __device__ void clear() {
    for (int i = threadIdx.x; i < kMany; i += blockDim.x) low[i] = high[i] = 0;
    __syncthreads();
  }

  __device__ void add(uint32_t digit, uint64_t weight) {
    const auto part = static_cast<uint32_t>(weight);
    const uint32_t before = atomicAdd(&low[digit], part), carry = part > ~before;
    const uint32_t upper = static_cast<uint32_t>(weight >> 32) + carry;
    if (upper != 0) atomicAdd(&high[digit], upper);
  }

  __device__ uint64_t at(int digit) const { return uint64_t{high[digit]} << 32 | low[digit]; }

  // Finds the largest digit from which on they weigh `least` and a share of all, or all if that is less; and the rest,
  // what its own are to weigh. Threads have parts of the digits, the first the largest.
  __device__ void find(uint64_t least, double share) {
    __syncthreads();
    const int size = (kMany + blockDim.x - 1) / blockDim.x, end = kMany - size * static_cast<int>(threadIdx.x);
    const int begin = end < size ? 0 : end - size;
    uint64_t mine = 0, before = 0, all = 0;
#pragma unroll 1
    for (int digit = begin; digit < end; ++digit) mine += at(digit);
    parts[threadIdx.x] = mine;
    __syncthreads();
#pragma unroll 1
    for (unsigned i = 0; i < blockDim.x; ++i) {
      before += i < threadIdx.x ? parts[i] : 0;
      all += parts[i];
    }
    const uint64_t wanted = least + static_cast<uint64_t>(std::ceil(share * all)), target = wanted < all ? wanted : all;
    if (before < target && target <= before + mine) {
      int digit = end - 1;
      for (; before + at(digit) < target; --digit) before += at(digit);
      found = digit, rest = target - before;
    }
    __syncthreads();
  }
};

// The largest number from which on they weigh `least` (where 1 is `unit`) and a share of all: with each read a digit of
// its key.
template <typename T>
__device__ float reach(const Walk<T>& row, const Weight& weight, float unit, uint64_t least, double share,
                       Digits& digits) {
  constexpr int kBits = 32 - Keys<T>::kZeros;
  constexpr uint32_t kHalf = 1u << (kBits - 1);
  uint32_t found = 0;
#pragma unroll 1
  for (int shift = kBits; shift > 0;) {
    const int before = shift, bits = shift < Digits::kBits ? shift : Digits::kBits;
    shift -= bits;
    digits.clear();
    row.each(NAN, [&](const auto& few) {
      for (const float z : few.x) {
        const uint32_t key = static_cast<uint32_t>(Keys<T>::key(z)) + kHalf;
        const auto units = static_cast<uint64_t>(weight(z) * unit);
        if (units > 0 && uint64_t{key} >> before == found) digits.add(key >> shift & ((1u << bits) - 1), units);
      }
    });
    digits.find(least, share);
    found = found << bits | digits.found;
    least = digits.rest, share = 0;
  }
  return Keys<T>::number(static_cast<int>(found - kHalf));
}

// From which number on top_k and then top_p keep ids.
template <typename T>
__device__ float least_kept(const RowSample& op, const Walk<T>& row, Weight weight, Digits& digits) {
  Weight one{0, 0};  // what they weigh is how many they are
  one.least = weight.least = -FLT_MAX;
  if (op.top_k > 0) weight.least = reach(row, one, 1, static_cast<uint64_t>(op.top_k), 0, digits);
  if (op.top_p < 1) weight.least = reach(row, weight, 0x1p40f, 0, op.top_p, digits);
  return weight.least;
}

}  // namespace fastdiff
