// Tokens drawn from rows on the GPU. A block reads a row from memory once, and races its classes, then the ids of one.
// Twin of fastdiff/kernels/row_sample.py.
#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <type_traits>

#include "law.h"
#include "operators.h"
#include "walk.h"

namespace fastdiff {
namespace {

// ---------------------------------------------------------------------------------------------------------
// The first read.

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

struct Shared {
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
__device__ void survey(const Walk<T>& row, float scale, const Classes<T>& classes, Shared& shared) {
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

// ---------------------------------------------------------------------------------------------------------
// Reads that follow, from the second-level cache.

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

// ---------------------------------------------------------------------------------------------------------
// The draw.

// Whether x_t is replaced under its law; `weight` is then how.
template <typename T>
__device__ bool moves(const RowSample& op, const Walk<T>& row, int64_t r, Weight& weight, Shared& shared) {
  const ReverseLaw& law = op.law[r];
  if (threadIdx.x == 0) {
    const int xt = row.apart;
    float at_xt = xt >= 0 ? load(row.z[xt]) : 0;
    for (int i = 0; i < row.num_excluded; ++i) at_xt = row.left_out(i) == xt ? -INFINITY : at_xt;
    shared.terms = law_terms(law, xt >= 0, at_xt, {shared.survey.moments.top, shared.survey.moments.s});
  }
  __syncthreads();
  const LawTerms& terms = shared.terms;
  double jump = terms.others;
  if (law.theta != 0) {
    weight = {kLog2E, terms.shift, -INFINITY, static_cast<float>(terms.cut)};
    jump = mass(row, weight, shared.mass);
    weight.log_largest = log2f(static_cast<float>(terms.top - terms.cut));
    weight.power = op.scale / kLog2E;
  }
  if (threadIdx.x == 0) {
    const double all = terms.stay + jump;
    const bool possible = terms.total > 0 && all < INFINITY && jump > 0 && (law.theta == 0 || terms.top > terms.cut);
    const Stream stream(*op.seed, kStep, *op.step, op.sample_ids[r], 0);
    shared.moves = possible && stream(static_cast<uint32_t>(op.positions[r])) >= threshold(terms.stay / all);
  }
  __syncthreads();
  return shared.moves;
}

// An id, from the sums of the classes.
template <typename T>
__device__ int race(const RowSample& op, const Walk<T>& row, int64_t r, const Classes<T>& classes, const Weight& weight,
                    Shared& shared) {
  const Stream stream(*op.seed, kRace, *op.step, op.sample_ids[r], static_cast<uint32_t>(op.positions[r]));
  const int last = row.num_states < kClasses ? row.num_states : kClasses;
  Entrant first;
  for (int group = threadIdx.x; 4 * group < last; group += blockDim.x) {
    const Words draws = stream.four(group);
    for (int i = 0, c = 4 * group; i < 4 && c < last; ++i, ++c)
      first = Least()(first, Entrant{exponential<float>(draws.w[i]) / classes[c], c});
  }
  const int winner = reduce_block(first, shared.class_race, Least()).id;
  first = {};
  for (int id = winner + threadIdx.x * kClasses; id < row.num_states; id += blockDim.x * kClasses)
    first = Least()(first, Entrant{exponential<float>(stream(id + kClasses)) / weight(row.number(id)), id});
  return reduce_block(first, shared.race, Least()).id;
}

template <typename T>
__device__ int first_of(const Walk<T>& row, const Largest& largest) {
  int id = largest.group;
  while (id < row.num_states && row.number(id) != largest.first) ++id;
  return id;
}

// An id, which thread 0 is to have, or -1: x_t stays.
template <bool kCareful, typename T>
__device__ int drawn(const RowSample& op, const Walk<T>& row, int64_t r, Shared& shared) {
  const Classes<T> classes{shared.classes, row.before};
  survey<kCareful>(row, op.scale, classes, shared);
  const Survey& found = shared.survey;
  Weight weight{op.scale, found.top};
  bool goes = found.all > 0 && found.all < INFINITY;
  if constexpr (kCareful) {
    if (op.law) goes = moves(op, row, r, weight, shared);
    if (!goes) return -1;
    if (op.greedy) return threadIdx.x == 0 ? first_of(row, found.largest) : -1;
    const bool truncates = op.truncates();
    if (truncates) weight.least = least_kept(op, row, weight, *reinterpret_cast<Digits*>(&shared + 1));
    if (truncates || weight.cut != 0) sum_classes(row, weight, classes);
  }
  return goes ? race(op, row, r, classes, weight, shared) : -1;
}

template <typename T>
__device__ void write_stats(const RowSample& op, const Walk<T>& row, int64_t r, int token, const Survey& found) {
  const auto p = [&](float z) { return exp_(z - found.moments.top) / found.moments.s; };
  const float all = found.moments.s, first = found.largest.first, second = found.largest.second;
  const int64_t rows = gridDim.x;
  op.argmax[r] = token < 0 ? op.xt[r] : first_of(row, found.largest);
  op.stats[r] = token < 0 ? 0 : p(load(row.z[token]));
  op.stats[rows + r] = token < 0 ? 0 : p(first) - p(second);
  op.stats[2 * rows + r] = token < 0 ? 0 : found.moments.dot / all - logf(all);
}

template <typename T, bool kCareful>
__global__ void __launch_bounds__(kThreads) row_sample_kernel(const __grid_constant__ RowSample op) {
  FASTDIFF_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int64_t r = blockIdx.x;
  const Walk<T> row(op, r);
  const int token = op.live[r] ? drawn<kCareful>(op, row, r, shared) : -1;
  if (threadIdx.x != 0) return;
  op.tokens[r] = token < 0 ? op.xt[r] : token;
  if constexpr (kCareful)
    if (op.stats) write_stats(op, row, r, token, shared.survey);
}

}  // namespace

void launch_row_sample(Tensor z, Tensor xt, Tensor live, std::optional<Tensor> law, std::optional<Tensor> exclude,
                       Tensor seed, Tensor step, Tensor sample_ids, Tensor positions, Tensor tokens,
                       std::optional<Tensor> argmax, std::optional<Tensor> stats, double temperature, int64_t top_k,
                       double top_p) {
  RowSample op{Rows(z)};
  op.xt = data<int64_t>(xt), op.live = data<bool>(live), op.law = data<ReverseLaw>(law);
  op.exclude = data<int64_t>(exclude), op.num_excluded = exclude ? static_cast<int>(exclude->numel()) : 0;
  op.seed = data<int64_t>(seed), op.step = data<int64_t>(step);
  op.sample_ids = data<int64_t>(sample_ids), op.positions = data<int64_t>(positions);
  op.tokens = mutable_data<int64_t>(tokens), op.argmax = argmax ? mutable_data<int64_t>(*argmax) : nullptr;
  op.stats = stats ? mutable_data<float>(*stats) : nullptr;
  op.greedy = temperature == 0;
  op.scale = static_cast<float>(1.4426950408889634 / (op.greedy ? 1 : temperature));
  op.top_k = top_k < op.rows.num_states ? static_cast<float>(top_k) : 0;
  op.top_p = std::max(static_cast<float>(top_p), FLT_MIN);  // a share of something, so that one is kept
  with_type(z, [&](auto number) {
    using T = decltype(number);
    const bool careful = stats || law || op.greedy || op.truncates();
    const size_t shared = sizeof(Shared) + (op.truncates() ? sizeof(Digits) : 0);
    const auto kernel = careful ? row_sample_kernel<T, true> : row_sample_kernel<T, false>;
    launch(kernel, z, Grid{xt.numel(), threads_for<T>(op.rows.num_states), shared}, op);
  });
}

}  // namespace fastdiff
