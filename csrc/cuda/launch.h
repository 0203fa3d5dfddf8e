// Launches on the current stream of a tensor's device, which the caller has made the current one; none goes unchecked.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "../tensor.h"
#include "device.h"

#ifdef __CUDACC__
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif

namespace fastdiff {

struct Grid {
  int64_t blocks;
  int threads;
  size_t shared = 0;  // bytes of a block
  int cluster = 1;    // blocks that work together
};

// What a block may have.
struct Limits {
  bool clusters;
  size_t shared;
};

#ifdef __CUDACC__

inline void checked(cudaError_t error) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next operator, which did nothing wrong, would be told of it
  throw std::runtime_error(std::string("fastdiff: CUDA: ") + cudaGetErrorString(error));
}

// Shows what the kernels that were loaded here are compiled from: a GPU that has clusters may run code that knows none.
static __global__ void any_kernel() {}

inline Limits limits() {
  int device, shared;
  cudaFuncAttributes code;
  checked(cudaGetDevice(&device));
  checked(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  checked(cudaFuncGetAttributes(&code, any_kernel));
  return {code.ptxVersion >= 90, static_cast<size_t>(shared)};
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Tensor& tensor, const Grid& grid, Arguments&&... arguments) {
  constexpr size_t kWithoutAsking = 48 << 10;
  void* stream;
  if (aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) != AOTI_TORCH_SUCCESS)
    throw std::runtime_error("fastdiff: CUDA: there is no current stream");
  if (grid.shared > kWithoutAsking)  // as much as there is, or another thread's launch might be left with less
    checked(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limits().shared)));
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = grid.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  checked(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

#else

inline Limits limits() {
  return {emulator::capability() >= 90, size_t{emulator::capability() >= 90 ? 227u : 163u} << 10};
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), const Tensor&, const Grid& grid, Arguments&&... arguments) {
  emulator::launch(grid.blocks, grid.threads, grid.shared, grid.cluster, [&] { kernel(arguments...); });
}

#endif

}  // namespace fastdiff
