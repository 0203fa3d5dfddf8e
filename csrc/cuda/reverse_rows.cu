// Laws of reverse steps as rows of probabilities on the GPU. A row is read from memory once, by a cluster of blocks
// that holds it in shared memory. Twin of fastdiff/kernels/reverse_rows.py.
#include "law.h"
#include "operators.h"
#include "rows.h"

namespace fastdiff {
namespace {

struct ReverseRows {
  Rows rows;
  const int64_t* xt;
  const bool* live;
  const ReverseLaw* law;
  float* probs;
  int units;
};

// Of an id other than x_t: exp(z - origin) unit - cut, if that is positive; and of x_t.
struct Probs {
  float origin, unit, cut, at_xt;

  __device__ float operator()(float z) const {
    const float p = fmaf(exp_(z - origin), unit, -cut);
    return p < 0 ? 0 : p;
  }
};

struct Shared {
  uint64_t barriers[Copies::kParts];
  LawTerms terms;
  Probs probs;
  Room<Online> online;
  Room<float> jumps;
};
constexpr size_t kShared = (sizeof(Shared) + 15) / 16 * 16;

// The sum of exp(z) over all ids but x_t.
template <typename T>
__device__ Online sum_others(const Row<T>& row, int xt, Shared& shared) {
  Online all;
  row.each([&](auto& few) {
    few.set(xt, xt, -INFINITY);
    all.add(few);
  });
  Cluster::wait();
  return reduce_cluster(all, shared.online, MergeOnline());
}

// The sum of (exp(z) - cut)+ over them, for a cut above 0, which leaves nothing of -inf.
template <typename T>
__device__ float sum_jumps(const Row<T>& row, int xt, Shared& shared) {
  const Probs jump{shared.terms.shift, 1, static_cast<float>(shared.terms.cut), 0};
  float sum = 0;
  row.each([&](auto& few) {
    few.set(xt, xt, -INFINITY);
    for (const float z : few.x) sum += jump(z);
  });
  return reduce_cluster(sum, shared.jumps, Add());
}

// From what the jumps weigh together. Where nothing weighs anything, x_t stays; a row without a law is NaN.
__device__ Probs probs_of(const LawTerms& terms, double theta, float m, double jumps) {
  const double mass = terms.total > 0 ? terms.stay + jumps : NAN;
  if (mass == 0) return {0, 0, 0, 1};
  const bool apart = theta == 0;  // then the jumps may all be far below x_t, and x_t not stay
  return {apart ? m : terms.shift, static_cast<float>((apart ? terms.top : 1) / mass),
          static_cast<float>(terms.cut / mass), static_cast<float>(terms.stay / mass)};
}

template <typename T>
__device__ void write_law(const ReverseRows& op, const Row<T>& row, const Target<float>& to, int64_t r, int xt,
                          Shared& shared) {
  const ReverseLaw& law = op.law[r];
  const Online others = sum_others(row, xt, shared);
  if (threadIdx.x == 0) shared.terms = law_terms(law, xt >= 0, xt >= 0 ? load(row.z[xt]) : 0, others);
  __syncthreads();
  const float jumps = law.theta > 0 ? sum_jumps(row, xt, shared) : 0;
  if (threadIdx.x == 0) {
    const LawTerms& terms = shared.terms;
    const double uncut = terms.others - terms.cut * (row.num_states - 1);
    shared.probs = probs_of(terms, law.theta, others.m, law.theta > 0 ? jumps : uncut);
  }
  __syncthreads();
  const Probs probs = shared.probs;
  row.each([&](auto& few) {
    for (float& z : few.x) z = probs(z);
    few.set(xt, xt, probs.at_xt);
    to.put(few);
  });
}

template <typename T>
__global__ void __launch_bounds__(512) reverse_rows_kernel(const __grid_constant__ ReverseRows op) {
  FASTDIFF_SHARED(memory);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int64_t r = blockIdx.x / Cluster::size();
  const bool live = op.live[r], exists = op.xt[r] >= 0 && op.xt[r] < op.rows.num_states;
  const int xt = exists ? static_cast<int>(op.xt[r]) : -1;
  const Copies copies(shared.barriers);
  const Row<T> row(op.rows.row<T>(r), op.rows.num_states, copies, reinterpret_cast<uint4*>(memory + kShared),
                   live ? op.units : -1);
  const Target<float> to(op.probs + r * op.rows.num_states, row.head);
  if (live) {
    Cluster::arrive();
    write_law(op, row, to, r, xt, shared);
  } else {
    row.each_unread([&](auto&& few) {
      few.set(xt, xt, 1);
      to.put(few);
    });
  }
}

}  // namespace

void launch_reverse_rows(Tensor z, Tensor xt, Tensor live, Tensor law, Tensor probs) {
  const Shape shape = shape_of(z.size(-1) * z.element_size(), limits().shared - kShared);
  const ReverseRows op{
      Rows(z), data<int64_t>(xt), data<bool>(live), data<ReverseLaw>(law), mutable_data<float>(probs), shape.units};
  const Grid grid{xt.numel() * shape.cluster, shape.threads, kShared + shape.room(), shape.cluster};
  with_type(z, [&](auto number) { launch(reverse_rows_kernel<decltype(number)>, z, grid, op); });
}

}  // namespace fastdiff
