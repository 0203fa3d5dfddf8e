"""The likelihood of score models: an integral of the denoising score entropy over the noise."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff import reference
from fastdiff.checks import check_choice, check_tensor
from fastdiff.estimators.estimate import NLLEstimate
from fastdiff.estimators.scoring import Model, Scorer
from fastdiff.estimators.time_free import draw_names
from fastdiff.estimators.time_integral import draw_times, mean_over_times
from fastdiff.losses.mixture import mixture_loss
from fastdiff.losses.row_losses import PARAMETRIZATIONS, dse_loss
from fastdiff.noise.graphs import Absorbing, Graph, Uniform
from fastdiff.noise.mixture import Mixture, mixture_weight
from fastdiff.noise.noising import corrupt
from fastdiff.schedules import Schedule

# xt [b, L], sigma [b] -> log score [b, L, V], or an object that has it as `.logits`
ScoreModel = Callable[..., Any]


def dse_nll(
    model: ScoreModel,
    x0: Tensor,
    *,
    graph: Graph | Mixture,
    schedule: Schedule,
    num_samples: int = 64,
    times: str = "stratified",
    density: str = "sqrt",
    eps: float | None = None,
    parametrization: str = "log_score",
    batch_size: int | None = None,
    seed: int | Tensor | None = 0,
    sample_ids: Tensor | None = None,
    differentiable: bool = False,
    backend: str | None = None,
) -> NLLEstimate:
    """NLL of a score model, the integral of its denoising score entropy over the noise, in nats (Lou et al. 2024):

        `int_sigma(0)^sigma(1) E[sum_i l_i(xt, sigma)] d sigma + end`,    l as in `dse_loss`

    At the true score this is -log p(x0), but for the ends:

    - Uniform graph: end = KL(p_1|0(. | x0) || uniform), with alpha = exp(-sigma(1)) and N states
      `L [(alpha + (1 - alpha)/N) log(N alpha + 1 - alpha) + (N - 1)(1 - alpha)/N log(1 - alpha)]`,
      which makes it an upper bound, exact as sigma(1) grows. The piece below sigma(0) > 0 (Geometric) is left out;
      `bias` is a rough estimate of it from the eighth of the passes with the least noise: - sigma(0) times the mean
      of their loss, continued to less noise as the true score's, which grows like L (N - 1)/N log(1/sigma).
    - Absorbing graph: that KL is infinite, so the integral runs over lambda = 1 - exp(-sigma), from 0 to 1, whatever
      the schedule. The model never sees a sigma outside [sigma(0), sigma(1)]: beyond these it is asked at the nearer
      end, and its loss there, times expm1(sigma), counts d lambda / lambda. Where score = c / expm1(sigma) with a c
      that does not depend on sigma, as the true one, nothing is left out at either end: bias = 0.

    - Mixture: l is GIDD's loss with its weight, from conditionals, and end the KL of each token from this noise's limit
      at time 1, from which `sample` starts; it needs a share above 0 there.

    Each pass counts 1 / its density, so the value has no other bias.

    With eps it is what SEDD and Duo print of either graph, `E_t[dsigma(t) sum_i l_i(xt, sigma(t))]` over t uniform on
    [eps, 1]: 1 / (1 - eps) times an integral without its ends. `bias` is then not estimated: NaN.

    Args:
        model: callable xt [b, L] int64, sigma [b] float32 -> log score [b, L, V], or -> an object with it as `.logits`.
            An nn.Module is put into evaluation mode, and back; no gradients are made.
        x0: [B, L] int64 tokens.
        graph: Absorbing(V, mask_index), Uniform(V) or Mixture(V, mask_index), see `Mixture.at`.
        schedule: the noise the model was trained for, which may also be infinite at t = 1.
        num_samples: network passes for each sequence, at least 2.
        times: "stratified", one time in each of num_samples equal parts; the standard error comes from neighbouring
            parts, and its square is on average no smaller than the variance. Or "iid".
        density: "sqrt", of times u the share lambda of noised tokens is u^2, scaled to the range of the integral; few
            are spent where hardly any token is noised, just enough that the variance is finite. Or "schedule", u is
            the schedule's own time t, as published; for LogLinear the variance is then infinite in principle.
        eps: least t, as published, in [0, 1); None for the whole integral.
        parametrization: what the model gives, as in `dse_loss`.
        batch_size: rows in a forward pass; None bounds log scores to 256 MB in float32.
        seed: of all draws; None takes one from torch's generator.
        sample_ids: [B] int64, names of the sequences in the draws; None means 0..B-1.
        differentiable, backend: as in `time_free_nll`.

    Raises:
        TypeError: graph, schedule, model, x0, sample_ids or what the model returns is of a wrong type.
        ValueError: an empty sequence; an id out of range, or the mask; a wrong shape; an unknown choice; num_samples
            too small for a standard error.
    """
    check_choice("density", density, ("sqrt", "schedule"))
    if eps is not None and not 0 <= eps < 1:
        raise ValueError(f"eps: expected None or a number in [0, 1), got {eps}")
    score = EntropyScorer(
        model, x0, graph, schedule, parametrization, batch_size, differentiable=differentiable, backend=backend
    )
    seed, sample_ids = draw_names(x0, seed, sample_ids)
    u = draw_times(num_samples, times, seed, sample_ids)
    if eps is None:
        noise, sigma, weight = _noise_levels(u, graph, schedule, density)
    else:
        noise, weight = _published_levels(u, eps, schedule, density)
        sigma = noise
    loss = score_entropies(score, noise, sigma, seed, sample_ids)
    nll, stderr, freedom = mean_over_times(weight * loss, times)
    end, bias = torch.zeros_like(nll), torch.zeros_like(nll)
    if eps is not None:
        bias += math.nan
    elif isinstance(graph, Mixture):
        end = x0.shape[1] * _kl_to_limit(graph, schedule, u)
    elif isinstance(graph, Uniform):
        first, last = schedule.total_noise(u.new_tensor([0.0, 1.0]))
        end = x0.shape[1] * _kl_to_uniform(last, graph.num_states)
        if first > 0:
            bias = -first * _loss_below(first, sigma, loss.detach(), x0.shape[1], graph.num_states)
    return NLLEstimate(
        nll=nll + end,
        stderr=stderr.detach(),
        num_tokens=score.num_tokens,
        num_forwards=torch.full_like(score.num_tokens, num_samples),
        degrees_of_freedom=freedom.detach(),
        bias=bias,
    )


class EntropyScorer(Scorer):
    """Score entropies of noised sequences, where a Scorer gives cross-entropies of masked ones."""

    def __init__(
        self,
        model: Model | ScoreModel,
        x0: Tensor,
        graph: Graph | Mixture,
        schedule: Schedule,
        parametrization: str,
        batch_size: int | None,
        *,
        differentiable: bool = False,
        backend: str | None,
    ) -> None:
        if not isinstance(graph, Absorbing | Uniform | Mixture):
            raise TypeError(f"graph: expected Absorbing, Uniform or Mixture, got {graph!r}")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"schedule: expected a Schedule, got {schedule!r}")
        if not callable(model):
            raise TypeError(f"model: expected a callable of xt and sigma, got {model!r}")
        check_choice("parametrization", parametrization, PARAMETRIZATIONS)
        if isinstance(graph, Mixture) and parametrization not in ("logits", "log_probs"):
            raise ValueError(f"parametrization: expected conditionals of a Mixture, 'logits', got {parametrization!r}")
        check_tensor("x0", x0)
        if (x0 >= graph.num_states).any():
            raise ValueError(f"x0: expected ids in [0, {graph.num_states}), got {int(x0.max())}")
        no_mask = graph.num_states  # no token of the uniform graph is one
        mask_index = no_mask if graph.mask_index is None else graph.mask_index
        super().__init__(model, x0, mask_index, batch_size=batch_size, differentiable=differentiable, backend=backend)
        self.model: ScoreModel = model
        self.graph, self.schedule, self.parametrization = graph, schedule, parametrization
        self._largest_id = graph.num_states - 1

    def graph_at(self, sigma: Tensor) -> Graph | Mixture:
        """The noise of a level [b]."""
        graph = self.graph
        return graph.at(self.schedule, self.schedule.inverse(sigma))[0] if isinstance(graph, Mixture) else graph

    def entropy(self, which: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        """Per unit of sigma [b], summed over each of the sequences `which` [b]: [b] float64."""
        return self.in_one_pass(lambda: self._entropy(which, xt, sigma))

    def _entropy(self, which: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        output: Any = self.model(xt, sigma)
        log_score = getattr(output, "logits", output)
        num_states = self.graph.num_states
        self._check("log score", log_score, xt.shape, str(num_states))
        if log_score.shape[2] != num_states:
            raise ValueError(f"model's log score: expected {num_states} states, got {log_score.shape[2]}")
        self._set_sizes(num_states, num_states)
        if isinstance(self.graph, Mixture):
            return self._mixture_entropy(self.graph, log_score, sigma.double(), xt, self.x0[which])
        loss = dse_loss(
            log_score,
            sigma,
            xt,
            self.x0[which],
            graph=self.graph.name,
            mask_index=-1 if self.graph.mask_index is None else self.graph.mask_index,
            parametrization=self.parametrization,
            backend=self.backend,
        )
        return loss.double().sum(1)

    def _mixture_entropy(self, graph: Mixture, logits: Tensor, sigma: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
        t = self.schedule.inverse(sigma)
        graph, dshare = graph.at(self.schedule, t)
        weight = mixture_weight(xt, x0, sigma, 1.0, graph, dshare=dshare / self.schedule.rate_noise(t))
        options: dict[str, Any] = dict(weight=weight, mask_index=graph.mask_index, backend=self.backend)
        return mixture_loss(logits, sigma, graph.shares(sigma.shape, sigma.device), xt, x0, **options).double().sum(1)


def score_entropies(score: EntropyScorer, noise: Tensor, sigma: Tensor, seed: Tensor, sample_ids: Tensor) -> Tensor:
    """Summed losses [B, P] of sequences noised to noise [B, P], which the model is told to be sigma [B, P]."""
    passes = noise.shape[1]
    loss = torch.zeros_like(noise)
    with score.evaluating(noise.numel()):
        for rows in score.batches(noise.numel()):
            which, step = rows // passes, rows % passes
            xt = corrupt(
                score.x0[which],
                noise[which, step],
                score.graph_at(sigma[which, step]),
                seed=seed,
                step=step,
                sample_ids=sample_ids[which],
                backend=score.backend,
            )
            loss[which, step] = score.entropy(which, xt, sigma[which, step].float())
    return loss


def _noise_levels(u: Tensor, graph: Graph | Mixture, schedule: Schedule, density: str) -> tuple[Tensor, Tensor, Tensor]:
    """At times u in (0, 1): the noise, what the model is told of it, and the weight on its loss, float64.

    The weight is d sigma / du = e^sigma d lambda / du, in a form that also fits a sigma other than the noise.
    """
    ends = schedule.total_noise(u.new_tensor([0.0, 1.0]))
    low, high = -torch.expm1(-ends)
    if density == "sqrt":
        share, slope = u**2, 2 * u
    else:
        share = (-torch.expm1(-schedule.total_noise(u)) - low) / (high - low)
        slope = schedule.alpha(u) * schedule.rate_noise(u) / (high - low)
    if isinstance(graph, Absorbing):
        low, high = u.new_tensor([0.0, 1.0])
    lambda_ = (low + (high - low) * share).clamp(2.0**-64, 1 - 2.0**-53)  # rounded to 0 or 1, sigma would be 0 or inf
    noise = -torch.log1p(-lambda_)
    sigma = noise.clamp(ends[0], ends[1]).float().double()  # as the model sees it
    return noise, sigma, slope * (high - low) * torch.expm1(sigma) / lambda_


def _published_levels(u: Tensor, eps: float, schedule: Schedule, density: str) -> tuple[Tensor, Tensor]:
    """The noise at the t in (eps, 1) of u in (0, 1), and the weight on its loss in a mean over uniform t."""
    share, slope = (u**2, 2 * u) if density == "sqrt" else (u, torch.ones_like(u))
    noise, rate = schedule(eps + (1 - eps) * share)
    return noise, slope * rate


def _kl_to_uniform(sigma: Tensor, num_states: int) -> Tensor:
    """KL of a token at noise sigma from the uniform law."""
    alpha, n = torch.exp(-sigma), num_states
    stay, move = alpha + (1 - alpha) / n, (n - 1) * (1 - alpha) / n
    return stay * torch.log(n * alpha + 1 - alpha) + move * torch.log1p(-alpha)


def _kl_to_limit(graph: Mixture, schedule: Schedule, u: Tensor) -> Tensor:
    """KL of a token at time 1 of mixture noise from that noise's limit."""
    at_end, last = graph.at(schedule, u.new_ones(1))[0], schedule.total_noise(u.new_ones(1))
    x0 = last.new_full((1,), int(graph.mask_index == 0), dtype=torch.int64)  # any id but the mask
    law = at_end.transition(x0, last)
    limit = reference.mixture_limit(at_end.shares(x0.shape, x0.device), graph.num_states, graph.mask_index)
    return (torch.special.xlogy(law, law) - torch.special.xlogy(law, limit)).sum()


def _loss_below(first: Tensor, sigma: Tensor, loss: Tensor, length: int, num_states: int) -> Tensor:
    """Mean summed loss [B] of the uniform graph over the noise in (0, first), from that above, both [B, P].

    With b = L (N - 1)/N it grows like b log(1/sigma), whose mean over (0, first) is b (1 + log(1/first)).
    """
    least = sigma.argsort(1)[:, : (sigma.shape[1] + 7) // 8]
    growth = length * (num_states - 1) / num_states
    return (loss + growth * (1 + torch.log(sigma / first))).gather(1, least).mean(1)
