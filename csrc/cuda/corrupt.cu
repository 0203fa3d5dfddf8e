// The forward process on the GPU, and the list of the rows that it leaves to score. Twin of csrc/cpu/corrupt.cpp, bit
// for bit: the draws are named, not sampled.
#include <algorithm>

#include "../philox.h"
#include "launch.h"
#include "operators.h"
#include "reduce.h"

namespace fastdiff {
namespace {

__device__ unsigned lane() { return threadIdx.x % 32; }
__device__ unsigned warp() { return threadIdx.x / 32; }

// What names the draws of each sequence.
struct Names {
  const int64_t *seed, *steps, *sample_ids;

  Names(const Tensor& seed_, const Tensor& steps_, const Tensor& sample_ids_)
      : seed(data<int64_t>(seed_)), steps(data<int64_t>(steps_)), sample_ids(data<int64_t>(sample_ids_)) {}

  __device__ Stream stream(Purpose purpose, int64_t b) const { return {*seed, purpose, steps[b], sample_ids[b], 0}; }
};

constexpr unsigned kTile = 128;  // positions whose draws a warp makes together, 4 a lane

// Where the i-th of a lane's 4 tokens of a tile is. Its loads are made 4 together, before any is waited for.
__device__ unsigned in_tile(unsigned first, int i) { return first + 32 * i + lane(); }

// Room of one warp, to trade the draws of a tile.
struct alignas(16) Trade {
  Words of_lane[32];
};

// One Philox call makes the draws of 4 neighbours. The lanes trade them, so that neighbouring lanes hold neighbouring
// tokens and reach memory in one piece, however it is aligned.
__device__ Words draw_tile(const Stream& stream, unsigned first, Trade& trade) {
  const Words neighbours = stream.four(first / 4 + lane());
  __syncwarp();  // the last tile's have been read
  trade.of_lane[lane()] = neighbours;
  __syncwarp();
  Words draws;
#pragma unroll
  for (int i = 0; i < 4; ++i) draws.w[i] = trade.of_lane[8 * i + lane() / 4].w[lane() % 4];
  return draws;
}

// Threads of a block, at most `most`, for a sequence or the part of it that they have draws for.
int threads_for(int64_t length, int64_t most) {
  const int64_t tiles = (length + kTile - 1) / kTile;
  return static_cast<int>(std::clamp<int64_t>(32 * tiles, 32, most));
}

// ---------------------------------------------------------------------------------------------------------
// Noise for each token by itself: a warp has a tile of a sequence.

constexpr int kNoiseThreads = 256;

struct TokenNoise {
  Names names;
  const int64_t* x0;     // [B, L], as maskable, xt and mask
  const double* p;       // [B, L], any strides
  const bool* maskable;  // or null
  int64_t* xt;
  bool* mask;  // or null: then tokens are redrawn instead of masked
  int64_t length, p_stride_b, p_stride_l;
  int64_t number;            // the mask's id, or the number of states to redraw from
  unsigned sequence_blocks;  // blocks that share a sequence
};

__global__ void __launch_bounds__(kNoiseThreads) token_noise_kernel(const __grid_constant__ TokenNoise op) {
  FASTDIFF_SHARED(memory);
  Trade& trade = reinterpret_cast<Trade*>(memory)[warp()];
  const int64_t b = blockIdx.x / op.sequence_blocks;
  const unsigned first = blockIdx.x % op.sequence_blocks * blockDim.x * 4 + warp() * kTile;
  int64_t tokens[4];
  double p[4];
  bool allowed[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t position = std::min<int64_t>(in_tile(first, i), op.length - 1), at = b * op.length + position;
    tokens[i] = op.x0[at];
    p[i] = op.p[b * op.p_stride_b + position * op.p_stride_l];
    allowed[i] = !op.maskable || op.maskable[at];
  }
  const Words draws = draw_tile(op.names.stream(kMask, b), first, trade);
  const Words others = op.mask ? draws : draw_tile(op.names.stream(kReplace, b), first, trade);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t position = in_tile(first, i), at = b * op.length + position;
    if (position >= op.length) break;
    const bool hit = allowed[i] && draws.w[i] < threshold(p[i]);
    op.xt[at] = !hit ? tokens[i] : op.mask ? op.number : scaled(others.w[i], op.number);
    if (op.mask) op.mask[at] = hit;
  }
}

// ---------------------------------------------------------------------------------------------------------
// Subsets: a block has a sequence, and masks the m maskable positions with the smallest keys (draw, position). A radix
// select finds the m-th: of the keys that may be it, a histogram of the next 8 bits tells where it lies.

constexpr int kSubsetThreads = 512;
constexpr int kDigit = 8, kBins = 1 << kDigit;

struct Subset {
  Names names;
  const int64_t* x0;          // [B, L] or [T], as maskable, xt and mask
  int64_t* counts;            // [B]: read, or written where there is a table
  const bool* maskable;       // or null
  const int64_t* cu_seqlens;  // [B + 1], or null
  const double* table;        // H_0 .. H_longest, or null
  int64_t* xt;
  bool* mask;
  double* weight;  // [B], where there is a table
  int64_t length, mask_index;
};

// The bin in which the wanted key lies, with the keys in the bins before it and in it.
struct Place {
  int bin, before, inside;
};

struct SubsetShared {
  Trade trades[kSubsetThreads / 32];
  alignas(16) int bins[kBins];
  Place place;
  Room<int> num_maskable, count;
};

struct Sequence {
  int64_t begin;
  unsigned length;
  const bool* maskable;
  Stream stream;

