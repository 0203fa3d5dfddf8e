"""The row losses: one read of each scored row gives its loss and, for a scalar loss, its gradient."""

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff.backends import KERNELS, resolve
from fastdiff.checks import check_values, values_are_checked
from fastdiff.ops.functors import FUNCTORS
from fastdiff.ops.gpu import at_most_three_dimensions, define_launch, implement_on_gpus
from fastdiff.ops.library import define, implement, library, no_derivative, no_forward_mode
from fastdiff.ops.saved_grads import save_grads, scaled

# z [..., V] with any strides before the last; x0, xt int64, mask bool, sigma, weight, entropy_weight and extra float64,
# contiguous [...]; num_items float64 []. entropy_weight times the row's entropy is added to dce's weighted loss; extra
# is one more number a row, which the functor gives its meaning; penalty is the weight, in what weight weighs, of
# logsumexp^2 (dce, loo) or of -log c_x0 (d3pm_uniform). functor: a name in FUNCTORS.
# Returns the loss, [...] or []; the gradient of a scalar one, [..., V], or empty; and the statistics, as new_stats has
# them, of which beside losses per token the entropy has a gradient too.
_TOKENS = "Tensor x0, Tensor? xt, Tensor? mask, Tensor? sigma, Tensor? weight, Tensor? entropy_weight, Tensor? extra"
_CONSTANTS = "str functor, int mask_index, bool exclude_mask, int ignore_index, bool scale_by_sigma, float penalty"
ROWS = f"{_TOKENS}, Tensor? num_items, {_CONSTANTS}, str reduction"  # but z

ENTROPY = 1  # which of the statistics it is
IGNORE_NONE = -(2**63)  # an ignore_index that is no id


@dataclasses.dataclass
class Rows:
    """The arguments of one call, in the operator's order."""

    z: Tensor
    x0: Tensor
    xt: Tensor | None
    mask: Tensor | None
    sigma: Tensor | None
    weight: Tensor | None
    entropy_weight: Tensor | None
    extra: Tensor | None
    num_items: Tensor | None
    functor: str
    mask_index: int
    exclude_mask: bool
    ignore_index: int
    scale_by_sigma: bool
    penalty: float
    reduction: str

    def arguments(self) -> tuple[Any, ...]:
        return *self.tensors(), *self.constants()

    def tensors(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in _TENSOR_NAMES)

    def constants(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in _NAMES[len(_TENSOR_NAMES) :])

    def at(self, index: Tensor) -> "Rows":
        """What is known of some of the tokens, flattened; z is still that of all."""
        names = ("x0", "xt", "mask", "sigma", "weight", "entropy_weight", "extra")
        given = {name: getattr(self, name) for name in names}
        chosen: dict[str, Any] = {name: None if t is None else t.flatten()[index] for name, t in given.items()}
        return dataclasses.replace(self, **chosen)

    def weigh(self, grad_loss: Tensor | None, grad_entropy: Tensor | None) -> None:
        """Takes upstream gradients, of the losses and of the entropies, as weights of a summed loss."""
        upstream = torch.zeros((), device=self.x0.device) if grad_loss is None else grad_loss
        upstream = upstream.double().expand(self.x0.shape).contiguous()
        self.weight = upstream if self.weight is None else self.weight * upstream
        if self.entropy_weight is not None:
            self.entropy_weight = self.entropy_weight * upstream
        if grad_entropy is not None:
            added = 0 if self.entropy_weight is None else self.entropy_weight
            self.entropy_weight = grad_entropy.double().contiguous() + added


_NAMES = [field.name for field in dataclasses.fields(Rows)]
_TENSOR_NAMES = _NAMES[: _NAMES.index("functor")]


