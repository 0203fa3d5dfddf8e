// A row of numbers as a cluster of blocks reads it: in groups of 16 bytes from its first aligned one, which the blocks
// share out, and single numbers at its two ends.
#pragma once

#include <algorithm>

#include "../element.h"
#include "launch.h"
#include "reduce.h"

namespace fastdiff {

// Consecutive numbers of a row, in the type they are computed in.
template <int kMany>
struct Few {
  static constexpr int kSize = kMany;
  float x[kMany];
  int first;  // id

  // A value in the place of two ids, if they are among these.
  __device__ void set(int id, int other, float value) {
    const auto i = static_cast<unsigned>(id - first), j = static_cast<unsigned>(other - first);
    if (i < kMany || j < kMany) {
#pragma unroll
      for (unsigned k = 0; k < kMany; ++k) x[k] = k == i || k == j ? value : x[k];
    }
  }
};

// How a row is shared out.
struct Shape {
  int cluster, threads, units;  // units of 16 bytes that a block has room for, or 0

  size_t room() const { return size_t{16} * units; }
};

constexpr int64_t kShare = 32 << 10;  // bytes of a row that a block takes, if clusters allow

// For a row of so many bytes, where a block may have `most` bytes of shared memory for its share. It depends on nothing
// but the row, so that the bits of a sum do not depend on what else is in the batch.
inline Shape shape_of(int64_t bytes, size_t most) {
  Shape shape{1, 32, 0};
  if (limits().clusters)
    while (shape.cluster < kMaxCluster && bytes > shape.cluster * kShare) shape.cluster *= 2;
  const int64_t units = (bytes / 16 + shape.cluster - 1) / shape.cluster;
  shape.threads = static_cast<int>(std::clamp<int64_t>((units + 255) / 256 * 32, 32, 512));  // 8 units a thread
  if (static_cast<size_t>(16 * units) <= most) shape.units = static_cast<int>(units);
  return shape;
}

template <typename T>
struct Row {
  static constexpr int kVec = 16 / sizeof(T);
  static constexpr int kAhead = 2;  // loads of a thread before the first is used

  const T* z;
  int num_states, head, first, last, edge;  // numbers before the first group; this block's groups; an id or -1
  bool held;
  int part_size;  // groups; a whole number of them for each thread
  const uint4* groups;
  const Copies& copies;

  // Starts to copy the block's groups to `room`, if there is room for `units` of them.
  __device__ Row(const T* z_, int num_states_, const Copies& copies_, uint4* room, int units)
      : z(z_), num_states(num_states_), copies(copies_) {
    const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(z) % 16 / sizeof(T));
    head = misaligned == 0 ? 0 : kVec - misaligned;
    head = head < num_states ? head : num_states;
    const int all = (num_states - head) / kVec, size = Cluster::size(), rank = Cluster::rank();
    const int share = (all + size - 1) / size, thread = threadIdx.x;
    first = share * rank < all ? share * rank : all;
    last = all - first < share ? all : first + share;
    const int tail = head + all * kVec + thread - kVec;  // the threads after the head's
    edge = rank == 0 && thread < head ? thread : -1;
    if (rank == size - 1 && thread >= kVec && tail < num_states) edge = tail;
    const auto* aligned = reinterpret_cast<const uint4*>(z + head);
    held = last - first <= units;
    const int threads = (held ? Copies::kParts : 1) * blockDim.x;
    part_size = (last - first + threads - 1) / threads * blockDim.x;
    groups = held ? room - first : aligned;
    if (!held) return;
    for (int part = 0; part < Copies::kParts; ++part) {
      const int begin = begin_of(part);
      copies.start(part, room + (begin - first), aligned + begin, begin_of(part + 1) - begin);
    }
  }

  // Whether an id is among the block's.
  __device__ bool has(int id) const {
    const int all = (num_states - head) / kVec;
    if (id < 0 || id >= num_states) return false;
    if (id < head) return Cluster::rank() == 0;
    if (id >= head + all * kVec) return Cluster::rank() == Cluster::size() - 1;
    return id >= head + first * kVec && id < head + last * kVec;
  }

  // Where a part of the block's groups begins.
  __device__ int begin_of(int part) const {
    const int begin = first + part * part_size;
    return begin < last ? begin : last;
  }

  // Calls f(few) for all numbers that this thread has: always the same ones, so that f may write where they came from.
  template <typename F>
  __device__ void each(const F& f) const {
    for (int part = 0; part < (held ? Copies::kParts : 1); ++part) {
      if (held) copies.wait(part);
      const int end = begin_of(part + 1), step = blockDim.x;
      for (int g = begin_of(part) + threadIdx.x; g < end; g += kAhead * step) {
        uint4 raw[kAhead];
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
          if (g + k * step < end) raw[k] = groups[g + k * step];
#pragma unroll
        for (int k = 0; k < kAhead; ++k)
          if (g + k * step < end) {
            Few<kVec> few = unpacked(raw[k]);
            few.first = head + (g + k * step) * kVec;
            f(few);
          }
      }
    }
    if (edge >= 0) {
      Few<1> few{{load(z[edge])}, edge};
      f(few);
    }
  }

  // The same of numbers that are not read.
  template <typename F>
  __device__ void each_unread(const F& f) const {
    for (int g = first + threadIdx.x; g < last; g += blockDim.x) f(Few<kVec>{{}, head + g * kVec});
    if (edge >= 0) f(Few<1>{{}, edge});
  }

  static __device__ Few<kVec> unpacked(const uint4& raw) {
    T stored[kVec];
    memcpy(stored, &raw, 16);
    Few<kVec> few;
#pragma unroll
    for (int i = 0; i < kVec; ++i) few.x[i] = load(stored[i]);
    return few;
  }
};

// Where results go that are as many as the row's numbers, of any type: 16 bytes at a time where they lie right for it.
template <typename T>
struct Target {
  T* to;
  bool aligned;  // as the row's groups are

  __device__ Target(T* to_, int head) : to(to_), aligned(reinterpret_cast<uintptr_t>(to_ + head) % 16 == 0) {}

  template <int kMany>
  __device__ void put(const Few<kMany>& few) const {
    constexpr int kUnits = kMany * sizeof(T) / 16;
    T stored[kMany];
#pragma unroll
    for (int i = 0; i < kMany; ++i) store(stored + i, few.x[i]);
    if (kUnits > 0 && aligned) {
      auto* units = reinterpret_cast<uint4*>(to + few.first);
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        uint4 unit;
        memcpy(&unit, stored + i * (16 / sizeof(T)), 16);
        units[i] = unit;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kMany; ++i) to[few.first + i] = stored[i];
    }
  }
};

}  // namespace fastdiff
