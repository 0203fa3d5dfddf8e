// Tokens drawn from rows, and their laws, on the CPU.
#include <algorithm>
#include <atomic>
#include <tuple>
#include <vector>

#include "operators.h"
#include "row_sample_cpu.h"

namespace fastdiff {
namespace {

Sample sample_for(ScalarType dtype, Isa isa) {
  switch (dtype) {
    case ScalarType::Float:
      return sampler_of<float>(isa);
    case ScalarType::Double:
      return sampler_of<double>(isa);
    case ScalarType::BFloat16:
      return sampler_of<BFloat16>(isa);
    case ScalarType::Half:
      return sampler_of<Float16>(isa);
    default:
      bad_value("logits: expected float32, float64, bfloat16 or float16");
  }
}

void run(const RowSample& op, int64_t count) {
  std::atomic<int64_t> bad{-1};
  const auto sample = sample_for(op.tensor.scalar_type(), current_isa());
  const int64_t grain = std::max<int64_t>(1, 32768 / op.num_states);
  torch::stable::parallel_for(0, count, grain, [&](int64_t b, int64_t e) { sample(op, b, e, bad); });
  if (bad >= 0)
    bad_value(op.law ? "log_score" : "logits", ": expected finite numbers, or -inf beside some, got others at token ",
              bad.load());
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> row_sample(Tensor z, Tensor xt, Tensor live, std::optional<Tensor> law,
                                              std::optional<Tensor> exclude, Tensor seed, Tensor step,
                                              Tensor sample_ids, Tensor positions, double temperature, int64_t top_k,
                                              double top_p, bool with_stats) {
  const int64_t rows = xt.numel();
  Tensor tokens = torch::stable::new_empty(xt, sizes(xt));
  std::copy_n(data<int64_t>(xt), rows, mutable_data<int64_t>(tokens));
  Tensor argmax = torch::stable::new_empty(xt, with_stats ? sizes(xt) : std::vector<int64_t>{0});
  std::vector<int64_t> shape{0};
  if (with_stats) {
    shape = sizes(xt);
    shape.insert(shape.begin(), 3);
    std::copy_n(data<int64_t>(xt), rows, mutable_data<int64_t>(argmax));
  }
  Tensor stats = torch::stable::new_empty(z, shape, ScalarType::Float);
  std::fill_n(mutable_data<float>(stats), stats.numel(), 0.0f);

  RowSample op(z, xt, live, law);
  op.sample_ids = data<int64_t>(sample_ids), op.positions = data<int64_t>(positions);
  op.seed = *data<int64_t>(seed), op.step = *data<int64_t>(step);
  op.temperature = temperature, op.top_k = top_k, op.top_p = top_p;
  op.tokens = mutable_data<int64_t>(tokens);
  if (with_stats) op.argmax = mutable_data<int64_t>(argmax), op.stats = mutable_data<float>(stats);
  if (exclude) op.excluded.assign(data<int64_t>(*exclude), data<int64_t>(*exclude) + exclude->numel());
  run(op, static_cast<int64_t>(op.live.size()));
  return {tokens, argmax, stats};
}

Tensor reverse_rows(Tensor z, Tensor xt, Tensor live, Tensor law) {
  RowSample op(z, xt, live, law);
  Tensor probs = torch::stable::new_empty(z, sizes(z), ScalarType::Float);
  advise_huge_pages(probs);
  op.probs = mutable_data<float>(probs);
  run(op, op.rows);
  return probs;
}

}  // namespace fastdiff
