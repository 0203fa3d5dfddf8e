"""Distillation: the KL divergence of a teacher's and a student's rows, read together, and its gradient."""

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff.backends import KERNELS, resolve
from fastdiff.ops.gpu import at_most_three_dimensions, define_launch, implement_on_gpus
from fastdiff.ops.library import define, implement, library, no_derivative, no_forward_mode
from fastdiff.ops.row_loss import loss_dtype
from fastdiff.ops.saved_grads import save_grads, scaled

# z [..., V] with any strides before the last. teacher: as z and of its type, or with ids, int64 [..., k] ascending,
# float64 [..., k] log-probabilities of those; mask bool, weight float64, and both of these, contiguous [...]; num_items
# float64 []. mask_index: the id that is left out, or -1; scale: 1 / temperature. Returns the loss, [...] or [], and the
# gradient of a scalar one for z, [..., V], or empty.
_ROWS = (
    "Tensor z, Tensor teacher, Tensor? ids, Tensor? mask, Tensor? weight, Tensor? num_items, bool reverse, "
    "int mask_index, float scale, str reduction"
)
_TENSORS = 6  # of the arguments


@dataclasses.dataclass
class Pairs:
    """The arguments of one call, in the operator's order."""

    z: Tensor
    teacher: Tensor
    ids: Tensor | None
    mask: Tensor | None
    weight: Tensor | None
    num_items: Tensor | None
    reverse: bool
    mask_index: int
    scale: float
    reduction: str

    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def scored(self) -> Tensor:
        """Which tokens have a loss, bool [...]."""
        if self.mask is not None:
            return self.mask
        return torch.ones(self.z.shape[:-1], dtype=torch.bool, device=self.z.device)

    def at(self, index: Tensor) -> "Pairs":
        """What is known of some of the tokens, flattened; z is still that of all, and so is a teacher's of all ids."""
        given = {name: getattr(self, name) for name in ("mask", "weight")}
        chosen: dict[str, Any] = {name: None if t is None else t.flatten()[index] for name, t in given.items()}
        if self.ids is not None:
            chosen |= {"ids": self.ids.flatten(0, -2)[index], "teacher": self.teacher.flatten(0, -2)[index]}
        return dataclasses.replace(self, **chosen)

    def weigh(self, upstream: Tensor) -> None:
        """Takes upstream gradients of the losses as weights of a summed loss."""
        upstream = upstream.double().expand(self.z.shape[:-1]).contiguous()
        self.weight = upstream if self.weight is None else self.weight * upstream


def row_distill(pairs: Pairs, backend: str | None) -> Tensor:
    """Loss per token, or its sum or mean; float32, or float64 for float64 rows.

    The kernels of GPUs have no float64 rows: the reference computes them.
    """
    z = pairs.z
    backend = resolve(backend, z.device, "row_distill", z.shape[-1])
    if backend == "reference" or (backend != "cpu" and z.dtype == torch.float64):
        return reference_distill(pairs).to(loss_dtype(z.dtype))
    no_forward_mode("row_distill", pairs.arguments())
    pairs.z, pairs.teacher = (x if x.stride(-1) == 1 else x.contiguous() for x in (z, pairs.teacher))
    with_grad = torch.is_grad_enabled() and z.requires_grad and pairs.reduction != "none"
    with_grad = with_grad and z.dtype != torch.float16  # whose gradient needs the upstream loss scale at once
    return _row_distill[backend](*pairs.arguments(), with_grad)[0]


def row_distill_(pairs: Pairs, backend: str, with_grad: bool) -> Tensor:
    """Losses per token in float64, whatever the reduction; with_grad, pairs.z, contiguous, becomes the gradient of
    their sum."""
    *tensors, _num_items = pairs.arguments()[:_TENSORS]
    return _row_distill_[backend](*tensors, *pairs.arguments()[_TENSORS:-1], with_grad)


# ---------------------------------------------------------------------------------------------------------
# The operators: shapes under tracing, and autograd.


