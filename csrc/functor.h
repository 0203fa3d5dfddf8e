// The row losses by the names that fastdiff/ops gives them.
#pragma once

#include <string>

#include "tensor.h"

namespace fastdiff {

enum class Functor { dce, dse_absorb, dse_uniform, dse_uniform_logits };

inline Functor functor_named(const std::string& name) {
  if (name == "dce") return Functor::dce;
  if (name == "dse_absorb") return Functor::dse_absorb;
  if (name == "dse_uniform") return Functor::dse_uniform;
  if (name == "dse_uniform_logits") return Functor::dse_uniform_logits;
  bad_value("functor: expected dce, dse_absorb, dse_uniform or dse_uniform_logits, got ", name);
}

}  // namespace fastdiff
