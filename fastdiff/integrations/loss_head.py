"""The last layer of a model, computing the loss in its own forward, where its weights are whole: no logits are made.

with LossHead(model).dce_loss(x0, mask=mask, weight=1 / p_mask) as loss_of:
    loss = loss_of(model(xt).logits)
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint

from fastdiff.linear_losses import linear_dce_loss, linear_dse_loss
from fastdiff.losses import RowStats, dce_rows, dse_rows
from fastdiff.ops.linear_loss import TILE_BYTES
from fastdiff.ops.row_loss import Rows, loss_dtype, row_loss, scored_tokens

PARTS = 3  # in which a gradient travels through logits: as many as 8 bits go into a float32's 24
Logits = Callable[[Tensor], Tensor]


class LossHead:
    """The last layer of a model, which for the length of a `with` computes a loss where it gives logits otherwise.

    The loss is that of the model's logits, which never exist: what the model does with them behind its last layer (it
    may scale them, cap them softly, leave out ids that are padding, or one id) is found out once, from a few tokens.
    Only scored rows are multiplied. A layer that is not an `nn.Linear` (LoRA, quantised weights) is called on some of
    them at a time, again in backward.

    Args:
        model: what is called, as it is or wrapped (DDP, FSDP, `torch.compile`).
        layer: its last layer, which it calls once in a forward; None means `model.get_output_embeddings()`.
        logits: how the model is called on a few tokens: [1, n] int64 -> logits [1, n, V]. None means
            `model(input_ids=tokens).logits`.

    Raises:
        TypeError: the model does not say what its last layer is, or it is not a module that gives logits.
    """

    def __init__(self, model: nn.Module, layer: nn.Module | None = None, *, logits: Logits | None = None) -> None:
        self.layer = _last_layer(model) if layer is None else layer
        self.logits = logits or (lambda tokens: model(input_ids=tokens).logits)

    def dce_loss(self, x0: Tensor, **options: Any) -> AbstractContextManager[Callable[[Tensor], Any]]:
        """In the `with`, a call of the model gives, in the place of logits, what the function turns into `dce_loss`.

        Args:
            x0: [...] int64, in the shape of the hidden states; what has no hidden state is left to be not scored.
            options: those of `linear_dce_loss`, but bias, softcap and group, which the layer has. With return_stats the
                function returns (loss, RowStats).

        Raises (the `with`, the model's call or the function):
            ValueError: the model does something else behind its layer, or leaves out another id than mask_index.
            RuntimeError: the layer is not called, or twice, or without gradients where these are on outside; what the
                function is given is not what the layer gave.
            ValueError, TypeError: as `linear_dce_loss`.
        """
        return self._scoring(linear_dce_loss, dce_rows, dict(options, x0=x0))

    def dse_loss(self, sigma: Any, xt: Tensor, x0: Tensor, **options: Any) -> AbstractContextManager[Any]:
        """The same for `linear_dse_loss`, whose arguments these are."""
        return self._scoring(linear_dse_loss, dse_rows, dict(options, sigma=sigma, xt=xt, x0=x0))

    @contextmanager
    def _scoring(self, linear: Callable[..., Any], rows: Callable[..., Rows], options: dict[str, Any]) -> Iterator[Any]:
        tail = _TAILS.get(self.layer)
        if tail is None:
            tail = _TAILS[self.layer] = _found_tail(self.layer, self.logits)
        scoring = _Scoring(self.layer, tail, linear, rows, tail.applied(options))
        with _in_place(self.layer, scoring):
            yield scoring.loss_of


@dataclasses.dataclass(eq=False)
class _Scoring:
    """What a layer does in the place of its logits, once, and what came of it."""

    layer: Any
    tail: "_Tail"
    linear: Callable[..., Any]
    rows: Callable[..., Rows]
    options: dict[str, Any]
    with_grad: bool = dataclasses.field(default_factory=torch.is_grad_enabled)
    loss: Tensor | None = None
    stats: RowStats | None = None
    carries: bool = False

    def __call__(self, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        if self.loss is not None:
            raise RuntimeError("LossHead: the last layer was called twice in one forward")
        if self.with_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                "LossHead: the last layer was called under torch.no_grad() in a training step (is it in a reentrant "
                "checkpoint?)"
            )
        weight = getattr(self.layer, "weight", None)
        result = self._fused(hidden) if _is_linear(self.layer, weight) else self._in_parts(forward, hidden)
        loss, self.stats = result if isinstance(result, tuple) else (result, None)
        self.loss, self.carries = loss.detach(), loss.requires_grad
        carrier = _carrier(loss, hidden.shape[:-1])
        if isinstance(weight, DTensor):  # sharded as logits are
            return DTensor.from_local(carrier, weight.device_mesh, [Shard(carrier.dim() - 1)], run_check=False)
        return carrier

    def loss_of(self, logits: Tensor) -> Any:
        """The loss, given what the model made of what its layer gave."""
        if self.loss is None:
            raise RuntimeError("LossHead: the model did not call its last layer, a " + type(self.layer).__name__)
        if isinstance(logits, DTensor):
            logits = logits.to_local()
        shape, loss = logits.shape, self.loss
        if shape[-1] % PARTS or shape[-1] == 0 or (loss.dim() and shape[:-1] != loss.shape):
            expected = (*(loss.shape if loss.dim() else ("...",)), PARTS)
            raise RuntimeError(f"LossHead: expected what the last layer gave, {expected}, got {tuple(shape)}")
        if self.carries and not logits.requires_grad:
            raise RuntimeError("LossHead: the model's output has no gradient, though the loss has")
        if self.carries:
            path = _Through.apply(logits, loss.dtype, self.tail.scale)
            loss = loss + (path if loss.dim() else path.sum())
        return loss if self.stats is None else (loss, self.stats)

    def _fused(self, hidden: Tensor) -> Any:
        weight, bias, tail = self.layer.weight, self.layer.bias, self.tail
        if tail.num_states < len(weight):
            weight, bias = weight[: tail.num_states], None if bias is None else bias[: tail.num_states]
        if tail.scale != 1:
            hidden, bias = hidden * tail.scale, None if bias is None else bias * tail.scale
        return self.linear(hidden, weight, bias=bias, softcap=tail.softcap, **self.options)

    def _in_parts(self, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Any:
        """By calls of the layer on some scored rows at a time, whose logits are made again in backward."""
        options = {"return_stats": False, "backend": None, "capacity": None} | self.options
        with_stats, backend, _ = (options.pop(name) for name in ("return_stats", "backend", "capacity"))
        rows = self.rows(hidden.detach().new_empty(()).expand(*hidden.shape[:-1], self.tail.num_states), **options)
        index = scored_tokens(rows).flatten().nonzero().squeeze(1)
        size = max(1, TILE_BYTES[hidden.device.type] // (self.tail.num_states * hidden.element_size()))

        def part(hidden: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
            chosen = dataclasses.replace(rows.at(at), z=self.tail(forward(hidden)), reduction="none", num_items=None)
            return row_loss(chosen, backend, with_stats)

        flat = hidden.flatten(0, -2)
        parts = [checkpoint(part, flat[at], at, use_reentrant=False) for at in index.split(size)]
        losses, stats = zip(*parts, strict=True)
        shape = rows.x0.shape
        loss = torch.cat(losses)
        if rows.reduction == "none":
            loss = loss.new_zeros(shape.numel()).index_put((index,), loss).view(shape)
        else:
            loss = loss.sum()
        if rows.reduction == "mean":
            loss = (loss / (len(index) if rows.num_items is None else rows.num_items)).to(loss.dtype)
        if not with_stats:
            return loss
        found = torch.cat(stats, 1)
        every = found.new_zeros(len(found), shape.numel()).index_copy(1, index, found).view(-1, *shape)
        return loss, RowStats(every[0], every[1], every[2] == 1, *every[3:])


@dataclasses.dataclass(frozen=True)
class _Tail:
    """What a model does behind its last layer: softcap * tanh(scale * z / softcap), of the first num_states ids."""

    scale: float
    softcap: float
    num_states: int
    left_out: int | None

    def __call__(self, z: Tensor) -> Tensor:
        z = z[..., : self.num_states]
        z = z if self.scale == 1 else z * self.scale
        return z if self.softcap == 0 else self.softcap * torch.tanh(z / self.softcap)

    def applied(self, options: dict[str, Any]) -> dict[str, Any]:
        """A loss's options, which leave out the id that the model does."""
        if self.left_out is None:
            return options
        said = options.get("mask_index", -1) % self.num_states
        excluded = options.get("exclude_mask", True) and "sigma" not in options
        if said == self.left_out and excluded:
            return options
        if excluded or "sigma" in options or options.get("xt") is not None:
            raise ValueError(f"mask_index: expected {self.left_out}, which the model leaves out, got {said}")
        return {**options, "mask_index": self.left_out, "exclude_mask": True}


_TAILS: WeakKeyDictionary[nn.Module, _Tail] = WeakKeyDictionary()


@torch.no_grad()
def _found_tail(layer: nn.Module, logits: Logits) -> _Tail:
    """By giving the model, in the place of a few tokens' logits, numbers of many sizes, and looking what it gives."""
    given: list[Tensor] = []

    def pattern(forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        z = forward(hidden)
        if not isinstance(z, Tensor) or z.shape[:-1] != hidden.shape[:-1]:
            raise TypeError(f"layer: expected one that gives logits [..., V], got a {type(layer).__name__}")
        dtype, g = loss_dtype(z.dtype), torch.Generator().manual_seed(0)
        sizes = torch.linspace(-6, 4, z.numel(), dtype=torch.float64)[torch.randperm(z.numel(), generator=g)]
        signs = 2 * torch.randint(0, 2, sizes.shape, generator=g) - 1
        numbers = (signs * 10**sizes).view(z.shape).to(z.device, dtype)
        given.append(numbers.clone())  # a model may scale what it gets in place
        return distribute_tensor(numbers, z.device_mesh, z.placements) if isinstance(z, DTensor) else numbers

    device = next(layer.parameters()).device
    eager = torch.compiler.set_stance("force_eager")
    with torch.random.fork_rng([device] if device.type == "cuda" else []), eager, _in_place(layer, pattern):
        found = logits(torch.zeros(1, 4, dtype=torch.int64, device=device))
    if len(given) != 1:
        raise RuntimeError(f"LossHead: expected a model that calls its last layer once, it did {len(given)} times")
    return _fitted(given[0], found)


def _fitted(z: Tensor, found: Tensor) -> _Tail:
    """The tail that makes of z what was found, both [1, n, V]."""
    if isinstance(found, DTensor):
        found = found.full_tensor()
    num_states, tolerance = found.shape[-1], 2**-7 if found.dtype.itemsize == 2 else 1e-6
    if found.shape[:-1] != z.shape[:-1] or num_states > z.shape[-1]:
        raise ValueError(f"logits: expected shape {tuple(z.shape)}, or fewer ids, got {tuple(found.shape)}")
    z, found = z[..., :num_states].flatten(0, -2).double(), found.flatten(0, -2).double()
    low = (found == -math.inf) | (found <= torch.finfo(torch.float16).min)
    out = low.all(0).nonzero().flatten().tolist()
    if out == [*range(num_states - len(out), num_states)] and len(out) != 1:
        num_states, out = num_states - len(out), []
    if len(out) > 1:
        raise ValueError(f"logits: expected at most one id left out, or the last of them, got {out[:8]}")
    kept = torch.ones(found.shape[-1], dtype=torch.bool, device=z.device)
    kept[num_states:], kept[out] = False, False
    z, found = z[:, kept], found[:, kept]
    least = z.abs().flatten().topk(max(1, z.numel() // 10), largest=False).indices
    scale = (found.flatten() / z.flatten())[least].median().item()
    scale = 1.0 if abs(scale - 1) < tolerance else scale
    for softcap in (0.0, found.abs().max().item()):
        tail = _Tail(scale, softcap, num_states, out[0] if out else None)
        if torch.allclose(dataclasses.replace(tail, num_states=z.shape[-1])(z), found, rtol=4 * tolerance, atol=0):
            return tail
    at = (scale * z - found).abs().argmax()
    was, became = z.flatten()[at].item(), found.flatten()[at].item()
    raise ValueError(
        "logits: expected a model that scales, caps (softcap * tanh) or cuts what its last layer gives, or leaves out "
        f"an id; got one that makes {became:.5g} of {was:.5g}"
    )


# ---------------------------------------------------------------------------------------------------------
# In the place of the layer's forward, and through what is behind it.


class _StandIn:
    """One forward for all calls, so that compiled code stays valid."""

    def __init__(self) -> None:
        self.own: Callable[[Tensor], Tensor] | None = None
        self.role: Any = None
        self.function = self.forward

    def forward(self, hidden: Tensor) -> Tensor:
        return self.role(self.own, hidden)


_STAND_INS: WeakKeyDictionary[nn.Module, _StandIn] = WeakKeyDictionary()


@contextmanager
def _in_place(layer: nn.Module, role: Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]) -> Iterator[None]:
    stand_in = _STAND_INS.setdefault(layer, _StandIn())
    if stand_in.role is not None:
        raise RuntimeError("LossHead: the last layer computes another loss")
    before = vars(layer).get("forward")
    stand_in.own, stand_in.role = layer.forward, role
    layer.forward = stand_in.function
    try:
        yield
    finally:
        stand_in.own = stand_in.role = None
        if before is None:
            del layer.forward
        else:
            layer.forward = before


def _carrier(loss: Tensor, shape: torch.Size) -> Tensor:
    """[..., PARTS] that leads the gradients of the logits' place to the loss; a scalar's to the first token's."""
    if loss.dim() == 0:
        loss = F.pad(loss.view(1), (0, shape.numel() - 1)).view(shape)
    return (loss - loss.detach()).unsqueeze(-1).expand(*shape, PARTS).contiguous()


class _Through(torch.autograd.Function):
    """0 for each token, with the gradient of its loss, which goes back in parts: no bit of it is rounded away."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
        ctx.dtype, ctx.ranks, ctx.scale = logits.dtype, logits.shape[-1] // PARTS, scale
        return logits.new_zeros(logits.shape[:-1], dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rest, parts = grad / ctx.scale, []
        for _ in range(PARTS):
            parts.append(rest.to(ctx.dtype))
            rest = rest - parts[-1].to(rest.dtype)
        return torch.stack(parts * ctx.ranks, -1), None, None


def _last_layer(model: nn.Module) -> nn.Module:
    for name in ("_orig_mod", "module"):  # of torch.compile, DDP and FSDP1
        while isinstance(getattr(model, name, None), nn.Module):
            model = getattr(model, name)
    layer: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(layer, nn.Module) or isinstance(layer, nn.Embedding):
        what = "nothing" if layer is None else f"a {type(layer).__name__}"
        raise TypeError(f"layer: expected a last layer, {type(model).__name__}.get_output_embeddings() gives {what}")
    return layer


def _is_linear(layer: nn.Module, weight: Any) -> bool:
    """Whether a layer is hidden @ weight.T + bias, with weights of plain numbers."""
    plain = type(weight) in (Tensor, nn.Parameter, DTensor)
    return plain and isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward
