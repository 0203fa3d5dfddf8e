"""The forward process: masks, exact-count and harmonic masks, uniform noise and times.

Every draw is a pure function of (seed, step, sample_id, position): the same names give the same bits on every backend,
at any batch shape and on any number of ranks. `seed=None` draws one from torch's generator (or `generator`).
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastdiff.checks import (
    Number,
    check_bool,
    check_choice,
    check_integer,
    check_tensor,
    check_tokens,
    check_values,
    per_token,
    values_are_checked,
)
from fastdiff.ops import corrupt as ops
from fastdiff.philox import Purpose, draw32, resolve_seed, scaled, scaled_in_stratum, uniform

_GOLDEN = (math.sqrt(5) - 1) / 2


class Masked(NamedTuple):
    """xt [B, L] int64 and mask [B, L] bool, true where a token was masked."""

    xt: Tensor
    mask: Tensor


class HarmonicMask(NamedTuple):
    """A masked batch with counts [B] int64 and weight [B] float64, H_L, which makes the summed loss unbiased."""

    xt: Tensor
    mask: Tensor
    counts: Tensor
    weight: Tensor


class Noise(Protocol):
    """A graph, as `corrupt` sees it."""

    @property
    def num_states(self) -> int: ...

    def redrawn(self, x0: Tensor, p: Tensor, names: ops.Names, backend: str | None) -> Tensor:
        """Tokens [B, L], each drawn anew at infinite noise with probability p, float64 [B, L]."""


def mask_tokens(
    x0: Tensor,
    p: Number | Tensor,
    *,
    mask_index: int,
    maskable: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    uniforms: Tensor | None = None,
    backend: str | None = None,
) -> Masked:
    """Masks each token with probability p, independently.

    Args:
        x0: [B, L] int64 tokens.
        p: probability in [0, 1], a number or a tensor over a prefix of [B, L], or one that broadcasts to it.
        mask_index: the mask's id, >= 0.
        maskable: [B, L] bool; other positions stay.
        seed, step, sample_ids, generator: what names the draws; step is a number or [B], sample_ids [B] (0..B-1).
        uniforms: [B, L] numbers in [0, 1) to use instead: masked where uniforms < p, compared in their dtype.

    Raises:
        ValueError, TypeError: an argument does not fit, or (on the CPU) p is outside [0, 1].
    """
    rows = _check(x0, mask_index, maskable)
    p = per_token("p", p, x0.shape, x0.device)
    if uniforms is None:
        names = _names(rows, seed, step, sample_ids, generator)
        return Masked(*ops.mask_tokens(x0.long().contiguous(), p, _contiguous(maskable), names, mask_index, backend))
    check_tensor("uniforms", uniforms)
    if uniforms.shape != x0.shape or not uniforms.is_floating_point():
        raise ValueError(
            f"uniforms: expected floating shape {tuple(x0.shape)}, got {uniforms.dtype} {tuple(uniforms.shape)}"
        )
    mask = uniforms < p.to(uniforms.dtype)
    mask = mask if maskable is None else mask & maskable
    return Masked(torch.where(mask, mask_index, x0.long()), mask)


def mask_exactly(
    x0: Tensor,
    counts: Tensor,
    *,
    mask_index: int,
    maskable: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Masked:
    """Masks a uniformly drawn subset of exactly counts[b] maskable tokens of each sequence.

    Args:
        x0: [B, L] int64 tokens, or [T] with cu_seqlens.
        counts: [B] int64 in [0, maskable positions of the sequence].
        cu_seqlens: [B + 1] int64 offsets of B documents packed into x0 [T]; each is masked as if alone.
        mask_index, maskable, seed, step, sample_ids, generator: as `mask_tokens`.

    Raises:
        ValueError, TypeError: an argument does not fit, or (on the CPU) a count is out of range.
    """
    rows = _check(x0, mask_index, maskable, cu_seqlens)
    check_tokens("counts", counts, rows.shape, x0.device)
    names = _names(rows, seed, step, sample_ids, generator)
    x0, counts = x0.long().contiguous(), counts.long().contiguous()
    sequences = _contiguous(maskable), _offsets(cu_seqlens)
    return Masked(*ops.mask_exactly(x0, counts, *sequences, names, mask_index, backend))


def harmonic_mask(
    x0: Tensor,
    *,
    mask_index: int,
    maskable: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> HarmonicMask:
    """Masks m tokens of each sequence, m drawn with p(m) = 1/(m H_L), m = 1..L, uniformly among subsets of m.

    L counts the maskable positions of the sequence. The summed loss times `weight` = H_L is an unbiased estimate of the
    time-free NLL (Jeon et al. 2025): in subset terms p(I) = B(L-|I|, |I|+1) / H_L over unmasked sets I.

    Args:
        x0: [B, L] int64 tokens, or [T] with cu_seqlens.
        cu_seqlens: as `mask_exactly`.
        mask_index, maskable, seed, step, sample_ids, generator: as `mask_tokens`.

    Raises:
        ValueError, TypeError: an argument does not fit, or (on the CPU) a sequence has no maskable position.
    """
    names = _names(_check(x0, mask_index, maskable, cu_seqlens), seed, step, sample_ids, generator)
    sequences = _contiguous(maskable), _offsets(cu_seqlens)
    return HarmonicMask(*ops.harmonic_mask(x0.long().contiguous(), *sequences, names, mask_index, backend))


def sample_mask_counts(
    n: int,
    length: int | Tensor,
    *,
    proposal: str = "stratified",
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draws n counts m in 1..L and the weights 1/(m q(m)) that make the summed loss unbiased for the NLL.

    Args:
        n: counts to draw.
        length: L, a number for [n] results, or int64 [B] for [B, n].
        proposal: "harmonic", q = 1/(m H_L), weight H_L; "uniform", q = 1/L, weight L/m; "stratified", as uniform with
            one jittered draw in each of n equal strata of 1..L, in rising order: rows that take them must come in
            an order of their own, or a sequence would always meet the same counts.
        seed, step, sample_ids, generator: what names the draws.

    Returns:
        counts int64 and weights float64.
    """
    check_choice("proposal", proposal, ("stratified", "uniform", "harmonic"))
    n = check_integer("n", n, 1)
    lengths = length if isinstance(length, Tensor) else torch.tensor(check_integer("length", length), device="cpu")
    if lengths.dtype != torch.int64 or lengths.dim() > 1:
        raise ValueError(f"length: expected a number or int64 [B], got {length}")
    check_values("length", lengths, lengths < 1, "at least 1")
    rows = lengths.reshape(-1)
    seed, steps, sample_ids = _names(rows, seed, step, sample_ids, generator)
    j = torch.arange(n, device=rows.device)
    draws = draw32(seed, Purpose.COUNT, steps.unsqueeze(1), sample_ids.unsqueeze(1), 0, j)
    size = rows.unsqueeze(1)
    if proposal == "harmonic":
        counts, weights = ops.harmonic_counts(draws, rows, int(rows.max()))
    else:
        counts = 1 + (scaled(draws, size) if proposal == "uniform" else scaled_in_stratum(draws, j, n, size))
        weights = size.double() / counts
    shape = (*lengths.shape, n)
    return counts.view(shape), weights.reshape(shape)


