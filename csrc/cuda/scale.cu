// A gradient times the upstream one, in place, and at no cost where that is 1.
#include "launch.h"
#include "operators.h"
#include "rows.h"

namespace fastdiff {
namespace {

template <typename T>
__global__ void __launch_bounds__(256) scale_kernel(T* grad, const float* factor_, int64_t size) {
  constexpr int kVec = 16 / sizeof(T);
  const float factor = *factor_;
  if (factor == 1) return;
  const int64_t first = (int64_t{blockIdx.x} * blockDim.x + threadIdx.x) * kVec;
  if (first + kVec <= size) {
    auto* unit = reinterpret_cast<uint4*>(grad + first);
    T x[kVec];
    memcpy(x, unit, 16);
#pragma unroll
    for (int i = 0; i < kVec; ++i) store(x + i, load(x[i]) * factor);
    memcpy(unit, x, 16);
  } else {
    for (int64_t i = first; i < size; ++i) store(grad + i, load(grad[i]) * factor);
  }
}

}  // namespace

void launch_scale(Tensor grad, Tensor factor) {
  with_type(grad, [&](auto number) {
    using T = decltype(number);
    const int64_t size = grad.numel(), units = (size * int64_t{sizeof(T)} + 15) / 16;
    launch(scale_kernel<T>, grad, {(units + 255) / 256, 256}, mutable_data<T>(grad), data<float>(factor), size);
  });
}

}  // namespace fastdiff