def _fake(z: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    reduction, with_grad = arguments[-2:]
    loss = z.new_empty(z.shape[:-1] if reduction == "none" else (), dtype=loss_dtype(z.dtype))
    return loss, z.new_empty(z.shape if with_grad else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    with_grad = inputs[-1]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.constants = None if with_grad else inputs[_TENSORS:-1]
    if with_grad:
        save_grads(ctx, output[1:], inputs[:1])
    else:
        ctx.save_for_backward(*inputs[:_TENSORS])


def _backward(backend: str, ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    grad = None
    if grad_loss is not None and ctx.constants is not None:
        grad = _row_distill_backward[backend](grad_loss, *ctx.saved_tensors, *ctx.constants)
    elif grad_loss is not None:
        grad = scaled(backend, ctx, grad_loss)[0]
    return (grad, *(None,) * len(dataclasses.fields(Pairs)))


def _recompute(backend: str, grad_loss: Tensor, *arguments: Any) -> Tensor:
    """The gradient for any upstream one."""
    pairs = Pairs(*arguments)
    pairs.weigh(grad_loss)
    pairs.reduction = "sum" if pairs.reduction == "none" else pairs.reduction
    return _row_distill[backend](*pairs.arguments(), True)[1]


_row_distill = define("row_distill", f"({_ROWS}, bool with_grad) -> (Tensor, Tensor)", _fake)
_row_distill_backward = define(
    "row_distill_backward", f"(Tensor grad_loss, {_ROWS}) -> Tensor", lambda grad_loss, z, *_: z.new_empty(z.shape)
)
_row_distill_ = define(
    "row_distill_",
    "(Tensor(a!) z, Tensor teacher, Tensor? ids, Tensor? mask, Tensor? weight, bool reverse, int mask_index, "
    "float scale, bool with_grad) -> Tensor",
    lambda z, *_: z.new_empty(z.shape[:-1], dtype=torch.float64),
)
for _backend in KERNELS:
    torch.library.register_autograd(
        f"fastdiff::row_distill.{_backend}", partial(_backward, _backend), setup_context=_setup_context, lib=library
    )
    implement(f"row_distill_backward.{_backend}", partial(_recompute, _backend))
    no_derivative(f"row_distill_backward.{_backend}", "double backward")


# ---------------------------------------------------------------------------------------------------------
# On a GPU. Nothing here waits for the device.


def _on_gpu(
    kernels: Any,
    z: Tensor,
    teacher: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    num_items: Tensor | None,
    reverse: bool,
    mask_index: int,
    scale: float,
    reduction: str,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    shape = z.shape[:-1]
    share = z.new_ones((), dtype=torch.float64)
    if num_items is not None:
        share = 1 / num_items
    elif reduction == "mean":
        share = share / (max(shape.numel(), 1) if mask is None else mask.sum().clamp_min(1))
    losses = z.new_empty(shape, dtype=torch.float32 if reduction == "none" else torch.float64)
    grad = z.new_empty(z.shape if with_grad else (0,))
    if shape.numel():
        kernels.launch_row_distill(
            at_most_three_dimensions(z), at_most_three_dimensions(teacher), ids, mask, weight, share,
            losses, grad if with_grad else None, reverse, mask_index, scale,
        )  # fmt: skip
    return losses if reduction == "none" else losses.sum().float(), grad


def _in_place_on_gpu(
    kernels: Any,
    z: Tensor,
    teacher: Tensor,
    ids: Tensor | None,
    mask: Tensor | None,
    weight: Tensor | None,
    reverse: bool,
    mask_index: int,
    scale: float,
    with_grad: bool,
) -> Tensor:
    losses, one = z.new_empty(z.shape[:-1], dtype=torch.float64), z.new_ones((), dtype=torch.float64)
    if losses.numel():
        kernels.launch_row_distill(
            z, teacher, ids, mask, weight, one, losses, z if with_grad else None, reverse, mask_index, scale
        )
    return losses


define_launch(
    "launch_row_distill",
    "Tensor z, Tensor teacher, Tensor? ids, Tensor? mask, Tensor? weight, Tensor share, Tensor(a!) loss, "
    "Tensor(b!)? grad, bool reverse, int mask_index, float scale",
)
implement_on_gpus("row_distill", _on_gpu, triton="distill")
implement_on_gpus("row_distill_", _in_place_on_gpu, triton="distill")


# ---------------------------------------------------------------------------------------------------------
# The same in plain PyTorch.


def reference_distill(pairs: Pairs) -> Tensor:
    scored = pairs.scored()
    z, teacher = (torch.where(scored.unsqueeze(-1), x.double(), 0) for x in (pairs.z, pairs.teacher))
    z, ids = z * pairs.scale, pairs.ids
    if ids is None:
        teacher = teacher * pairs.scale
    else:
        ids = torch.where(scored.unsqueeze(-1), ids, 0)
    mask_index = None if pairs.mask_index < 0 else pairs.mask_index
    loss = torch.where(scored, reference.distill(z, teacher, ids, mask_index, pairs.reverse), 0)
    if pairs.weight is not None:
        loss = loss * torch.where(scored, pairs.weight, 0)
    if pairs.reduction == "none":
        return loss
    loss = loss.sum()
    if pairs.reduction == "mean":
        loss = loss / (scored.sum().clamp_min(1) if pairs.num_items is None else pairs.num_items)
    return loss
