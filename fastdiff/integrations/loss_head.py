"""The last layer of a model, computing the loss in its own forward, where its weights are whole: no logits are made.

with LossHead(model).dce_loss(x0, mask=mask, weight=1 / p_mask) as loss_of:
    loss = loss_of(model(xt).logits)
"""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from fastdiff.checks import check_tensor
from fastdiff.integrations.tail import Tail, fitted, numbers
from fastdiff.losses.linear_losses import linear_dce_loss, linear_dse_loss
from fastdiff.losses.logps import linear_token_logps, token_logps
from fastdiff.losses.mixture import linear_mixture_loss, mixture_rows
from fastdiff.losses.row_losses import RowStats, dce_rows, dse_rows, row_stats
from fastdiff.ops.chunks import TILE_BYTES
from fastdiff.ops.parallel import shard_of
from fastdiff.ops.row_loss import Rows, loss_dtype, row_loss, scored_tokens

PARTS = 3  # in which a gradient travels through logits: as many as 8 bits go into a float32's 24
Logits = Callable[[Tensor], Tensor]
Forward = Callable[[Tensor], Tensor]


class LossHead:
    """The last layer of a model, which for the length of a `with` computes a loss where it gives logits otherwise.

    The loss is that of the model's logits, which never exist: what the model does with them behind its last layer (it
    may scale them, cap them softly, leave out ids that are padding, or one id) is found out once, from a few tokens,
    and looked after in each step. Only scored rows are multiplied. A layer that is not an `nn.Linear` (LoRA, quantised
    weights) is called on some of them at a time, again in backward.

    Args:
        model: what is called, as it is or wrapped (DDP, FSDP, `torch.compile`).
        layer: its last layer, which it calls once in a forward; None means `model.get_output_embeddings()`.
        logits: how the model is called on a few tokens: [1, n] int64 -> logits [1, n, V]. None means
            `model(input_ids=tokens).logits`.

    Raises:
        TypeError: the model does not say what its last layer is.
    """

    def __init__(self, model: nn.Module, layer: nn.Module | None = None, *, logits: Logits | None = None) -> None:
        self.model, self.layer = model, _unwrapped(_last_layer(model) if layer is None else layer)
        self.logits = logits or (lambda tokens: model(input_ids=tokens).logits)

    def dce_loss(self, x0: Tensor, **options: Any) -> AbstractContextManager[Callable[[Tensor], Any]]:
        """In the `with`, a call of the model gives, in the place of logits, what the function turns into `dce_loss`.

        Args:
            x0: [...] int64, in the shape of the hidden states; what has no hidden state is left to be not scored.
            options: those of `linear_dce_loss`, but bias, softcap and group, which the layer has. With return_stats the
                function returns (loss, RowStats).

        Raises (the `with`, the model's call or the function):
            ValueError: the model does something else behind its layer, or leaves out another id than mask_index.
            RuntimeError: `logits` fails; the layer is not called, or twice, or without gradients where these are on
                outside; what the function is given is not what the model makes of what the layer gave.
            ValueError, TypeError: as `linear_dce_loss`.
        """
        return self._scoring(linear_dce_loss, dce_rows, _losses_of, dict(options, x0=x0))

    @contextmanager
    def token_logps(self, x0: Tensor, **options: Any) -> Iterator[Callable[[Tensor], Any]]:
        """The same for `linear_token_logps`, whose options these are, but bias, softcap and group.

        With return_entropy the function returns (log-probabilities, entropy), each with its gradient.
        """
        with self._scoring(_linear_logps, dce_rows, _logps_of, dict(options, x0=x0)) as logps_of:
            yield (lambda logits: logps_of(logits).unbind()) if options.get("return_entropy") else logps_of

    def dse_loss(self, sigma: Any, xt: Tensor, x0: Tensor, **options: Any) -> AbstractContextManager[Any]:
        """The same for `linear_dse_loss`, whose arguments these are."""
        return self._scoring(linear_dse_loss, dse_rows, _losses_of, dict(options, sigma=sigma, xt=xt, x0=x0))

    def mixture_loss(
        self, sigma: Any, share: Any, xt: Tensor, x0: Tensor, **options: Any
    ) -> AbstractContextManager[Any]:
        """The same for `linear_mixture_loss`, whose arguments these are."""
        options |= dict(sigma=sigma, share=share, xt=xt, x0=x0)
        return self._scoring(linear_mixture_loss, mixture_rows, _losses_of, options)

    @contextmanager
    def _scoring(
        self, linear: Callable[..., Any], rows: Callable[..., Rows], part: Callable[..., Any], options: dict[str, Any]
    ) -> Iterator[Any]:
        check_tensor("x0", options["x0"])
        known = _BEHIND.setdefault(self.layer, WeakKeyDictionary())
        if self.model not in known:
            known[self.model] = _found_out(self.model, self.layer, self.logits, options["x0"].device)
        behind = known[self.model]
        scoring = _Scoring(self.layer, behind, linear, rows, part, behind.tail.applied(options))
        try:
            with _in_place(self.layer, scoring):
                yield scoring.loss_of
        except Exception:
            known.pop(self.model, None)  # so that a model which was changed on purpose is asked again
            raise


