// Small views of torch's stable tensors, and the error that Python sees as ValueError.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace fastdiff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void bad_value(const Parts&... parts) {
  std::ostringstream message;
  ((message << parts), ...);
  throw std::invalid_argument(message.str());
}

inline std::vector<int64_t> sizes(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <typename T>
const T* data(const std::optional<Tensor>& t) {
  return t ? data<T>(*t) : nullptr;
}

template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Where row `row` of z [..., V] begins.
inline int64_t row_offset(const Tensor& z, int64_t row) {
  int64_t offset = 0;
  for (int64_t d = z.dim() - 2; d >= 0; --d) {
    offset += row % z.size(d) * z.stride(d);
    row /= z.size(d);
  }
  return offset;
}

}  // namespace fastdiff
