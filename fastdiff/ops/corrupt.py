"""The forward process: one launch masks or replaces the tokens of a whole batch, from named random bits."""

import functools
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends import resolve
from fastdiff.checks import check_values
from fastdiff.ops.gpu import define_launch, implement_on_gpus
from fastdiff.ops.library import define
from fastdiff.philox import Purpose, draw32, scaled

# x0 int64 [B, L], or packed [T] with cu_seqlens int64 [B + 1]; p float64 [B, L] with any strides; maskable bool as x0;
# seed int64 []; steps, sample_ids and counts int64 [B]. xt and mask are shaped as x0. The draws are
# draw32(seed, purpose, step, sample_id, 0, position).
_NAMES = "Tensor seed, Tensor steps, Tensor sample_ids"

Names = tuple[Tensor, Tensor, Tensor]


def mask_tokens(
    x0: Tensor, p: Tensor, maskable: Tensor | None, names: Names, mask_index: int, backend: str | None
) -> tuple[Tensor, Tensor]:
    """Masks each maskable token with probability p: xt, mask."""
    if (kernels := resolve(backend, x0.device, "mask_tokens", x0.shape[-1])) != "reference":
        return _mask_tokens[kernels](x0, p, maskable, *names, mask_index)
    mask = _draws(Purpose.MASK, x0, names) < _threshold(p)
    return _masked(x0, mask if maskable is None else mask & maskable, mask_index)


