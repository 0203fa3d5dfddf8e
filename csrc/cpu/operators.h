// The operators of fastdiff/ops on the CPU. Shapes, dtypes and devices were checked there; values are checked here.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "../tensor.h"

namespace fastdiff {

std::tuple<Tensor, Tensor, Tensor> row_loss(Tensor z, Tensor x0, std::optional<Tensor> xt, std::optional<Tensor> mask,
                                            std::optional<Tensor> sigma, std::optional<Tensor> weight,
                                            std::optional<Tensor> entropy_weight, std::optional<Tensor> extra,
                                            std::optional<Tensor> num_items, std::string functor, int64_t mask_index,
                                            bool exclude_mask, int64_t ignore_index, bool scale_by_sigma,
                                            double penalty, std::string reduction, bool with_grad, bool with_stats);

std::tuple<Tensor, Tensor> row_loss_(Tensor z, Tensor x0, std::optional<Tensor> xt, std::optional<Tensor> mask,
                                     std::optional<Tensor> sigma, std::optional<Tensor> weight,
                                     std::optional<Tensor> entropy_weight, std::optional<Tensor> extra,
                                     std::string functor, int64_t mask_index, bool exclude_mask, int64_t ignore_index,
                                     bool scale_by_sigma, double penalty, int64_t all_states, bool with_grad,
                                     bool with_stats);

std::tuple<Tensor, Tensor> row_distill(Tensor z, Tensor teacher, std::optional<Tensor> ids, std::optional<Tensor> mask,
                                       std::optional<Tensor> weight, std::optional<Tensor> num_items, bool reverse,
                                       int64_t mask_index, double scale, std::string reduction, bool with_grad);
Tensor row_distill_(Tensor z, Tensor teacher, std::optional<Tensor> ids, std::optional<Tensor> mask,
                    std::optional<Tensor> weight, bool reverse, int64_t mask_index, double scale, bool with_grad);

// A fresh buffer costs a page fault every 4 KB unless the kernel is told, before the first touch, to use 2 MB ones.
void advise_huge_pages(Tensor fresh);

std::tuple<Tensor, Tensor> mask_tokens(Tensor x0, Tensor p, std::optional<Tensor> maskable, Tensor seed, Tensor steps,
                                       Tensor sample_ids, int64_t mask_index);
std::tuple<Tensor, Tensor> mask_exactly(Tensor x0, Tensor counts, std::optional<Tensor> maskable,
                                        std::optional<Tensor> cu_seqlens, Tensor seed, Tensor steps, Tensor sample_ids,
                                        int64_t mask_index);
std::tuple<Tensor, Tensor, Tensor, Tensor> harmonic_mask(Tensor x0, std::optional<Tensor> maskable,
                                                         std::optional<Tensor> cu_seqlens, Tensor seed, Tensor steps,
                                                         Tensor sample_ids, int64_t mask_index);
Tensor uniform_tokens(Tensor x0, Tensor p, Tensor seed, Tensor steps, Tensor sample_ids, int64_t num_states);

std::tuple<Tensor, Tensor, Tensor> row_sample(Tensor z, Tensor xt, Tensor live, std::optional<Tensor> law,
                                              std::optional<Tensor> exclude, Tensor seed, Tensor step,
                                              Tensor sample_ids, Tensor positions, double temperature, int64_t top_k,
                                              double top_p, bool with_stats);
Tensor reverse_rows(Tensor z, Tensor xt, Tensor live, Tensor law);

std::tuple<Tensor, Tensor> fit_controls(Tensor loss, Tensor code, Tensor weight, int64_t folds, Tensor table,
                                        Tensor pair, Tensor left, Tensor near, Tensor ridge, double own_ridge,
                                        double noise, double doubt, int64_t iterations);
Tensor fit_controls_backward(Tensor grad_level, Tensor grad_slope, Tensor loss, Tensor code, Tensor weight,
                             int64_t folds, Tensor table, Tensor pair, Tensor left, Tensor near, Tensor ridge,
                             double own_ridge, double doubt);

}  // namespace fastdiff
