// Where the rows of an operator's z lie, and of what type they are.
#pragma once

#include <algorithm>

#include "../element.h"
#include "../tensor.h"
#include "device.h"

namespace fastdiff {

// Row r begins at (r / inner) * outer_stride + (r % inner) * inner_stride.
struct Rows {
  const void* z;
  int num_states;
  int64_t inner, outer_stride, inner_stride;

  // Of z [V], [rows, V] or [batch, rows, V], the last contiguous.
  explicit Rows(const Tensor& t)
      : z(t.const_data_ptr()),
        num_states(static_cast<int>(t.size(-1))),
        inner(t.dim() < 2 ? 1 : std::max<int64_t>(t.size(-2), 1)),
        outer_stride(t.dim() < 3 ? 0 : t.stride(0)),
        inner_stride(t.dim() < 2 ? 0 : t.stride(-2)) {}

  template <typename T>
  __device__ const T* row(int64_t r) const {
    return static_cast<const T*>(z) + r / inner * outer_stride + r % inner * inner_stride;
  }
};

// Calls f with a number of z's type.
template <typename F>
void with_type(const Tensor& z, const F& f) {
  switch (z.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(BFloat16{});
    case ScalarType::Half:
      return f(Float16{});
    default:
      bad_value("logits: expected float32, bfloat16 or float16");
  }
}

}  // namespace fastdiff