  __device__ Sequence(const Subset& op, int64_t b) : stream(op.names.stream(kSubset, b)) {
    begin = op.cu_seqlens ? op.cu_seqlens[b] : b * op.length;
    length = static_cast<unsigned>(op.cu_seqlens ? op.cu_seqlens[b + 1] - begin : op.length);
    maskable = op.maskable ? op.maskable + begin : nullptr;
  }

  // Calls f(first position, draws, which may be masked) for this warp's share of the tiles.
  template <typename F>
  __device__ void each_tile(SubsetShared& shared, const F& f) const {
    for (unsigned first = warp() * kTile; first < length; first += blockDim.x * 4) {
      bool allowed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned position = in_tile(first, i);
        allowed[i] = position < length && (!maskable || maskable[position]);
      }
      f(first, draw_tile(stream, first, shared.trades[warp()]), allowed);
    }
  }

  __device__ int num_maskable(SubsetShared& shared) const {
    if (!maskable) return static_cast<int>(length);
    int count = 0;
    for (unsigned i = threadIdx.x; i < length; i += blockDim.x) count += maskable[i];
    return reduce_block(count, shared.num_maskable, Add());
  }
};

// The first m with draw < round(2^32 H_m / H_L): as many as there are smaller numbers, 0 among them, which all fail.
__device__ int harmonic_count(const Subset& op, int64_t b, int num_maskable, SubsetShared& shared) {
  const double norm = op.table[num_maskable];
  const uint32_t draw = op.names.stream(kCount, b)(0);
  int fail = 0;
  for (int m = threadIdx.x; m < num_maskable && threshold(op.table[m] / norm) <= draw; m += blockDim.x) ++fail;
  fail = reduce_block(fail, shared.count, Add());
  if (threadIdx.x == 0) op.counts[b] = fail, op.weight[b] = norm;
  return fail;
}

__device__ uint64_t key_of(uint32_t draw, unsigned position) { return uint64_t{draw} << 32 | position; }

// One warp finds the place of the wanted key, counted from 1, and empties the bins. If there are too few keys it is in
// the last bin, and so in the end all are masked.
__device__ void find_place(int wanted, SubsetShared& shared) {
  constexpr int kMine = kBins / 32;
  int* bins = shared.bins + kMine * lane();
  int inside[kMine], sum = 0;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    sum += inside[i] = bins[i];
    bins[i] = 0;
  }
  int before = sum;
  for (unsigned by = 1; by < 32; by *= 2) {
    const int other = __shfl_up_sync(kAllLanes, before, by);
    before += lane() >= by ? other : 0;
  }
  before -= sum;