def row_loss(rows: Rows, backend: str | None, with_stats: bool = False) -> tuple[Tensor, Tensor]:
    """Loss per token, or its sum or mean, and the statistics if asked for; float32, or float64 for float64 rows.

    The kernels of GPUs have no float64 rows: the reference computes them.
    """
    backend = resolve(backend, rows.z.device, "row_loss", rows.z.shape[-1])
    if backend == "reference" or (backend != "cpu" and rows.z.dtype == torch.float64):
        dtype, rows.z = loss_dtype(rows.z.dtype), rows.z.double()  # once: to it both gradients come unrounded
        return reference_loss(rows).to(dtype), reference_stats(rows, with_stats).to(dtype)
    no_forward_mode("row_loss", rows.arguments())
    if backend != "cpu":  # whose kernel checks values itself
        check_row_values(rows)
    if rows.z.stride(-1) != 1:
        rows.z = rows.z.contiguous()
    with_grad = torch.is_grad_enabled() and rows.z.requires_grad and rows.reduction != "none"
    with_grad = with_grad and rows.z.dtype != torch.float16  # whose gradient needs the upstream loss scale at once
    loss, _, stats = _row_loss[backend](*rows.arguments(), with_grad, with_stats)
    return loss, stats


def row_loss_grad(rows: Rows, upstream: Tensor) -> Tensor:
    """The gradient of the losses per token with respect to z, given theirs, [...]: for a backward that is traced."""
    backend = resolve(None, rows.z.device, "row_loss", rows.z.shape[-1])
    if backend == "reference" or (backend != "cpu" and rows.z.dtype == torch.float64):
        rows.z = rows.z.detach().requires_grad_()
        with torch.enable_grad():
            loss = reference_loss(rows)
        return torch.autograd.grad(loss, rows.z, upstream)[0]
    if rows.z.stride(-1) != 1:
        rows.z = rows.z.contiguous()
    return _row_loss_backward[backend](upstream, None, *rows.arguments())


def row_losses_(
    rows: Rows, backend: str, all_states: int, with_grad: bool, with_stats: bool = False
) -> tuple[Tensor, Tensor]:
    """Losses per token in float64, whatever the reduction, and the statistics if asked for; with_grad, rows.z becomes
    the gradient of the losses' sum.

    Where rows.z, contiguous, holds a part of all_states numbers, ids count from its first; x0 is -1 if it is
    elsewhere, xt -1 then or, if it is not x0, -2. The loss is this part's: of cross-entropy, the part's log-sum-exp.
    """
    *tensors, _num_items = rows.tensors()
    *constants, _reduction = rows.constants()
    return _row_loss_[backend](*tensors, *constants, all_states, with_grad, with_stats)


# ---------------------------------------------------------------------------------------------------------
# The operators: shapes under tracing, and autograd.


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, with_grad, with_stats = arguments
    rows = Rows(*given)
    z, shape = rows.z, rows.x0.shape if rows.reduction == "none" else ()
    grad = z.new_empty(z.shape if with_grad else (0,))
    return z.new_empty(shape, dtype=loss_dtype(z.dtype)), grad, new_stats(rows.x0, z.dtype, with_stats)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *given, with_grad, with_stats = inputs
    rows = Rows(*given)
    with_entropy = rows.reduction == "none" and with_stats
    ctx.mark_non_differentiable(*output[1 : 2 if with_entropy else 3])
    ctx.set_materialize_grads(False)  # or the unused gradient of the gradient would be a zero [..., V]
    ctx.constants = None if with_grad else rows.constants()
    if with_grad:
        save_grads(ctx, output[1:2], (rows.z,))
    else:
        ctx.save_for_backward(*rows.tensors())


def _backward(
    backend: str, ctx: Any, grad_loss: Tensor | None, _: None, grad_stats: Tensor | None
) -> tuple[Tensor | None, ...]:
    grad = None
    if ctx.constants is not None and not (grad_loss is None and grad_stats is None):
        grad_entropy = None if grad_stats is None else grad_stats[ENTROPY]
        grad = _row_loss_backward[backend](grad_loss, grad_entropy, *ctx.saved_tensors, *ctx.constants)
    elif grad_loss is not None:
        grad = scaled(backend, ctx, grad_loss)[0]
    return (grad, *(None,) * (len(dataclasses.fields(Rows)) + 1))


def _recompute(backend: str, grad_loss: Tensor | None, grad_entropy: Tensor | None, *arguments: Any) -> Tensor:
    """The gradient for any upstream ones."""
    rows = Rows(*arguments)
    rows.weigh(grad_loss, grad_entropy)
    rows.reduction = "sum" if rows.reduction == "none" else rows.reduction
    return _row_loss[backend](*rows.arguments(), True, False)[1]


