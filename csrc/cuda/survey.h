// The first read of a row that is drawn from: the sums of its classes, its largest numbers and its moments.
#pragma once

#include <climits>
#include <cmath>

#include "law.h"
#include "reduce.h"
#include "walk.h"

namespace fastdiff {

constexpr float kLowest = Online().m;  // a maximum to start from
constexpr float kLog2E = 1.44269504f;

// exp((z - top) / temperature) of some numbers, with a maximum that they may raise; scale is log2(e) / temperature.
template <int kVec>
struct Exps {
  float top, d[kVec], e[kVec];  // d = z - top

  __device__ Exps(const Few<kVec>& few, float scale, float top_before) : top(top_before) {
    for (const float z : few.x) top = fmaxf(top, z);
    for (int i = 0; i < kVec; ++i) {
      d[i] = few.x[i] - top;
      e[i] = exp2_(d[i] * scale);
    }
  }
};

// Sums of a thread's own classes.
template <int kVec>
struct Lanes {
  float top = kLowest, s[kVec] = {};

  __device__ void add(const Exps<kVec>& exps, float scale) {
    const float factor = exp2_((top - exps.top) * scale);
    top = exps.top;
    for (int i = 0; i < kVec; ++i) s[i] = fmaf(s[i], factor, exps.e[i]);
  }

  __device__ float total() const {
    float sum = 0;
    for (const float of_class : s) sum += of_class;
    return sum;
  }
};

// At temperature 1, the sums of e = exp(z - top) and of e (z - top).
struct Moments {
  static constexpr float kLeast = -100;  // its exponential is 0, and 0 times it is too
  float top = kLowest, s = 0, dot = 0;

  template <int kVec>
  __device__ void add(const Exps<kVec>& exps) {
    *this = moved(exps.top);
    for (int i = 0; i < kVec; ++i) {
      s += exps.e[i];
      dot = fmaf(exps.e[i], fmaxf(exps.d[i], kLeast), dot);
    }
  }

  __device__ Moments moved(float to) const {
    const float step = fmaxf(top - to, kLeast), factor = exp_(step);
    return {to, s * factor, fmaf(step, s, dot) * factor};
  }
};

struct MergeMoments {
  __device__ Moments operator()(const Moments& a, const Moments& b) const {
    const float top = fmaxf(a.top, b.top);
    const Moments x = a.moved(top), y = b.moved(top);
    return {top, x.s + y.s, x.dot + y.dot};
  }
};

// The largest two numbers, and the first id of the first group that holds the largest.
struct Largest {
  float first = -INFINITY, second = -INFINITY;
  int group = 0;
};

struct MergeLargest {
  __device__ Largest operator()(const Largest& a, const Largest& b) const {
    const bool is_a = a.first > b.first || (a.first == b.first && a.group < b.group);
    return {fmaxf(a.first, b.first), fmaxf(fminf(a.first, b.first), fmaxf(a.second, b.second)),
            is_a ? a.group : b.group};
  }
};

template <int kVec>
__device__ Largest largest_of(const Few<kVec>& few) {
  Largest largest{few.x[0], -INFINITY, few.first};
  for (int i = 1; i < kVec; ++i) {
    largest.second = fmaxf(largest.second, fminf(largest.first, few.x[i]));
    largest.first = fmaxf(largest.first, few.x[i]);
  }
  return largest;
}

// What is known of a row: its largest number, what all weigh at the temperature, and with care more.
struct Survey {
  float top, all;
  Moments moments;
  Largest largest;
};

struct Higher {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

// A racer: the least is the first to arrive, or of those the one with the lowest id.
struct Entrant {
  float time = INFINITY;
  int id = INT_MAX;

  __device__ bool operator<(const Entrant& other) const {
    return time < other.time || (time == other.time && id < other.id);
  }
};

struct SampleShared {
  float classes[kClasses];
  Survey survey;  // here, not in the registers of all threads
  Room<float> top, all, mass;
  Room<Moments> moments;
  Room<Largest> largest;
  Room<Entrant> class_race, race;
  LawTerms terms;
  bool moves;
};

// The sums of classes as they lie in shared memory: lane by lane, so that neighbours write side by side.
template <typename T>
struct Classes {
  static constexpr unsigned kVec = 16 / sizeof(T), kTurn = kClasses / kVec;  // threads that share no class
  float* sums;
  int before;

  __device__ float operator[](int id) const {
    const unsigned lane = (id + before) % kClasses;
    return sums[lane % kVec * kTurn + lane / kVec];
  }

  // Adds up what the threads have, in a fixed order.
  __device__ void gather(const float (&s)[kVec], float factor) const {
    for (unsigned turn = 0; turn * kTurn < blockDim.x; ++turn) {
      if (threadIdx.x / kTurn == turn)
        for (unsigned i = 0; i < kVec; ++i) {
          float& sum = sums[i * kTurn + threadIdx.x % kTurn];
          sum = factor * s[i] + (turn == 0 ? 0 : sum);
        }
      __syncthreads();
    }
  }
};

// Reads a row, and leaves the sums of its classes.
template <bool kCareful, typename T>
__device__ void survey(const Walk<T>& row, float scale, const Classes<T>& classes, SampleShared& shared) {
  constexpr int kVec = Walk<T>::kVec;
  const bool tempered = scale != kLog2E;
  Lanes<kVec> lanes;
  Survey found;
  row.each(-INFINITY, [&](const Few<kVec>& few) {
    const float before = lanes.top;
    const Exps<kVec> exps(few, scale, before);
    lanes.add(exps, scale);
    if constexpr (kCareful) {
      found.moments.add(tempered ? Exps<kVec>(few, kLog2E, before) : exps);
      found.largest = MergeLargest()(found.largest, largest_of(few));
    }
  });
  found.top = reduce_block(lanes.top, shared.top, Higher());
  const float factor = exp2_((lanes.top - found.top) * scale);
  found.all = reduce_block(lanes.total() * factor, shared.all, Add());
  classes.gather(lanes.s, factor);
  if constexpr (kCareful) {
    found.moments = reduce_block(found.moments, shared.moments, MergeMoments());
    found.largest = reduce_block(found.largest, shared.largest, MergeLargest());
  }
  if (threadIdx.x == 0) shared.survey = found;
  __syncthreads();
}

}  // namespace fastdiff
