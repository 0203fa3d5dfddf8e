// A row as the block that draws from it reads it: a thread meets ids of the same few classes all along.
#pragma once

#include "../row_sample.h"
#include "row.h"
#include "rows.h"

namespace fastdiff {

constexpr int kThreads = 256;

struct RowSample {
  Rows rows;
  const int64_t* xt;
  const bool* live;
  const ReverseLaw* law;   // or null
  const int64_t* exclude;  // num_excluded of them
  const int64_t *seed, *step, *sample_ids, *positions;
  int64_t *tokens, *argmax;  // argmax and stats are both null or neither
  float* stats;              // [3, rows]
  int num_excluded;
  bool greedy;
  float scale;  // log2(e) / temperature; at temperature 1 if greedy
  float top_k, top_p;

  FASTDIFF_HD bool truncates() const { return top_k > 0 || top_p < 1; }
};

// Threads of a block. A thread is to meet only ids of kVec classes: either all of them stride over whole rounds of the
// classes, or none has more than one group.
template <typename T>
int threads_for(int num_states) {
  constexpr int kVec = 16 / sizeof(T);
  static_assert(kThreads * kVec % kClasses == 0);
  return std::min((num_states / kVec + 2 + 31) / 32 * 32, kThreads);
}

// A row in aligned groups of 16 bytes, of which the first and the last may not be whole. Ids that are left out, and
// those beside the row, are read as `absent`.
template <typename T>
struct Walk {
  static constexpr int kVec = 16 / sizeof(T);
  static constexpr int kAhead = 2;  // loads of a thread before the first is used

  const T* z;
  int num_states, before;  // numbers in the first group that are before the row
  const int64_t* exclude;
  int num_excluded, apart;  // x_t if it is left out as well, or -1
  bool leaves_out;          // whether this thread does

  __device__ Walk(const RowSample& op, int64_t r)
      : z(op.rows.row<T>(r)),
        num_states(op.rows.num_states),
        before(static_cast<int>(reinterpret_cast<uintptr_t>(z) % 16 / sizeof(T))),
        exclude(op.exclude),
        num_excluded(op.num_excluded),
        apart(op.law && op.xt[r] >= 0 && op.xt[r] < num_states ? static_cast<int>(op.xt[r]) : -1),
        leaves_out(false) {
#pragma unroll 1
    for (int i = 0; i <= num_excluded; ++i) leaves_out |= has(left_out(i));
  }

  __device__ int left_out(int i) const { return i < num_excluded ? static_cast<int>(exclude[i]) : apart; }

  // NaN where there is no such id, or where it is left out.
  __device__ float number(int id) const {
    bool exists = id >= 0 && id < num_states;
#pragma unroll 1
    for (int i = 0; i <= num_excluded; ++i) exists &= left_out(i) != id;
    return exists ? load(z[id]) : NAN;
  }

  // Calls f(few) for this thread's groups: the whole ones in order, then the others.
  template <typename F>
  __device__ void each(float absent, const F& f) const {
    const int step = blockDim.x * kVec, mine = threadIdx.x * kVec - before, end = num_states - kVec;
    for (int first = mine < 0 ? mine + step : mine; first <= end; first += kAhead * step) {
      uint4 raw[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (first + k * step <= end) raw[k] = *reinterpret_cast<const uint4*>(z + first + k * step);
#pragma unroll
      for (int k = 0; k < kAhead; ++k)
        if (first + k * step <= end) visit(Row<T>::unpacked(raw[k]), first + k * step, absent, f);
    }
    const int tail = (before + num_states) / kVec * kVec - before;
#pragma unroll 1
    for (int i = 0; i < 2; ++i) {
      const int first = i == 0 ? -before : tail;
      if ((i == 0) == (first < 0) && has(first)) visit(ragged(first, absent), first, absent, f);
    }
  }

 private:
  // Whether an id's group is this thread's.
  __device__ bool has(int id) const { return static_cast<unsigned>(id + before) / kVec % blockDim.x == threadIdx.x; }

  template <typename F>
  __device__ void visit(Few<kVec> few, int first, float absent, const F& f) const {
    few.first = first;
    if (leaves_out) leave_out(few, absent);
    f(few);
  }

  __device__ Few<kVec> ragged(int first, float absent) const {
    Few<kVec> few;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const int id = first + i;
      few.x[i] = id >= 0 && id < num_states ? load(z[id]) : absent;
    }
    return few;
  }

  __device__ void leave_out(Few<kVec>& few, float absent) const {
#pragma unroll 1
    for (int i = 0; i <= num_excluded; ++i) few.set(left_out(i), left_out(i), absent);
  }
};

}  // namespace fastdiff