#pragma unroll
  for (int i = 0; i < kMine; ++i) {
    const int bin = kMine * lane() + i;
    if (before < wanted && (wanted <= before + inside[i] || bin == kBins - 1)) shared.place = {bin, before, inside[i]};
    before += inside[i];
  }
}

// The largest key that is masked, or one between it and the next. In each round the wanted key is one of those from
// `low` that differ in the bits below shift + kDigit; once all in its bin are wanted, the bin's end will do, which is
// so after 2 or 3 rounds of draws, but for ties, which the positions settle.
__device__ uint64_t last_masked(const Sequence& sequence, int wanted, SubsetShared& shared) {
  for (unsigned bin = threadIdx.x; bin < kBins; bin += blockDim.x) shared.bins[bin] = 0;
  __syncthreads();
  uint64_t low = 0;
  for (int shift = 64 - kDigit;; shift -= kDigit) {
    sequence.each_tile(shared, [&](unsigned first, const Words& draws, const bool* allowed) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint64_t bin = (key_of(draws.w[i], in_tile(first, i)) - low) >> shift;
        if (allowed[i] && bin < kBins) atomicAdd(shared.bins + bin, 1);
      }
    });
    __syncthreads();
    if (warp() == 0) find_place(wanted, shared);
    __syncthreads();
    low += static_cast<uint64_t>(shared.place.bin) << shift;
    wanted -= shared.place.before;
    if (wanted == shared.place.inside || shift == 0) return low + ((uint64_t{1} << shift) - 1);
  }
}

__global__ void __launch_bounds__(kSubsetThreads) subset_kernel(const __grid_constant__ Subset op) {
  FASTDIFF_SHARED(memory);
  SubsetShared& shared = *reinterpret_cast<SubsetShared*>(memory);
  const int64_t b = blockIdx.x;
  const Sequence sequence(op, b);
  const int m =
      op.table ? harmonic_count(op, b, sequence.num_maskable(shared), shared) : static_cast<int>(op.counts[b]);
  const uint64_t last = m > 0 ? last_masked(sequence, m, shared) : 0;
  sequence.each_tile(shared, [&](unsigned first, const Words& draws, const bool* allowed) {
    int64_t tokens[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) tokens[i] = op.x0[sequence.begin + std::min(in_tile(first, i), sequence.length - 1)];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned position = in_tile(first, i);
      if (position >= sequence.length) break;
      const bool masked = m > 0 && allowed[i] && key_of(draws.w[i], position) <= last;
      op.mask[sequence.begin + position] = masked;
      op.xt[sequence.begin + position] = masked ? op.mask_index : tokens[i];
    }
  });
}

// ---------------------------------------------------------------------------------------------------------
// The list of scored rows. Each block lists those of a chunk. What the other chunks hold it counts for itself: n^2 /
// kChunk bytes from the L2 cache are nothing beside reading the rows, and nobody waits for anybody.

constexpr int kCompactThreads = 1024, kWarpRounds = 16;
constexpr int kChunk = kCompactThreads * kWarpRounds;

// Scored elements before the chunk, and in all.
struct Scored {
  int64_t before, all;
  __device__ Scored operator+(const Scored& other) const { return {before + other.before, all + other.all}; }
};

struct CompactShared {
  Room<Scored> room;
  int of_warp[kCompactThreads / 32];
};

// This thread's share of the true elements.
__device__ int count_true(const bool* flags, int64_t n) {
  const int64_t units = reinterpret_cast<uintptr_t>(flags) % sizeof(uint4) == 0 ? n / int64_t{sizeof(uint4)} : 0;
  int count = 0;
  for (int64_t i = threadIdx.x; i < units; i += kCompactThreads) {
    const uint4 unit = reinterpret_cast<const uint4*>(flags)[i];  // bytes of 0 and 1
    count += __popc(unit.x | unit.y << 1 | unit.z << 2 | unit.w << 3);
  }
  for (int64_t i = units * int64_t{sizeof(uint4)} + threadIdx.x; i < n; i += kCompactThreads) count += flags[i];
  return count;
}