@dataclasses.dataclass(eq=False)
class _Scoring:
    """What a layer does in the place of its logits, once, and what came of it."""

    layer: Any
    behind: "_Behind"
    linear: Callable[..., Any]
    rows: Callable[..., Rows]
    part: Callable[..., tuple[Tensor, Tensor | None]]  # of some rows and their logits
    options: dict[str, Any]
    with_grad: bool = dataclasses.field(default_factory=torch.is_grad_enabled)
    loss: Tensor | None = None
    stats: RowStats | None = None
    carries: bool = False

    def __call__(self, forward: Forward, hidden: Tensor) -> Tensor:
        if self.loss is not None:
            raise RuntimeError("LossHead: the last layer was called twice in one forward")
        if self.with_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                "LossHead: the last layer was called under torch.no_grad() in a training step (is it in a reentrant "
                "checkpoint?)"
            )
        weight: Any = getattr(self.layer, "weight", None)
        linear = _is_linear(forward, weight)
        result = self._fused(hidden, weight) if linear else self._in_parts(forward, hidden)
        loss, self.stats = result if isinstance(result, tuple) else (result, None)
        self.loss, self.carries = loss.detach(), loss.requires_grad
        rows = self.behind.rows(loss, hidden.dim())
        return _sharded(rows, weight.device_mesh, len(weight)) if isinstance(weight, DTensor) else rows

    def loss_of(self, logits: Tensor) -> Any:
        """The loss, given what the model made of what its layer gave."""
        check_tensor("logits", logits)
        if self.loss is None:
            raise RuntimeError("LossHead: the model did not call its last layer, a " + type(self.layer).__name__)
        path = self.behind.path(logits, self.loss)
        if self.carries and not path.requires_grad:
            raise RuntimeError("LossHead: the model's output has no gradient, though the loss has")
        loss = self.loss + path
        return loss if self.stats is None else (loss, self.stats)

    def _fused(self, hidden: Tensor, weight: Tensor) -> Any:
        bias, tail = self.layer.bias, self.behind.tail
        if tail.num_states < len(weight):
            weight, bias = weight[: tail.num_states], None if bias is None else bias[: tail.num_states]
        if tail.scale != 1:
            hidden, bias = hidden * tail.scale, None if bias is None else bias * tail.scale
        return self.linear(hidden, weight, bias=bias, softcap=tail.softcap, **self.options)

    @torch.compiler.disable
    def _in_parts(self, forward: Forward, hidden: Tensor) -> Any:
        """By calls of the layer on some scored rows at a time, whose logits are made again in backward."""
        options, tail = dict(self.options), self.behind.tail
        apart = {name: options.pop(name) for name in _NOT_OF_ROWS if name in options}
        rows = self.rows(hidden.detach().new_empty(()).expand(*hidden.shape[:-1], tail.num_states), **options)
        index = scored_tokens(rows).flatten().nonzero().squeeze(1)
        # As many parts as all tokens would need: on each rank as many, should the layer gather its weights.
        size = rows.x0.numel() * tail.num_states * hidden.element_size()
        count = max(1, -(-size // TILE_BYTES[hidden.device.type]))

        def part(hidden: Tensor, at: Tensor) -> tuple[Tensor, Tensor | None]:
            z = forward(hidden)
            if isinstance(z, DTensor):
                raise TypeError(f"layer: expected an nn.Linear where ids are cut over ranks, got {type(self.layer)}")
            return self.part(dataclasses.replace(rows.at(at), z=tail(z), reduction="none", num_items=None), **apart)

        flat = hidden.flatten(0, -2)
        parts = [checkpoint(part, flat[at], at, use_reentrant=False) for at in index.tensor_split(count)]
        losses, stats = zip(*parts, strict=True)
        shape = rows.x0.shape
        loss = torch.cat(losses, -1)
        if rows.reduction == "none":
            loss = loss.new_zeros(*loss.shape[:-1], shape.numel()).index_copy(-1, index, loss).unflatten(-1, shape)
        else:
            loss = loss.sum()
        if rows.reduction == "mean":
            loss = (loss / (max(1, len(index)) if rows.num_items is None else rows.num_items)).to(loss.dtype)
        if not apart.get("return_stats"):
            return loss
        found = torch.cat(stats, 1)
        every = found.new_zeros(len(found), shape.numel()).index_copy(1, index, found).view(-1, *shape)
        return loss, row_stats(every)


_NOT_OF_ROWS = ("return_stats", "backend", "capacity", "summed", "temperature", "return_entropy")


def _losses_of(rows: Rows, return_stats: bool = False, backend: str | None = None, **_: Any) -> tuple[Tensor, Tensor]:
    return row_loss(rows, backend, return_stats)


def _logps_of(rows: Rows, capacity: int | None = None, **options: Any) -> tuple[Tensor, None]:
    options |= dict(mask_index=rows.mask_index, exclude_mask=rows.exclude_mask)
    return _stacked(token_logps(rows.z, rows.x0, **options)), None


def _linear_logps(*arguments: Any, **options: Any) -> Tensor:
    return _stacked(linear_token_logps(*arguments, **options))


def _stacked(found: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Log-probabilities, or [2, ...] with entropies."""
    return found if isinstance(found, Tensor) else torch.stack(found)


@dataclasses.dataclass(frozen=True)
class _Behind:
    """What is behind a layer, and how a gradient comes through it: in rows that are given in the place of logits.

    The first row is one of numbers, and what the model makes of it is known. In the others each number of a loss has a
    column, of an id that the model keeps, and PARTS rows.
    """

    tail: Tail
    given: Tensor  # [V], of the ids that this rank has
    found: Tensor  # [V], of those, or of all if the model gathers them
    start: int  # the first of the columns in given, and how many
    columns: int
    first: int  # where given begins in found

    def rows(self, loss: Tensor, dim: int) -> Tensor:
        """[1, ..., n, V] of as many dimensions; no view, for a wrapper's hooks see no change of one."""
        numbers = (loss - loss.detach()).flatten()
        length = -(-len(numbers) // self.columns)
        path = F.pad(numbers, (0, length * self.columns - len(numbers))).view(length, self.columns)
        path = F.pad(path, (self.start, len(self.given) - self.start - self.columns))
        rows = (self.given.to(loss.dtype).unsqueeze(0), path.repeat(PARTS, 1))
        return torch.cat([row.view((1,) * (dim - 2) + row.shape) for row in rows], -2)

    def path(self, logits: Tensor, loss: Tensor) -> Tensor:
        """Zeros in the shape of the loss, whose gradient comes to the numbers in the rows."""
        if isinstance(logits, DTensor):
            logits = logits.to_local()
        size, width = loss.numel(), len(self.found)
        length = PARTS * -(-size // self.columns)
        if logits.dim() < 2 or logits.shape[-1] != width or logits.numel() != (1 + length) * width:
            expected = f"[..., {width}] in {1 + length} rows"
            raise RuntimeError(f"LossHead: expected what the last layer gave, {expected}, got {tuple(logits.shape)}")
        row, *_ = rows = logits.flatten(0, -2)
        tolerance = 2**-6 if row.dtype.itemsize == 2 else 1e-5
        same = torch.isclose(row.detach().to(self.found.dtype), self.found, tolerance, tolerance)
        torch._assert_async(same.all(), "LossHead: the model does something else behind its last layer than it did")
        start = self.start + self.first
        path = rows[1:, start : start + self.columns].reshape(PARTS, -1)[:, :size]
        return _Through.apply(path, loss.dtype, self.tail.scale).view(loss.shape)


class _Through(torch.autograd.Function):
    """Zeros whose gradient goes back in parts: no bit of it is rounded away."""

    @staticmethod
    def forward(ctx: Any, path: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
        ctx.dtype, ctx.scale = path.dtype, scale
        return path.new_zeros(path.shape[1], dtype=dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rest, parts = grad / ctx.scale, []
        for _ in range(PARTS):
            parts.append(rest.to(ctx.dtype))
            rest = rest - parts[-1].to(rest.dtype)
        return torch.stack(parts), None, None


_BEHIND: WeakKeyDictionary[nn.Module, WeakKeyDictionary[nn.Module, _Behind]] = WeakKeyDictionary()


@torch.no_grad()
def _found_out(model: nn.Module, layer: nn.Module, logits: Logits, device: torch.device) -> _Behind:
    """By giving the model numbers in the place of a few tokens' logits, and looking what it makes of them."""
    calls: list[tuple[Any, ...]] = []

    def numbers_instead(forward: Forward, hidden: Tensor) -> Tensor:
        z: Any = forward(hidden)
        if not isinstance(z, Tensor) or z.shape[:-1] != hidden.shape[:-1] or z.shape[:-1].numel() != 4:
            raise TypeError(f"layer: expected one that gives each token's logits, got a {type(layer).__name__}")
        own, shard = shard_of("layer", z, -1, None)
        mesh, first = (getattr(z, "device_mesh", None), shard.first) if shard.group else (None, 0)
        every = numbers(shard.all_states).to(own.device, loss_dtype(z.dtype))
        given = every[:, first : first + own.shape[-1]]
        calls.append((every, given, first, mesh))
        given = given.reshape(own.shape).clone()  # which the model may change
        return _sharded(given, z.device_mesh, shard.all_states) if isinstance(z, DTensor) else given

    tokens = torch.zeros(1, 4, dtype=torch.int64, device=device)
    random = torch.random.fork_rng([device] if device.type == "cuda" else [])
    eager = torch.compiler.set_stance("force_eager")
    with random, eager, _left_alone(model), _in_place(layer, numbers_instead):
        try:
            found = logits(tokens)
        except Exception as error:
            raise RuntimeError(
                "logits: expected a way to call the model on tokens, int64 [1, 4], that gives their logits (when none "
                f"is given, model(input_ids=tokens).logits), got {type(error).__name__}: {error}"
            ) from error
    if len(calls) != 1:
        raise RuntimeError(f"LossHead: expected a model that calls its last layer once, it did {len(calls)} times")
    every, given, first, mesh = calls[0]
    check_tensor("logits", found)
    own, num_logits = found, every.shape[1]
    if mesh is not None and not isinstance(found, DTensor) and found.shape[-1] == given.shape[1] != num_logits:
        found = _sharded(found, mesh, num_logits)
    if isinstance(found, DTensor):
        own, found = found.to_local(), found.full_tensor()
    if found.shape[-1] > num_logits or found.numel() != 4 * found.shape[-1]:
        raise ValueError(f"logits: expected [1, 4, {num_logits}], or fewer ids, got {tuple(found.shape)}")
    tail, ranks = fitted(every.double(), found.flatten(0, -2)), 1 if mesh is None else mesh.size()
    if tail.num_states < num_logits and ranks > 1:
        raise ValueError("layer: expected no ids that the model leaves out as padding, where they are cut over ranks")
    fewest = min(tail.num_states, num_logits - (ranks - 1) * -(-num_logits // ranks))
    columns = max(1, (fewest - 1) // 2)
    start = columns if tail.left_out is not None and 0 <= tail.left_out - first < columns else 0
    got = own.flatten(0, -2)[0]
    return _Behind(tail, given[0], got, start, columns, first if len(got) == num_logits else 0)


def _sharded(own: Tensor, mesh: Any, num_ids: int) -> DTensor:
    """Rows of which a rank of the mesh has its own ids."""
    shape = torch.Size((*own.shape[:-1], num_ids))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, mesh, [Shard(own.dim() - 1)], run_check=False, shape=shape, stride=stride)


@contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """What counts what it sees (BatchNorm, spectral_norm) has buffers for that, and does not in evaluation mode.

    What has none stays in training: some quantised layers are made into others when they are evaluated.
    """
    counting = [module for module in model.modules() if module.training and module._buffers]
    for module in counting:
        module.training = False
    try:
        yield
    finally:
        for module in counting:
            module.training = True


# ---------------------------------------------------------------------------------------------------------
# In the place of the layer's forward.


# By layer, its own forward and what is called with it. Compiled code takes these from here, whatever the step; reached
# through the layer's attributes, x0 would have a fixed shape for it.
_ROLES: dict[int, tuple[Forward, Callable[[Forward, Tensor], Tensor]]] = {}


@contextmanager
def _in_place(layer: nn.Module, role: Callable[[Forward, Tensor], Tensor]) -> Iterator[None]:
    key = id(layer)
    if key in _ROLES:
        raise RuntimeError("LossHead: the last layer computes another loss")

    def forward(hidden: Tensor) -> Tensor:
        own, role = _ROLES[key]
        return role(own, hidden)

    before = vars(layer).get("forward")
    _ROLES[key], layer.forward = (layer.forward, role), forward
    try:
        yield
    finally:
        del _ROLES[key]
        if before is None:
            del layer.forward
        else:
            layer.forward = before


def _last_layer(model: Any) -> nn.Module:
    while not hasattr(model, "get_output_embeddings") and hasattr(model, "module"):
        model = model.module  # of DDP or DeepSpeed
    layer = getattr(model, "get_output_embeddings", lambda: None)()
    if not isinstance(layer, nn.Module) or isinstance(layer, nn.Embedding):
        what = "nothing" if layer is None else f"a {type(layer).__name__}"
        raise TypeError(f"layer: expected a last layer, {type(model).__name__}.get_output_embeddings() gives {what}")
    return layer


def _unwrapped(layer: Any) -> nn.Module:
    """The layer in whose forward weights are whole, where it is compiled or in FSDP1 by itself."""
    layer = getattr(layer, "_orig_mod", layer)
    return getattr(layer, "_fsdp_wrapped_module", layer)


def _is_linear(forward: Forward, weight: Any) -> bool:
    """Whether a layer is hidden @ weight.T + bias, with weights of plain numbers."""
    plain = type(weight) in (Tensor, nn.Parameter, DTensor)
    return plain and getattr(forward, "__func__", None) is nn.Linear.forward
