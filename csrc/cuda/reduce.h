// What the threads of a block, or of a cluster of blocks, make together. Orders are fixed: results repeat bit for bit.
#pragma once

#include <cstring>

#include "device.h"

namespace fastdiff {

constexpr int kMaxWarps = 32, kMaxCluster = 8;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

// Another lane's value, of any type of whole words.
template <typename T>
__device__ T shuffle_xor(const T& value, int lane) {
  static_assert(sizeof(T) % 4 == 0);
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof(T));
  for (uint32_t& word : words) word = __shfl_xor_sync(kAllLanes, word, lane);
  T other;
  memcpy(&other, words, sizeof(T));
  return other;
}

// Room for one reduction. A block needs one for each that it makes, or a barrier between two uses.
template <typename T>
struct Room {
  T warps[kMaxWarps], ranks[kMaxCluster];
};

// merge over all threads of the block, for every thread; merge(a, b) and merge(b, a) must be the same bits.
template <typename T, typename Merge>
__device__ T reduce_block(T value, Room<T>& room, const Merge& merge) {
  for (int lane = 16; lane > 0; lane /= 2) value = merge(value, shuffle_xor(value, lane));
  if (blockDim.x == 32) {
    __syncwarp();  // a barrier for memory too, as it is for more warps
    return value;
  }
  if (threadIdx.x % 32 == 0) room.warps[threadIdx.x / 32] = value;
  __syncthreads();
  value = room.warps[0];
  for (unsigned warp = 1; warp < blockDim.x / 32; ++warp) value = merge(value, room.warps[warp]);
  return value;
}

// The same over all threads of the cluster, whose blocks must all have started (Cluster::wait).
template <typename T, typename Merge>
__device__ T reduce_cluster(T value, Room<T>& room, const Merge& merge) {
  value = reduce_block(value, room, merge);
  const int size = Cluster::size();
  if (size == 1) return value;
  if (threadIdx.x < static_cast<unsigned>(size)) *Cluster::at(&room.ranks[Cluster::rank()], threadIdx.x) = value;
  Cluster::arrive();
  Cluster::wait();
  value = room.ranks[0];
  for (int rank = 1; rank < size; ++rank) value = merge(value, room.ranks[rank]);
  return value;
}

struct Add {
  template <typename T>
  __device__ T operator()(const T& a, const T& b) const {
    return a + b;
  }
};

struct Least {
  template <typename T>
  __device__ T operator()(const T& a, const T& b) const {
    return b < a ? b : a;
  }
};

}  // namespace fastdiff
