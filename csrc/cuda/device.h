// What kernels are written with: CUDA's own words, clusters of blocks, and copies into shared memory that go on beside
// other work. Where no GPU compiler reads this, tests/cuda/emulator.h gives the same words a meaning on the CPU.
#pragma once

#ifndef __CUDACC__
#include "emulator.h"
#else

#include <cuda_runtime.h>

#include <cstdint>

#if __CUDA_ARCH__ >= 900
#include <cooperative_groups.h>
#endif

#define FASTDIFF_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace fastdiff {

// The blocks that work on one row; before sm_90 it is always one.
struct Cluster {
#if __CUDA_ARCH__ >= 900
  static __device__ int size() { return cooperative_groups::this_cluster().num_blocks(); }
  static __device__ int rank() { return cooperative_groups::this_cluster().block_rank(); }
  // Every thread of every block arrives, and then waits for all the others.
  static __device__ void arrive() { cooperative_groups::cluster_group::barrier_arrive(); }
  static __device__ void wait() { cooperative_groups::cluster_group::barrier_wait(); }
  // The same place in the shared memory of another block.
  template <typename T>
  static __device__ T* at(T* mine, int rank) {
    return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
  }
#else
  static __device__ int size() { return 1; }
  static __device__ int rank() { return 0; }
  static __device__ void arrive() {}
  static __device__ void wait() { __syncthreads(); }
  template <typename T>
  static __device__ T* at(T* mine, int) {
    return mine;
  }
#endif
};

// Copies of consecutive 16-byte units into shared memory, in parts that are waited for one by one. All threads make the
// same calls. On sm_90 the copy engine moves each part; before, every thread copies, and may only read, the units
// thread, thread + blockDim.x, ... of a part.
struct Copies {
  static constexpr int kParts = 4;
  uint64_t* barriers;  // kParts of them, in shared memory

  __device__ explicit Copies(uint64_t* barriers_) : barriers(barriers_) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
      for (int i = 0; i < kParts; ++i)
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address(barriers + i)));
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
#endif
  }

  __device__ void start(int part, uint4* to, const uint4* from, int units) const {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x != 0) return;
    const uint32_t bytes = 16 * units, barrier = address(barriers + part);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
    if (units > 0)
      asm volatile(
          "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(to)),
          "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(barrier)
          : "memory");
#else
    for (int i = threadIdx.x; i < units; i += blockDim.x)
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address(to + i)),
                   "l"(__cvta_generic_to_global(from + i))
                   : "memory");
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }

  // Until a part is there. Parts are waited for in order, and again at no cost.
  __device__ void wait(int part) const {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], 0;\n"
        "@!done bra again;\n"
        "}" ::"r"(address(barriers + part))
        : "memory");
#else
    if (part == 0) asm volatile("cp.async.wait_group %0;" ::"n"(kParts - 1) : "memory");
    if (part == 1) asm volatile("cp.async.wait_group %0;" ::"n"(kParts - 2) : "memory");
    if (part == 2) asm volatile("cp.async.wait_group %0;" ::"n"(kParts - 3) : "memory");
    if (part == 3) asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
  }

 private:
  static __device__ uint32_t address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  }
};

}  // namespace fastdiff

#endif  // __CUDACC__
