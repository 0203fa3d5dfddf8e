"""Models that are asked and not trained: how they are given, and evaluation mode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.progress import progress

# xt [b, L] -> logits [b, L, V] or an object with `.logits`; or a pair of xt -> hidden states [b, L, D] (or an
# object with `.last_hidden_state`) and the last layer, an nn.Linear or its weight [V, D].
Model = Callable[[Tensor], Any] | tuple[Callable[[Tensor], Tensor], nn.Linear | Tensor]
# The same of xt and x0 [b, L], where position i sees xt of its own block and x0 of the blocks before.
BlockModel = Callable[[Tensor, Tensor], Any] | tuple[Callable[[Tensor, Tensor], Tensor], nn.Linear | Tensor]


def model_parts(model: Model | BlockModel) -> tuple[Callable[..., Any], Tensor | None, Tensor | None]:
    """What to call, and the last layer's weight and bias if that is apart."""
    if not isinstance(model, tuple):
        return model, None, None
    if len(model) != 2 or not isinstance(model[1], nn.Linear | Tensor):
        raise TypeError(
            f"model: expected a callable, or a pair (body, lm_head) with an nn.Linear or its weight, got {model!r}"
        )
    body, lm_head = model
    weight, bias = (lm_head, None) if isinstance(lm_head, Tensor) else (lm_head.weight, lm_head.bias)
    if weight.is_meta:
        raise ValueError(
            "model: expected a pair (body, lm_head) whose lm_head has its weight, got one on meta; what is offloaded "
            "is there in its own forward alone, so give the whole model, for its logits"
        )
    return body, weight, bias


@contextmanager
def evaluating(
    body: Callable[..., Any], total: int, *, unit: str = "network passes", differentiable: bool = False
) -> Iterator[Callable[[int], None]]:
    """What to call with the number of `total` just done, for what `progress` shows.

    Unless differentiable, no gradients inside, and an nn.Module, or that of a method, in evaluation mode, with each
    submodule back in its own afterwards.
    """
    module = getattr(body, "__self__", body)
    modules = list(module.modules()) if isinstance(module, nn.Module) and not differentiable else []
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        with torch.set_grad_enabled(differentiable and torch.is_grad_enabled()), progress(total, unit) as advance:
            yield advance
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
