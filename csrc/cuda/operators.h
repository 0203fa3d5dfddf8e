// The launches of fastdiff/ops/gpu.py. Shapes, dtypes and devices were checked in Python; values are not looked at.
#pragma once

#include <optional>
#include <string>

#include "../tensor.h"

namespace fastdiff {

void launch_row_loss(Tensor z, Tensor x0, std::optional<Tensor> xt, std::optional<Tensor> mask,
                     std::optional<Tensor> sigma, std::optional<Tensor> weight, std::optional<Tensor> entropy_weight,
                     std::optional<Tensor> extra, Tensor scale, Tensor loss, std::optional<Tensor> grad,
                     std::optional<Tensor> stats, std::string functor, int64_t mask_index, bool exclude_mask,
                     int64_t ignore_index, bool scale_by_sigma, double penalty, int64_t all_states);
void launch_row_distill(Tensor z, Tensor teacher, std::optional<Tensor> ids, std::optional<Tensor> mask,
                        std::optional<Tensor> weight, Tensor share, Tensor loss, std::optional<Tensor> grad,
                        bool reverse, int64_t mask_index, double scale);
void launch_scale(Tensor grad, Tensor factor);

void launch_token_noise(Tensor x0, Tensor p, std::optional<Tensor> maskable, Tensor seed, Tensor steps,
                        Tensor sample_ids, Tensor xt, std::optional<Tensor> mask, int64_t number);
void launch_subset(Tensor x0, Tensor counts, std::optional<Tensor> maskable, std::optional<Tensor> cu_seqlens,
                   Tensor seed, Tensor steps, Tensor sample_ids, std::optional<Tensor> table, Tensor xt, Tensor mask,
                   std::optional<Tensor> weight, int64_t mask_index);
void launch_compact(Tensor scored, Tensor index, Tensor count);

void launch_row_sample(Tensor z, Tensor xt, Tensor live, std::optional<Tensor> law, std::optional<Tensor> exclude,
                       Tensor seed, Tensor step, Tensor sample_ids, Tensor positions, Tensor tokens,
                       std::optional<Tensor> argmax, std::optional<Tensor> stats, double temperature, int64_t top_k,
                       double top_p);
void launch_reverse_rows(Tensor z, Tensor xt, Tensor live, Tensor law, Tensor probs);

}  // namespace fastdiff
