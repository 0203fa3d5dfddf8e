#include "operators.h"
namespace fastdiff {
void launch_token_noise(Tensor, Tensor, std::optional<Tensor>, Tensor, Tensor, Tensor, Tensor, std::optional<Tensor>,
                        int64_t) {}
void launch_subset(Tensor, Tensor, std::optional<Tensor>, std::optional<Tensor>, Tensor, Tensor, Tensor,
                   std::optional<Tensor>, Tensor, Tensor, std::optional<Tensor>, int64_t) {}
void launch_compact(Tensor, Tensor, Tensor) {}
}  // namespace fastdiff