def corrupt(
    x0: Tensor,
    sigma: Number | Tensor,
    graph: Noise,
    *,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Noises tokens to total noise sigma: with probability 1 - exp(-sigma) masked, or redrawn from all states.

    One draw says whether a token is redrawn, another from which id. In a `Mixture` the first also says whether the mask
    is drawn, where it is below (1 - exp(-sigma)) (1 - share); so at share = 0 these are the tokens of `Absorbing`.

    Args:
        x0: [B, L] int64 tokens.
        sigma: total noise >= 0, a number or a tensor over a prefix of [B, L], or one that broadcasts to it.
        graph: Absorbing(...), Uniform(...) or Mixture(...).
        seed, step, sample_ids, generator: as `mask_tokens`.

    Returns:
        xt [B, L] int64.
    """
    if not hasattr(graph, "redrawn"):
        raise TypeError(f"graph: expected Absorbing, Uniform or Mixture, got {graph!r}")
    rows = _check(x0, 0, None)
    sigma = per_token("sigma", sigma, x0.shape, x0.device)
    if values_are_checked(x0.device):
        check_values("sigma", sigma, ~((sigma >= 0) & sigma.isfinite()), "finite numbers >= 0")
        check_values("x0", x0, (x0 < 0) | (x0 >= graph.num_states), f"ids in [0, {graph.num_states})")
    names = _names(rows, seed, step, sample_ids, generator)
    return graph.redrawn(x0.long().contiguous(), -torch.expm1(-sigma), names, backend)


def sample_times(
    n: int,
    *,
    method: str = "stratified",
    eps: float = 1e-3,
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    rank: int = 0,
    world_size: int = 1,
    generator: torch.Generator | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Draws n times in [eps, 1], uniform each, float32 [n].

    Args:
        n: times on this rank.
        method: "iid"; "antithetic", pairs u and 1 - u; "stratified", a jittered draw in each of n * world_size strata.
        eps: the smallest time.
        seed, step, generator: what names the draws; ranks need a common seed.
        rank, world_size: which n of the n * world_size times to return.
        device: where they are; None is the CPU.
    """
    check_choice("method", method, ("iid", "antithetic", "stratified"))
    n, rank, world_size = map(check_integer, ("n", "rank", "world_size"), (n, rank, world_size))
    step = step if isinstance(step, Tensor) else check_integer("step", step)
    if n < 1 or not 0 <= eps < 1 or not 0 <= rank < world_size:
        raise ValueError(
            "n, eps, rank: expected n >= 1, 0 <= eps < 1, 0 <= rank < world_size, "
            f"got {n}, {eps}, {rank} of {world_size}"
        )
    device = device or torch.device("cpu")
    index = torch.arange(rank * n, (rank + 1) * n, device=device)
    seed = resolve_seed(seed, generator, device)
    if method == "antithetic":
        u = uniform(seed, Purpose.TIME, step, 0, 0, index // 2)
        u = torch.where(index % 2 == 0, u, 1 - u)
    else:
        u = uniform(seed, Purpose.TIME, step, 0, 0, index)
        u = (index + u) / (n * world_size) if method == "stratified" else u
    return (eps + (1 - eps) * u).float()


def spread(n: int, device: torch.device | None = None) -> Tensor:
    """Which of n strata each of n rows of a batch takes, int64 [n]: rows that follow each other have strata of all
    sizes, so that no rank and no part of a batch has more masks than another."""
    return (torch.arange(n, dtype=torch.float64, device=device or "cpu") * _GOLDEN % 1).argsort().argsort()


def _check(x0: Tensor, mask_index: int, maskable: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Something of each sequence, [B], for `_names`."""
    check_tokens("x0", x0, None)
    if cu_seqlens is None and (x0.dim() != 2 or x0.shape[1] == 0):
        raise ValueError(f"x0: expected shape [B, L] with L >= 1, got {tuple(x0.shape)}")
    if cu_seqlens is not None:
        check_tokens("cu_seqlens", cu_seqlens, None, x0.device)
        if x0.dim() != 1 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 1:
            raise ValueError(
                f"cu_seqlens: expected [B + 1] offsets into x0 [T], got {tuple(cu_seqlens.shape)} and {tuple(x0.shape)}"
            )
    if check_integer("mask_index", mask_index) < 0:
        raise ValueError(f"mask_index: expected an id >= 0 (the vocabulary size is not known here), got {mask_index}")
    if maskable is not None:
        check_bool("maskable", maskable, x0.shape, x0.device)
    return x0[:, 0] if cu_seqlens is None else cu_seqlens[1:]


def _names(
    rows: Tensor,
    seed: int | Tensor | None,
    step: int | Tensor,
    sample_ids: Tensor | None,
    generator: torch.Generator | None,
) -> ops.Names:
    """seed [], steps and sample_ids [B], int64 on the rows' device."""
    batch, device = rows.shape[0], rows.device
    if isinstance(step, Tensor):
        check_tokens("step", step, rows.shape, device)
        steps = step.long().contiguous()
    else:
        steps = torch.full((batch,), check_integer("step", step), dtype=torch.int64, device=device)
    if sample_ids is None:
        sample_ids = torch.arange(batch, device=device)
    check_tokens("sample_ids", sample_ids, rows.shape, device)
    return resolve_seed(seed, generator, device), steps, sample_ids.long().contiguous()


def _contiguous(maskable: Tensor | None) -> Tensor | None:
    return None if maskable is None else maskable.contiguous()


def _offsets(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.long().contiguous()
