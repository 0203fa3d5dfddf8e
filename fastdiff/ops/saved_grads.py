"""Gradients that the forward pass made: backward has nothing to do unless the upstream gradient differs from 1."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fastdiff.ops.gpu import define_launch, implement_on_gpus
from fastdiff.ops.library import define, implement, library, no_derivative


def save_grads(ctx: Any, grads: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> None:
    """Keeps the gradients of a scalar loss for `scaled`, and that they depend on the inputs."""
    ctx.scaled = None  # the gradients, once the upstream one is in them
    with torch.enable_grad():
        ctx.save_for_backward(*grads, _Edge.apply(*inputs))


class _Edge(torch.autograd.Function):
    """An empty tensor that depends on the inputs in the graph, and keeps none of their memory."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor | None) -> Tensor:
        return next(x for x in inputs if x is not None).new_empty(0)


def scaled(backend: str, ctx: Any, grad_loss: Tensor) -> list[Tensor]:
    """What the forward pass saved, times the upstream gradient of its scalar loss."""
    *saved, edge = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: to differentiate the result is an error
        return [_scale_grad(grad, grad_loss, edge) for grad in saved]
    if type(grad_loss) is not Tensor:  # traced
        return [_scale_grad(grad, grad_loss) for grad in saved]
    if backend == "cpu":
        return saved if grad_loss.item() == 1 else [_scale_grad(grad, grad_loss) for grad in saved]
    memory = [StorageWeakRef(grad.untyped_storage()) for grad in saved]  # another where hooks unpack what was saved
    if ctx.scaled is not None and ctx.scaled[0] == memory:
        return [_scale_grad(grad, grad_loss / ctx.scaled[1]) for grad in saved]
    if not all(grad.is_contiguous() and grad.data_ptr() % 16 == 0 for grad in saved):
        return [_scale_grad(grad, grad_loss) for grad in saved]
    # Nobody has seen these gradients yet: they are scaled in place, at no cost if the device finds that the factor is
    # 1. .data, or the second backward of a retained graph would be told that what it saved has changed.
    for grad in saved:
        _scale_grad_[backend](grad.data, grad_loss)
    ctx.scaled = memory, grad_loss
    return saved


def _scale_on_gpu(kernels: Any, grad: Tensor, factor: Tensor) -> None:
    if grad.numel():
        kernels.launch_scale(grad, factor)


_scale_grad_ = define(
    "scale_grad_", "(Tensor(a!) grad, Tensor factor) -> ()", lambda grad, factor: None, ("triton", "cuda")
)
define_launch("launch_scale", "Tensor(a!) grad, Tensor factor")
implement_on_gpus("scale_grad_", _scale_on_gpu, triton="row_loss")
library.define(
    "scale_grad(Tensor grad, Tensor factor, Tensor? edge=None) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,)
)
_scale_grad = torch.ops.fastdiff.scale_grad.default
implement("scale_grad", lambda grad, factor, edge=None: grad * factor)
no_derivative("scale_grad", "double backward")
