"""Score entropy without clean tokens (Lou, Meng, Ermon 2024): the score of a neighbour stands for the true ratio."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff.checks import Number, check_choice, check_integer, check_rows, check_tokens, check_values, per_token
from fastdiff.losses.logps import token_logps
from fastdiff.losses.row_losses import PARAMETRIZATIONS, REDUCTIONS, dse_loss
from fastdiff.philox import Purpose, draw32, resolve_seed, scaled


def implicit_score_entropy(
    model: Callable[..., Any],
    xt: Tensor,
    sigma: Number | Tensor,
    *,
    graph: str = "absorb",
    mask_index: int | None = None,
    parametrization: str = "log_score",
    dsigma: Number | Tensor | None = None,
    reduction: str = "none",
    seed: int | Tensor | None = None,
    step: int | Tensor = 0,
    sample_ids: Tensor | None = None,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> Tensor:
    """Implicit score entropy of noised sequences x = xt, in nats per unit of sigma, times dsigma if that is given:

        `sum_{y != x} w_xy s(x)_y - w_yx log s(y)_x`

    over the sequences y that differ from x in one token. s(x)_y is the model's ratio p_t(y) / p_t(x), w_xy the rate at
    which y turns into x: 1 / V in the uniform graph; in the absorbing one 1 where the token of x is the mask. Its mean
    over xt is that of the denoising score entropy, `dse_loss` summed over tokens, less a number that the model does not
    change. It needs no clean tokens.

    The first sum is read from a pass over xt. The second takes a pass over one neighbour of each sequence, drawn
    uniformly and weighted by their number, so that value and gradient are unbiased. From conditionals of the absorbing
    graph the first sum is the same for all models, and that pass is left out. The denoising score entropy takes one
    pass; and since here one neighbour stands for all, the value varies more, the longer the sequences are. It is for
    noised tokens whose clean ones are not known.

    Args:
        model: callable xt [b, L] int64, sigma [b] float32 -> [b, L, V] as `parametrization` says, or -> an object with
            it as `.logits`.
        xt: [B, L] int64 noised tokens.
        sigma: total noise > 0, a number or [B].
        graph: "absorb" or "uniform". mask_index: the mask's id, >= 0, of the absorbing graph.
        parametrization: "log_score", "scale_by_sigma", or "logits" ("log_probs") of conditionals, as in `dse_loss`.
        dsigma: the rate of sigma, a factor on the loss, a number or [B].
        reduction: "none" for the [B] losses of sequences, "sum", or "mean" over all B L tokens.
        seed, step, sample_ids, generator: what names the draws of neighbours, as in `mask_tokens`; they are others than
            those of `corrupt`.

    Returns:
        float32 (float64 for float64 outputs) [B] or [].

    Raises:
        ValueError, TypeError: an argument or the model's output does not fit; on the CPU also a value out of range.
        BackendUnavailable: the backend named cannot run here.
    """
    check_choice("graph", graph, ("absorb", "uniform"))
    check_choice("parametrization", parametrization, PARAMETRIZATIONS)
    check_choice("reduction", reduction, REDUCTIONS)
    check_tokens("xt", xt, None)
    if xt.dim() != 2 or xt.shape[1] == 0:
        raise ValueError(f"xt: expected shape [B, L] with L >= 1, got {tuple(xt.shape)}")
    if (graph == "absorb") != (mask_index is not None):
        raise ValueError(f"mask_index: expected an id >= 0 if graph='absorb', else None, got {mask_index}")
    mask_index = None if mask_index is None else check_integer("mask_index", mask_index, 0)
    xt, device = xt.long(), xt.device
    sigma = per_token("sigma", sigma, xt.shape[:1], device)
    check_values("sigma", sigma, ~((sigma > 0) & sigma.isfinite()), "finite numbers > 0")
    rate = per_token("dsigma", 1.0 if dsigma is None else dsigma, xt.shape[:1], device)
    sample_ids = torch.arange(len(xt), device=device) if sample_ids is None else sample_ids
    check_tokens("sample_ids", sample_ids, xt.shape[:1], device)
    names = resolve_seed(seed, generator, device), step, sample_ids

    asked = _Asked(model, sigma, parametrization, mask_index, backend)
    first = asked.first_sum(xt, rate)
    near, position, number = _neighbour(xt, asked.num_states, mask_index, names)
    loss = (first - rate * number * asked.log_ratio(near, xt, position)).to(asked.dtype)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / xt.numel()


def _neighbour(
    xt: Tensor, num_states: int, mask_index: int | None, names: tuple[Tensor, int | Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """A sequence for each that the noise may turn it into by one token, the position of that, and all rates together:
    [B, L], [B], [B]. A sequence of masks is its own, at rate 0."""
    seed, step, sample_ids = names
    where, which = (draw32(seed, purpose, step, sample_ids, 1, 0) for purpose in (Purpose.MASK, Purpose.REPLACE))
    if mask_index is not None:
        left = xt != mask_index
        number = left.sum(1)
        position = (left.cumsum(1) > scaled(where, number).unsqueeze(1)).long().argmax(1, keepdim=True)
        return xt.scatter(1, position, mask_index), position.squeeze(1), number
    length, others = xt.shape[1], num_states - 1
    position = scaled(where, length).unsqueeze(1)
    token = scaled(which, others).unsqueeze(1)
    token = token + (token >= xt.gather(1, position)).long()
    number = torch.full_like(position.squeeze(1), length * others).double() / num_states
    return xt.scatter(1, position, token), position.squeeze(1), number


class _Asked:
    """A model, asked about sequences at their noise [B]."""

    def __init__(
        self,
        model: Callable[..., Any],
        sigma: Tensor,
        parametrization: str,
        mask_index: int | None,
        backend: str | None,
    ) -> None:
        self.model, self.sigma, self.mask_index, self.backend = model, sigma, mask_index, backend
        self.conditionals = parametrization in ("logits", "log_probs")
        self.scaled = parametrization == "scale_by_sigma"
        self.num_states, self.dtype = 0, torch.float32  # of what it says

    def first_sum(self, xt: Tensor, rate: Tensor) -> Tensor:
        """rate sum w_xy s(x)_y, [B]."""
        masked = None if self.mask_index is None else xt == self.mask_index
        if self.conditionals and masked is not None:  # a mask's scores are conditionals / expm1(sigma)
            return rate * masked.sum(1) / torch.expm1(self.sigma)
        output = self._output(xt)
        if self.conditionals:
            k = (self.num_states / torch.expm1(self.sigma)).unsqueeze(1)
            log_c = token_logps(output, xt, exclude_mask=False, backend=self.backend).double()
            ratios = (self.num_states - 1 - k * torch.expm1(log_c)) / (1 + k * log_c.exp())
            return rate * ratios.sum(1) / self.num_states
        # Without noise the denoising score entropy of the uniform graph is 1/V sum_{y != x_t} exp(s_y).
        rate = (rate * self._shift().neg().exp()).unsqueeze(1)
        weight = rate.expand(xt.shape) if masked is None else rate * masked * self.num_states
        return dse_loss(output, 0.0, xt, xt, graph="uniform", dsigma=weight, backend=self.backend).double().sum(1)

    def log_ratio(self, near: Tensor, xt: Tensor, position: Tensor) -> Tensor:
        """log s(y)_x for y = near, which differs from x = xt in a position [B]: [B]."""
        rows = torch.arange(len(xt), device=xt.device)
        z = self._output(near)[rows, position].double()
        here, there = near[rows, position], xt[rows, position]
        if not self.conditionals:
            return z[rows, there] - self._shift()
        if self.mask_index is not None:
            there = torch.where(there == self.mask_index, (there + 1) % self.num_states, there)  # does not count
            at_mask = torch.tensor(self.mask_index, device=z.device)
            log_c = z.index_fill(1, at_mask, -torch.inf).log_softmax(1)
            return log_c[rows, there] - torch.log(torch.expm1(self.sigma))
        p_t = torch.log1p((self.num_states / torch.expm1(self.sigma)).unsqueeze(1) * z.softmax(1))
        return p_t[rows, there] - p_t[rows, here]

    def _shift(self) -> Tensor:
        """What is taken from an output for its log scores, [B]."""
        return reference.sigma_shift(self.sigma, self.num_states) if self.scaled else torch.zeros_like(self.sigma)

    def _output(self, xt: Tensor) -> Tensor:
        output = self.model(xt, self.sigma.float())
        output = getattr(output, "logits", output)
        check_rows("model", output)
        if output.shape[:-1] != xt.shape or output.shape[-1] <= (self.mask_index or 1):
            raise ValueError(f"model: expected [{xt.shape[0]}, {xt.shape[1]}, V] numbers, got {tuple(output.shape)}")
        self.num_states = output.shape[-1]
        self.dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
        check_values("xt", xt, (xt < 0) | (xt >= self.num_states), f"ids in [0, {self.num_states})")
        return output