__global__ void __launch_bounds__(kCompactThreads)
    compact_kernel(const bool* scored, int64_t n, int64_t* index, int64_t capacity, int64_t* count) {
  FASTDIFF_SHARED(memory);
  CompactShared& shared = *reinterpret_cast<CompactShared*>(memory);
  const int64_t begin = int64_t{blockIdx.x} * kChunk, rest = n - begin < kChunk ? n : begin + kChunk;
  const int before = count_true(scored, begin), after = count_true(scored + rest, n - rest);
  const int64_t first = begin + int64_t{warp()} * 32 * kWarpRounds + lane();
  unsigned votes[kWarpRounds];
  int mine = 0;
#pragma unroll
  for (int i = 0; i < kWarpRounds; ++i) {
    votes[i] = __ballot_sync(kAllLanes, first + 32 * i < n && scored[first + 32 * i]);
    mine += __popc(votes[i]);
  }
  if (lane() == 0) shared.of_warp[warp()] = mine;
  const Scored total = reduce_block(Scored{before, before + after + (lane() == 0 ? mine : 0)}, shared.room, Add());

  int64_t to = total.before;
  for (unsigned other = 0; other < warp(); ++other) to += shared.of_warp[other];
#pragma unroll
  for (int i = 0; i < kWarpRounds; ++i) {
    const int64_t slot = to + __popc(votes[i] & ((1u << lane()) - 1));
    if (votes[i] >> lane() & 1 && slot < capacity) index[slot] = first + 32 * i;
    to += __popc(votes[i]);
  }
  const int64_t thread = int64_t{blockIdx.x} * kCompactThreads + threadIdx.x;
  for (int64_t i = total.all + thread; i < capacity; i += int64_t{gridDim.x} * kCompactThreads) index[i] = n;
  if (thread == 0) *count = total.all;
}

}  // namespace

// ---------------------------------------------------------------------------------------------------------
// Launches.

void launch_token_noise(Tensor x0, Tensor p, std::optional<Tensor> maskable, Tensor seed, Tensor steps,
                        Tensor sample_ids, Tensor xt, std::optional<Tensor> mask, int64_t number) {
  TokenNoise op{{seed, steps, sample_ids}, data<int64_t>(x0), data<double>(p), data<bool>(maskable)};
  op.xt = mutable_data<int64_t>(xt), op.mask = mask ? mutable_data<bool>(*mask) : nullptr;
  op.length = x0.size(1), op.p_stride_b = p.stride(0), op.p_stride_l = p.stride(1), op.number = number;
  const int threads = threads_for(op.length, kNoiseThreads);
  op.sequence_blocks = static_cast<unsigned>((op.length + 4 * threads - 1) / (4 * threads));
  launch(token_noise_kernel, x0, {x0.size(0) * op.sequence_blocks, threads, threads / 32 * sizeof(Trade)}, op);
}

void launch_subset(Tensor x0, Tensor counts, std::optional<Tensor> maskable, std::optional<Tensor> cu_seqlens,
                   Tensor seed, Tensor steps, Tensor sample_ids, std::optional<Tensor> table, Tensor xt, Tensor mask,
                   std::optional<Tensor> weight, int64_t mask_index) {
  Subset op{{seed, steps, sample_ids}, data<int64_t>(x0), mutable_data<int64_t>(counts), data<bool>(maskable)};
  op.cu_seqlens = data<int64_t>(cu_seqlens), op.table = data<double>(table);
  op.xt = mutable_data<int64_t>(xt), op.mask = mutable_data<bool>(mask);
  op.weight = weight ? mutable_data<double>(*weight) : nullptr;
  op.length = x0.size(-1), op.mask_index = mask_index;  // of packed documents the longest that there may be
  launch(subset_kernel, x0, {counts.numel(), threads_for(op.length, kSubsetThreads), sizeof(SubsetShared)}, op);
}

void launch_compact(Tensor scored, Tensor index, Tensor count) {
  const int64_t n = scored.numel(), chunks = std::max<int64_t>((n + kChunk - 1) / kChunk, 1);
  launch(compact_kernel, scored, {chunks, kCompactThreads, sizeof(CompactShared)}, data<bool>(scored), n,
         mutable_data<int64_t>(index), index.numel(), mutable_data<int64_t>(count));
}

}  // namespace fastdiff
