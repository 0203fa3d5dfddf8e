// Tokens drawn from rows on the GPU. A block reads a row from memory once, and races its classes, then the ids of one.
// Twin of fastdiff/kernels/row_sample.py.
#include <algorithm>
#include <cfloat>
#include <climits>
#include <cmath>
#include <type_traits>

#include "operators.h"
#include "weights.h"

namespace fastdiff {
namespace {

// Whether x_t is replaced under its law; `weight` is then how.
template <typename T>
__device__ bool moves(const RowSample& op, const Walk<T>& row, int64_t r, Weight& weight, SampleShared& shared) {
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
                    SampleShared& shared) {
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
__device__ int drawn(const RowSample& op, const Walk<T>& row, int64_t r, SampleShared& shared) {
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
  SampleShared& shared = *reinterpret_cast<SampleShared*>(memory);
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
    const size_t shared = sizeof(SampleShared) + (op.truncates() ? sizeof(Digits) : 0);
    const auto kernel = careful ? row_sample_kernel<T, true> : row_sample_kernel<T, false>;
    launch(kernel, z, Grid{xt.numel(), threads_for<T>(op.rows.num_states), shared}, op);
  });
}

}  // namespace fastdiff
