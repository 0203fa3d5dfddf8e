"""Tokens drawn from rows: one read of a row gives a token, how sure the model is of it, and the argmax."""

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff.backends import KERNELS, resolve
from fastdiff.checks import check_values
from fastdiff.ops.gpu import at_most_three_dimensions, define_launch, implement_on_gpus
from fastdiff.ops.library import define, no_derivative, no_forward_mode
from fastdiff.philox import Purpose, draw32

RACE_CLASSES = 1024  # see reference.race


@dataclasses.dataclass
class SampleRows:
    """The arguments of one call, in the operator's order. Only live rows are read.

    z [..., V] with any strides before the last; xt, sample_ids and positions int64, live bool, contiguous [...]; law
    float64 [..., 4], see reference.reverse_weights; exclude int64 [n], ids that are not drawn; seed, step int64 [].
    temperature 0 takes the largest; top_k 0 and top_p 1 keep all. With a law, these apply to what replaces x_t, and
    top_k and top_p are off.

    Draws: draw32(seed, RACE, step, sample_id, position, c + j RACE_CLASSES), j = 0 for class c, j = 1 + k for its k-th
    id; draw32(seed, STEP, step, sample_id, 0, position) for whether x_t stays, where a law says how likely that is.
    """

    z: Tensor
    xt: Tensor
    live: Tensor
    law: Tensor | None
    exclude: Tensor | None
    seed: Tensor
    step: Tensor
    sample_ids: Tensor
    positions: Tensor
    temperature: float
    top_k: int
    top_p: float
    with_stats: bool

    def arguments(self) -> tuple[Any, ...]:
        return tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def at(self, z: Tensor, *index: Tensor) -> "SampleRows":
        """Some of the tokens, by index, and their rows z."""
        names = ("xt", "live", "law", "sample_ids", "positions")
        given = {name: getattr(self, name) for name in names}
        chosen: dict[str, Any] = {name: None if t is None else t[index] for name, t in given.items()}
        return dataclasses.replace(self, z=z, **chosen)


class Drawn(NamedTuple):
    """tokens int64 [...], xt where a row is not live; argmax likewise and stats float32 [3, ...], 0 there, or both
    empty. The statistics are the token's probability, the gap between the largest two, and sum p log p, where p is
    softmax(z) over the ids that are not excluded."""

    tokens: Tensor
    argmax: Tensor
    stats: Tensor


def row_sample(rows: SampleRows, backend: str | None) -> Drawn:
    """Draws a token for each live row. The kernels of GPUs have no float64 rows: the reference samples them."""
    backend = resolve(backend, rows.z.device, "row_sample", rows.z.shape[-1])
    rows.z = rows.z.detach()
    if rows.z.stride(-1) != 1:
        rows.z = rows.z.contiguous()
    if backend == "reference" or (backend != "cpu" and rows.z.dtype == torch.float64):
        return _reference(rows)
    return Drawn(*_row_sample[backend](*rows.arguments()))


def reverse_rows(rows: SampleRows, law: Tensor, backend: str | None) -> Tensor:
    """The law of each token as probabilities, float32 [..., V]; a token that is not live stays."""
    backend = resolve(backend, rows.z.device, "reverse_rows", rows.z.shape[-1])
    if rows.z.stride(-1) != 1:
        rows.z = rows.z.contiguous()
    if backend == "reference" or (backend != "cpu" and rows.z.dtype == torch.float64):
        return _reference_rows(rows, law)
    no_forward_mode("reverse_rows", (rows.z, law))
    return _reverse_rows[backend](rows.z, rows.xt, rows.live, law)