def mask_exactly(
    x0: Tensor,
    counts: Tensor,
    maskable: Tensor | None,
    cu_seqlens: Tensor | None,
    names: Names,
    mask_index: int,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """Masks a uniform subset of counts[b] maskable tokens: xt, mask."""
    if (kernels := resolve(backend, x0.device, "mask_exactly", x0.shape[-1])) != "reference":
        return _mask_exactly[kernels](x0, counts, maskable, cu_seqlens, *names, mask_index)
    places = _Places(x0, maskable, cu_seqlens)
    wrong = (counts < 0) | (counts > places.num_maskable)
    check_values("counts", counts, wrong, "numbers in [0, maskable positions]")
    return _masked(x0, places.subset(counts, names), mask_index)


def harmonic_mask(
    x0: Tensor,
    maskable: Tensor | None,
    cu_seqlens: Tensor | None,
    names: Names,
    mask_index: int,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Masks a uniform subset of m tokens, p(m) = 1/(m H_L): xt, mask, counts [B], weight H_L [B]."""
    if (kernels := resolve(backend, x0.device, "harmonic_mask", x0.shape[-1])) != "reference":
        return _harmonic_mask[kernels](x0, maskable, cu_seqlens, *names, mask_index)
    places = _Places(x0, maskable, cu_seqlens)
    length, (seed, steps, sample_ids) = places.num_maskable, names
    check_values("maskable", length, length == 0, "at least one position in each sequence")
    draws = draw32(seed, Purpose.COUNT, steps, sample_ids, 0, 0).unsqueeze(1)
    counts, weight = (column.squeeze(1) for column in harmonic_counts(draws, length, x0.shape[-1]))
    return *_masked(x0, places.subset(counts, names), mask_index), counts, weight


def uniform_tokens(x0: Tensor, p: Tensor, names: Names, num_states: int, backend: str | None) -> Tensor:
    """Redraws each token from all num_states with probability p; it may stay."""
    if (kernels := resolve(backend, x0.device, "uniform_tokens", x0.shape[-1])) != "reference":
        return _uniform_tokens[kernels](x0, p, *names, num_states)
    redrawn = scaled(_draws(Purpose.REPLACE, x0, names), num_states)
    return torch.where(_draws(Purpose.MASK, x0, names) < _threshold(p), redrawn, x0)


def harmonic_counts(draws: Tensor, length: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The first m with draw < round(2^32 H_m / H_L), and the weight H_L: [B, n] each, of draws [B, n], lengths [B]."""
    harmonic = harmonic_numbers(longest, draws.device)
    norm = harmonic[length].unsqueeze(1)
    table = torch.round(harmonic / norm * 2.0**32)
    return torch.searchsorted(table, draws.double(), right=True), norm.expand(draws.shape)


# ---------------------------------------------------------------------------------------------------------
# Shapes under tracing.


def _fake_masked(x0: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x0), torch.empty_like(x0, dtype=torch.bool)


def _fake_harmonic(
    x0: Tensor, maskable: Tensor, cu_seqlens: Tensor, seed: Tensor, steps: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return *_fake_masked(x0), torch.empty_like(steps), torch.empty_like(steps, dtype=torch.float64)


_mask_tokens = define(
    "mask_tokens",
    f"(Tensor x0, Tensor p, Tensor? maskable, {_NAMES}, int mask_index) -> (Tensor, Tensor)",
    _fake_masked,
)
_mask_exactly = define(
    "mask_exactly",
    f"(Tensor x0, Tensor counts, Tensor? maskable, Tensor? cu_seqlens, {_NAMES}, int mask_index) -> (Tensor, Tensor)",
    _fake_masked,
)
_harmonic_mask = define(
    "harmonic_mask",
    f"(Tensor x0, Tensor? maskable, Tensor? cu_seqlens, {_NAMES}, int mask_index) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_harmonic,
)
_uniform_tokens = define(
    "uniform_tokens",
    f"(Tensor x0, Tensor p, {_NAMES}, int num_states) -> Tensor",
    lambda x0, *_: torch.empty_like(x0),
)


# ---------------------------------------------------------------------------------------------------------
# On a GPU. Nothing here waits for the device, but the first table of harmonic numbers of a size, which is copied there.


def _token_noise(
    kernels: Any, x0: Tensor, p: Tensor, maskable: Tensor | None, seed: Tensor, steps: Tensor, ids: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    xt, mask = torch.empty_like(x0), torch.empty_like(x0, dtype=torch.bool)
    if x0.numel():
        kernels.launch_token_noise(x0, p, maskable, seed, steps, ids, xt, mask, number)
    return xt, mask


def _redrawn(kernels: Any, x0: Tensor, p: Tensor, seed: Tensor, steps: Tensor, ids: Tensor, num_states: int) -> Tensor:
    xt = torch.empty_like(x0)
    if x0.numel():
        kernels.launch_token_noise(x0, p, None, seed, steps, ids, xt, None, num_states)
    return xt


def _exact_subset(
    kernels: Any,
    x0: Tensor,
    counts: Tensor,
    maskable: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor,
    steps: Tensor,
    ids: Tensor,
    mask_index: int,
) -> tuple[Tensor, Tensor]:
    xt, mask = torch.empty_like(x0), torch.empty_like(x0, dtype=torch.bool)
    if counts.numel():
        kernels.launch_subset(x0, counts, maskable, cu_seqlens, seed, steps, ids, None, xt, mask, None, mask_index)
    return xt, mask


def _harmonic_subset(
    kernels: Any,
    x0: Tensor,
    maskable: Tensor | None,
    cu_seqlens: Tensor | None,
    seed: Tensor,
    steps: Tensor,
    ids: Tensor,
    mask_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    xt, mask = torch.empty_like(x0), torch.empty_like(x0, dtype=torch.bool)
    counts, weight = torch.empty_like(steps), torch.empty_like(steps, dtype=torch.float64)
    table = _kept_numbers(1 << x0.shape[-1].bit_length(), x0.device)  # few different ones
    if counts.numel():
        kernels.launch_subset(x0, counts, maskable, cu_seqlens, seed, steps, ids, table, xt, mask, weight, mask_index)
    return xt, mask, counts, weight


def harmonic_numbers(longest: int, device: torch.device) -> Tensor:
    """H_0 .. H_longest, summed on the host in rising order, so that every device has the same bits."""
    terms = 1 / torch.arange(longest + 1, dtype=torch.float64, device="cpu")
    terms[0] = 0
    return terms.cumsum(0).to(device)


_kept_numbers = functools.cache(harmonic_numbers)


define_launch(
    "launch_token_noise",
    f"Tensor x0, Tensor p, Tensor? maskable, {_NAMES}, Tensor(a!) xt, Tensor(b!)? mask, int number",
)
define_launch(
    "launch_subset",
    f"Tensor x0, Tensor(a!) counts, Tensor? maskable, Tensor? cu_seqlens, {_NAMES}, Tensor? table, Tensor(b!) xt, "
    "Tensor(c!) mask, Tensor(d!)? weight, int mask_index",
)
implement_on_gpus("mask_tokens", _token_noise, triton="corrupt")
implement_on_gpus("mask_exactly", _exact_subset, triton="corrupt")
implement_on_gpus("harmonic_mask", _harmonic_subset, triton="corrupt")
implement_on_gpus("uniform_tokens", _redrawn, triton="corrupt")


# ---------------------------------------------------------------------------------------------------------
# The pieces of the reference.


def _draws(purpose: Purpose, x0: Tensor, names: Names) -> Tensor:
    seed, steps, sample_ids = names
    positions = torch.arange(x0.shape[1], device=x0.device)
    return draw32(seed, purpose, steps.unsqueeze(1), sample_ids.unsqueeze(1), 0, positions)


def _threshold(p: Tensor) -> Tensor:
    check_values("p", p, ~((p >= 0) & (p <= 1)), "probabilities in [0, 1]")
    return torch.round(p * 2.0**32).long()


class _Places:
    """The sequence and the position in it of every token, dense or packed."""

    def __init__(self, x0: Tensor, maskable: Tensor | None, cu_seqlens: Tensor | None) -> None:
        self.shape, tokens = x0.shape, x0.numel()
        if cu_seqlens is None:
            cu_seqlens = torch.arange(x0.shape[0] + 1, device=x0.device) * x0.shape[1]
        length = cu_seqlens.diff()
        check_values("cu_seqlens", length, length < 0, "rising offsets")
        ends = cu_seqlens[[0, -1]]
        check_values("cu_seqlens", ends, ends != ends.new_tensor([0, tokens]), f"offsets from 0 to {tokens}")
        self.start = cu_seqlens[:-1]
        self.sequence = torch.repeat_interleave(length, output_size=tokens)
        self.position = torch.arange(tokens, device=x0.device) - self.start[self.sequence]
        self.maskable = torch.ones_like(self.sequence, dtype=torch.bool) if maskable is None else maskable.flatten()
        self.num_maskable = torch.zeros_like(length).index_add_(0, self.sequence, self.maskable.long())

    def subset(self, counts: Tensor, names: Names) -> Tensor:
        """The counts[b] maskable positions of each sequence with the smallest (draw, position)."""
        seed, steps, sample_ids = names
        b = self.sequence
        draws = draw32(seed, Purpose.SUBSET, steps[b], sample_ids[b], 0, self.position)
        order = torch.argsort(draws.masked_fill(~self.maskable, 2**32), stable=True)
        order = order[torch.argsort(b[order], stable=True)]
        rank = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device))
        return (rank - self.start[b] < counts[b]).view(self.shape)


def _masked(x0: Tensor, mask: Tensor, mask_index: int) -> tuple[Tensor, Tensor]:
    return torch.where(mask, mask_index, x0), mask
