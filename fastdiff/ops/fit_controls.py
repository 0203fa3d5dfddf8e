"""The fit of an estimator's control variates: all of a sequence in cache, where formulas pass over it many times."""

from typing import Any

from torch import Tensor

from fastdiff.ops.library import define, no_derivative


def _fake(loss: Tensor, code: Tensor, weight: Tensor, folds: int, table: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = len(loss), folds, loss.shape[-1]
    return loss.new_empty(shape), loss.new_empty((*shape, table.shape[1]))


# Losses and weights float64, codes int64 [K, chains, looks, L], contiguous; what they mean is said in
# estimators/potential.py. Levels [K, folds, L] and slopes [K, folds, L, terms], float64.
fit_controls = define(
    "fit_controls",
    "(Tensor loss, Tensor code, Tensor weight, int folds, Tensor table, Tensor pair, Tensor left, Tensor near, "
    "Tensor ridge, float own_ridge, float noise, float doubt, int iterations) -> (Tensor, Tensor)",
    _fake,
    ("cpu",),
)["cpu"]
no_derivative("fit_controls.cpu", "a gradient")