def _fake(z: Tensor, xt: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    with_stats = arguments[-1]
    stats = z.new_empty((3, *xt.shape) if with_stats else (0,), dtype=torch.float32)
    return torch.empty_like(xt), xt.new_empty(xt.shape if with_stats else (0,)), stats


_row_sample = define(
    "row_sample",
    "(Tensor z, Tensor xt, Tensor live, Tensor? law, Tensor? exclude, Tensor seed, Tensor step, Tensor sample_ids, "
    "Tensor positions, float temperature, int top_k, float top_p, bool with_stats) -> (Tensor, Tensor, Tensor)",
    _fake,
)
_reverse_rows = define(
    "reverse_rows",
    "(Tensor z, Tensor xt, Tensor live, Tensor law) -> Tensor",
    lambda z, *_: torch.empty(z.shape, dtype=torch.float32, device=z.device),
)
for _backend in KERNELS:
    no_derivative(f"reverse_rows.{_backend}", "a gradient")


# ---------------------------------------------------------------------------------------------------------
# On a GPU. Nothing here waits for the device. A row without a finite largest number, or with NaN, keeps xt; its law as
# a row of probabilities is NaN.


def _sampled_on_gpu(
    kernels: Any,
    z: Tensor,
    xt: Tensor,
    live: Tensor,
    law: Tensor | None,
    exclude: Tensor | None,
    seed: Tensor,
    step: Tensor,
    sample_ids: Tensor,
    positions: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    with_stats: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, shape = torch.empty_like(xt), xt.shape if with_stats else (0,)
    argmax, stats = xt.new_empty(shape), z.new_empty((3, *xt.shape) if with_stats else (0,), dtype=torch.float32)
    if xt.numel():
        kernels.launch_row_sample(
            at_most_three_dimensions(z), xt, live, law, exclude, seed, step, sample_ids, positions,
            tokens, argmax if with_stats else None, stats if with_stats else None, temperature, top_k, top_p,
        )  # fmt: skip
    return tokens, argmax, stats


def _reverse_rows_on_gpu(kernels: Any, z: Tensor, xt: Tensor, live: Tensor, law: Tensor) -> Tensor:
    probs = z.new_empty(z.shape, dtype=torch.float32)
    if xt.numel():
        kernels.launch_reverse_rows(at_most_three_dimensions(z), xt, live, law, probs)
    return probs


define_launch(
    "launch_row_sample",
    "Tensor z, Tensor xt, Tensor live, Tensor? law, Tensor? exclude, Tensor seed, Tensor step, Tensor sample_ids, "
    "Tensor positions, Tensor(a!) tokens, Tensor(b!)? argmax, Tensor(c!)? stats, float temperature, int top_k, "
    "float top_p",
)
define_launch("launch_reverse_rows", "Tensor z, Tensor xt, Tensor live, Tensor law, Tensor(a!) probs")
implement_on_gpus("row_sample", _sampled_on_gpu, triton="row_sample")
implement_on_gpus("reverse_rows", _reverse_rows_on_gpu, triton="reverse_rows")


# ---------------------------------------------------------------------------------------------------------
# The same in plain PyTorch.


def _reference(rows: SampleRows) -> Drawn:
    tokens, live = rows.xt.clone(), rows.live
    z, xt = rows.z[live].double(), rows.xt[live]  # [M, V], [M]
    if rows.exclude is not None:
        z = z.index_fill(-1, rows.exclude, -torch.inf)
    if rows.law is None:
        possible = z.amax(-1).isfinite() & ~z.isnan().any(-1)
        check_values("logits", z.amax(-1), ~possible, "finite numbers, or -inf beside some")
        tokens[live] = _race(rows, reference.kept_logits(z, rows.temperature, rows.top_k, rows.top_p))
    else:
        tokens[live] = _jump(rows, reference.reverse_weights(z, xt, rows.law[live]), xt)
    if not rows.with_stats:
        return Drawn(tokens, tokens.new_empty(0), z.new_empty(0, dtype=torch.float32))
    argmax, stats = rows.xt.clone(), torch.zeros(3, *tokens.shape, dtype=torch.float32, device=z.device)
    argmax[live] = z.argmax(-1)
    stats[:, live] = _stats(z, tokens[live]).float()
    return Drawn(tokens, argmax, stats)


def _reference_rows(rows: SampleRows, law: Tensor) -> Tensor:

    z = torch.where(rows.live.unsqueeze(-1), rows.z, 0)
    weights = reference.reverse_weights(z, rows.xt, law)
    total = weights.sum(-1, keepdim=True)
    check_values("log_score", total, ~total.isfinite() & rows.live.unsqueeze(-1), "finite numbers or -inf")
    stays = ~rows.live.unsqueeze(-1) | (total == 0)
    here = torch.zeros_like(weights).scatter(-1, rows.xt.unsqueeze(-1), 1)
    return torch.where(stays, here, weights / total).float()


def _jump(rows: SampleRows, weights: Tensor, xt: Tensor) -> Tensor:
    """x_t, or the token that replaces it, its law raised to 1 / temperature."""
    here = xt.unsqueeze(-1)
    stay, jump = weights.gather(-1, here).squeeze(-1), weights.scatter(-1, here, 0)
    if rows.exclude is not None:
        jump = jump.index_fill(-1, rows.exclude, 0)  # a theta below 0 gives them some
    total = stay + jump.sum(-1)
    check_values("log_score", total, ~total.isfinite(), "finite numbers or -inf")
    draws = draw32(rows.seed, Purpose.STEP, rows.step, rows.sample_ids[rows.live], 0, rows.positions[rows.live])
    moves = (draws >= torch.round(stay / total * 2.0**32)) & (jump > 0).any(-1)
    return torch.where(moves, _race(rows, reference.kept_logits(jump.log(), rows.temperature, 0, 1)), xt)


def _race(rows: SampleRows, log_w: Tensor) -> Tensor:
    classes = min(RACE_CLASSES, log_w.shape[-1])  # of fewer ids, each is a class, and no more draws are looked at
    index = torch.arange(classes * (1 + -(-log_w.shape[-1] // classes)), device=log_w.device)
    names = rows.sample_ids[rows.live].unsqueeze(1), rows.positions[rows.live].unsqueeze(1)
    draws = draw32(rows.seed, Purpose.RACE, rows.step, *names, index)
    return reference.race(log_w, draws.unflatten(-1, (-1, classes)))


def _stats(z: Tensor, tokens: Tensor) -> Tensor:
    p = torch.softmax(z, -1)
    largest = torch.nn.functional.pad(p, (0, 1)).topk(2, -1).values
    probability = p.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return torch.stack([probability, largest[..., 0] - largest[..., 1], torch.special.xlogy(p, p).sum(-1)])
