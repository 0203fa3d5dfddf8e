"""The fit of an estimator's control variates: all of a sequence in cache, where formulas pass over it many times."""

from typing import Any

import torch
from torch import Tensor

from fastdiff.ops.library import define, library, no_derivative


def _fake(loss: Tensor, code: Tensor, weight: Tensor, folds: int, table: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = len(loss), folds, loss.shape[-1]
    return loss.new_empty(shape), loss.new_empty((*shape, table.shape[1]))


_PROBLEM = (
    "Tensor loss, Tensor code, Tensor weight, int folds, Tensor table, Tensor pair, Tensor left, Tensor near, "
    "Tensor ridge, float own_ridge"
)
# Losses and weights float64, codes int64 [K, chains, looks, L], contiguous; what they mean is said in
# estimators/potential.py. Levels [K, folds, L] and slopes [K, folds, L, terms], float64.
fit_controls = define(
    "fit_controls",
    f"({_PROBLEM}, float noise, float doubt, int iterations) -> (Tensor, Tensor)",
    _fake,
    ("cpu",),
)["cpu"]
_backward_of_fit = define(
    "fit_controls_backward",
    f"(Tensor grad_level, Tensor grad_slope, {_PROBLEM}, float doubt) -> Tensor",
    lambda grad_level, grad_slope, loss, *_: torch.empty_like(loss),
    ("cpu",),
)["cpu"]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    loss, code, weight, folds, *layout, own_ridge, _, doubt, _ = inputs
    ctx.save_for_backward(loss, code, weight, *layout)
    ctx.constants = folds, own_ridge, doubt


def _backward(ctx: Any, grad_level: Tensor, grad_slope: Tensor) -> tuple[Tensor | None, ...]:
    folds, own_ridge, doubt = ctx.constants
    loss, code, weight, *layout = ctx.saved_tensors
    upstream = grad_level.contiguous(), grad_slope.contiguous()
    grad = _backward_of_fit(*upstream, loss, code, weight, folds, *layout, own_ridge, doubt)
    return grad, *[None] * 12


torch.library.register_autograd("fastdiff::fit_controls.cpu", _backward, setup_context=_setup_context, lib=library)
no_derivative("fit_controls_backward.cpu", "double backward")