_row_loss = define(
    "row_loss", f"(Tensor z, {ROWS}, bool with_grad, bool with_stats) -> (Tensor, Tensor, Tensor)", _fake
)
_row_loss_backward = define(
    "row_loss_backward",
    f"(Tensor? grad_loss, Tensor? grad_entropy, Tensor z, {ROWS}) -> Tensor",
    lambda grad_loss, grad_entropy, z, *_: z.new_empty(z.shape),
)
_row_loss_ = define(
    "row_loss_",
    f"(Tensor(a!) z, {_TOKENS}, {_CONSTANTS}, SymInt all_states, bool with_grad, bool with_stats) -> (Tensor, Tensor)",
    lambda z, x0, *rest: (z.new_empty(x0.shape, dtype=torch.float64), new_stats(x0, z.dtype, rest[-1])),
)
for _backend in KERNELS:
    torch.library.register_autograd(
        f"fastdiff::row_loss.{_backend}", partial(_backward, _backend), setup_context=_setup_context, lib=library
    )
    implement(f"row_loss_backward.{_backend}", partial(_recompute, _backend))
    no_derivative(f"row_loss_backward.{_backend}", "double backward")


# ---------------------------------------------------------------------------------------------------------
# On a GPU. Nothing here waits for the device.


def _on_gpu(kernels: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, with_grad, with_stats = arguments
    rows = Rows(*given)
    z, x0 = rows.z, rows.x0
    scale = z.new_ones((), dtype=torch.float64)
    if rows.num_items is not None:
        scale = 1 / rows.num_items
    elif rows.reduction == "mean":
        scale = 1 / scored_tokens(rows).sum().clamp_min(1).double()
    losses = z.new_empty(x0.shape, dtype=torch.float32 if rows.reduction == "none" else torch.float64)
    grad = z.new_empty(z.shape if with_grad else (0,))
    stats = new_stats(x0, z.dtype, with_stats)
    _launch(kernels, rows, scale, losses, grad if with_grad else None, stats, z.shape[-1])
    loss = losses if rows.reduction == "none" else losses.sum().float()
    return loss, grad, stats


def _in_place_on_gpu(kernels: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
    *given, all_states, with_grad, with_stats = arguments
    names = [name for name in _NAMES if name not in ("num_items", "reduction")]
    rows = Rows(**dict(zip(names, given, strict=True)), num_items=None, reduction="none")
    z, x0 = rows.z, rows.x0
    losses, one = z.new_empty(x0.shape, dtype=torch.float64), z.new_ones((), dtype=torch.float64)
    stats = new_stats(x0, z.dtype, with_stats)
    _launch(kernels, rows, one, losses, z if with_grad else None, stats, all_states)
    return losses, stats


def _launch(
    kernels: Any, rows: Rows, scale: Tensor, losses: Tensor, grad: Tensor | None, stats: Tensor, all_states: int
) -> None:
    if not rows.x0.numel():
        return
    z, *tokens, _num_items = rows.tensors()
    *constants, _reduction = rows.constants()
    stats_or_none = stats if len(stats) else None
    z = at_most_three_dimensions(z)
    kernels.launch_row_loss(
        z, *tokens, scale, losses, z if grad is rows.z else grad, stats_or_none, *constants, all_states
    )


define_launch(
    "launch_row_loss",
    f"Tensor z, {_TOKENS}, Tensor scale, Tensor(a!) loss, Tensor(b!)? grad, Tensor(c!)? stats, {_CONSTANTS}, "
    "int all_states",
)
implement_on_gpus("row_loss", _on_gpu, triton="row_loss")
implement_on_gpus("row_loss_", _in_place_on_gpu, triton="row_loss")


# ---------------------------------------------------------------------------------------------------------
# The same in plain PyTorch.


def reference_loss(rows: Rows) -> Tensor:
    check_row_values(rows)
    scored = scored_tokens(rows)
    loss = torch.where(scored, FUNCTORS[rows.functor].formula(_harmless(rows, scored)), 0)
    if rows.weight is not None:
        loss = loss * torch.where(scored, rows.weight, 0)
    if rows.entropy_weight is not None:
        loss = loss + torch.where(scored, rows.entropy_weight, 0) * reference_stats(rows, True)[ENTROPY]
    if rows.reduction != "none":
        loss = loss.sum()
    if rows.reduction == "mean":
        loss = loss / (scored.sum().clamp_min(1) if rows.num_items is None else rows.num_items)
    return loss.to(loss_dtype(rows.z.dtype))


def _harmless(rows: Rows, scored: Tensor) -> Rows:
    """The rows as formulas take them, where unscored tokens hold numbers that none minds."""
    functor = FUNCTORS[rows.functor]

    def safe(t: Tensor | None, otherwise: int) -> Any:
        return None if t is None else torch.where(scored, t, otherwise)

    z = torch.where(scored.unsqueeze(-1), rows.z, 0)  # unscored rows are not read, not even for NaN
    x0, xt, sigma, extra = safe(rows.x0, 0), safe(rows.xt, 0), safe(rows.sigma, 1), safe(rows.extra, 0)
    if functor.of_scores and rows.weight is not None:
        # A weight of 0 leaves nothing of a finite score, though its exponential be infinite.
        z = torch.where((rows.weight != 0).unsqueeze(-1) | ~z.isfinite(), z, 0)
    if rows.scale_by_sigma:
        z = reference.scale_by_sigma(z, sigma, xt)
    given = dataclasses.replace(rows, z=z, x0=x0, xt=xt, sigma=sigma, extra=extra, mask=scored)
    return given if functor.logits is None else dataclasses.replace(given, z=functor.logits(given))


def reference_stats(rows: Rows, with_stats: bool) -> Tensor:
    if not with_stats:
        return new_stats(rows.x0, rows.z.dtype, False)
    scored = scored_tokens(rows)
    given = _harmless(rows, scored)
    stats = reference.dce_stats(given.z, given.x0, rows.mask_index if rows.exclude_mask else None)
    return torch.where(scored, stats, 0).to(loss_dtype(rows.z.dtype))


def scored_tokens(rows: Rows) -> Tensor:
    """Which tokens have a loss, bool [...]."""
    live = rows.x0 != rows.ignore_index
    if rows.mask is not None:
        return live & rows.mask
    return live & (rows.xt == rows.mask_index) if FUNCTORS[rows.functor].masked and rows.xt is not None else live


def check_row_values(rows: Rows) -> None:
    """What the kernels check of the values, RowLoss::check in csrc/cpu/row_loss_cpu.h."""
    if not values_are_checked(rows.x0.device):
        return
    functor, x0, xt, sigma, num_states = FUNCTORS[rows.functor], rows.x0, rows.xt, rows.sigma, rows.z.shape[-1]
    live, scored = x0 != rows.ignore_index, scored_tokens(rows)
    check_values("x0", x0, live & ((x0 < 0) | (x0 >= num_states)), f"ids in [0, {num_states})")
    if xt is not None and functor.masked:
        wrong = live & (xt != rows.mask_index) & (xt != x0)
        check_values("xt", xt, wrong, f"x0 or the mask {rows.mask_index} (are xt and x0 swapped?)")
    elif xt is not None:
        check_values("xt", xt, live & ((xt < 0) | (xt >= num_states)), f"ids in [0, {num_states})")
    if functor.apart == "mask" and rows.exclude_mask:
        check_values("x0", x0, scored & (x0 == rows.mask_index), "a token, not the mask")
    if sigma is not None:
        check_values("sigma", sigma, live & ~((sigma >= 0) & sigma.isfinite()), "finite numbers >= 0")
        clean = functor.clean and not rows.scale_by_sigma
        needed = scored & (xt != x0) & functor.of_scores if clean else scored
        check_values("sigma", sigma, needed & (sigma == 0), "numbers > 0 where a token was masked or moved")
    if rows.extra is not None and functor.extra is not None and functor.extra_range is not None:
        wrong, expected = functor.extra_range(rows)
        check_values(functor.extra, rows.extra, scored & wrong, expected)


def new_stats(x0: Tensor, dtype: torch.dtype, with_stats: bool) -> Tensor:
    """Room for statistics over numbers of a type: log-sum-exp, ENTROPY, whether x0 is the argmax, and -log p of x0,
    [4, ...]; or [0, ...]."""
    return x0.new_empty((4 if with_stats else 0, *x0.shape), dtype=loss_dtype(dtype))


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of a loss over numbers of a type, and of sums of them."""
    return torch.float64 if dtype == torch.float64 else torch.float32
