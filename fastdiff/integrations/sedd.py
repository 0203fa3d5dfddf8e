"""SEDD (louaaron/Score-Entropy-Discrete-Diffusion): its loss, without logits, its forward noise and its reverse steps.

undo = apply_to_sedd()    # before losses.get_step_fn
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.generation.reverse import reverse_step
from fastdiff.integrations.loss_head import LossHead
from fastdiff.integrations.patching import patch, setting
from fastdiff.losses.row_losses import dse_loss
from fastdiff.noise import graphs
from fastdiff.noise.noising import corrupt


def apply_to_sedd() -> Callable[[], None]:
    """Replaces `losses.get_loss_fn`, the model's tail, the methods of both graphs and the predictors' steps; returns
    what undoes that.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    seams = {"losses": (get_loss_fn,), "model": (SEDD,), "graph_lib": (Absorbing, Uniform)}
    return patch("SEDD", seams | {"sampling": (AnalyticPredictor, EulerPredictor, Denoiser)})


class SEDD:
    """For `model.SEDD`."""

    def forward(self: Any, indices: Tensor, sigma: Tensor) -> Tensor:
        """Log scores [B, L, V] of indices [B, L] int64 at noise sigma [B]; to the loss, its last layer's output."""
        x = self.vocab_embed(indices)
        c, rotary = F.silu(self.sigma_map(sigma)), self.rotary_emb(x)
        with torch.autocast("cuda", torch.bfloat16, enabled=indices.is_cuda):
            for block in self.blocks:
                x = block(x, rotary, c)
            x = self.output_layer(x, c)
        if getattr(self, "gives_logits", False):
            return x
        if self.scale_by_sigma:
            x = x - torch.expm1(sigma).log().to(x.dtype)[:, None, None] - math.log(x.shape[-1] - 1)
        return x.scatter(-1, indices[..., None], 0)


def get_loss_fn(
    noise: "Noise", graph: Any, train: bool, sampling_eps: float = 1e-3, lv: bool = False
) -> Callable[..., Tensor]:
    """For `losses.get_loss_fn`: a function of (model, batch [B, L] int64) that noises the batch and bounds its NLL.

    The model's last layer computes the loss: no logits are made, and the tail behind it is in the loss.

    Args:
        noise: t [B] -> (sigma, dsigma), each [B].
        graph: `Absorbing` or `Uniform`, of here or of SEDD.
        train: whether the model is put into training or evaluation mode.
        sampling_eps: the smallest t.
        lv: unused, as there.

    Returns:
        The function, whose result is [B] float32 in nats per sequence, to be summed or averaged: they must weigh alike
        in what backward starts from, or that is a ValueError. It draws the times t [B] and the noised tokens
        perturbed_batch [B, L] unless they are given. Its model is SEDD's, as it is or wrapped by DDP.
    """

    def loss_fn(
        model: nn.Module,
        batch: Tensor,
        cond: None = None,
        t: Tensor | None = None,
        perturbed_batch: Tensor | None = None,
    ) -> Tensor:
        if t is None:
            t = (1 - sampling_eps) * torch.rand(len(batch), device=batch.device) + sampling_eps
        sigma, dsigma = noise(t)
        if perturbed_batch is None:
            perturbed_batch = graph.sample_transition(batch, sigma[:, None])
        network: Any = getattr(model, "module", model)
        head = LossHead(model, network.output_layer.linear, logits=lambda tokens: model(tokens, sigma[:1]))
        form = dict(parametrization="scale_by_sigma" if network.scale_by_sigma else "log_score", graph=_name(graph))
        scoring = head.dse_loss(sigma, perturbed_batch, batch, dsigma=dsigma, summed=True, **form)
        model.train(train)
        with setting(network, "gives_logits", True), scoring as loss_of:
            return loss_of(model(perturbed_batch, sigma)).sum(-1)

    return loss_fn


class Absorbing:
    """For `graph_lib.Absorbing`: dim states, of which the last is the mask."""

    dim: int

    def score_entropy(self, score: Tensor, sigma: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        """Score entropy of each token in nats per unit of sigma, [B, L] float32; 0 where x is not the mask.

        Args:
            score: [B, L, dim] log score, in any float type. sigma: [B, 1] total noise.
            x, x0: [B, L] int64 noised and clean tokens.

        Raises:
            ValueError, TypeError: as `fastdiff.dse_loss`.
        """
        return dse_loss(score, sigma, x, x0)

    def sample_transition(self, i: Tensor, sigma: Tensor) -> Tensor:
        """Tokens i [B, L] int64 noised to total noise sigma [B, 1], named by a seed from torch's generator."""
        return corrupt(i, sigma, graphs.Absorbing(self.dim))


class Uniform:
    """For `graph_lib.Uniform`: dim states."""

    dim: int

    def score_entropy(self, score: Tensor, sigma: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        """Score entropy of each token, [B, L]; arguments and errors as `Absorbing.score_entropy`."""
        return dse_loss(score, sigma, x, x0, graph="uniform")

    def sample_transition(self, i: Tensor, sigma: Tensor) -> Tensor:
        """Tokens i [B, L] int64 noised to total noise sigma [B, 1], named by a seed from torch's generator."""
        return corrupt(i, sigma, graphs.Uniform(self.dim))


Noise = Callable[[Tensor], tuple[Tensor, Tensor]]  # t -> sigma, dsigma
ScoreFn = Callable[[Tensor, Tensor], Tensor]  # x [B, L], sigma [B, 1] -> score [B, L, dim], not its logarithm


class _Step:
    graph: Any
    noise: Noise


class AnalyticPredictor(_Step):
    """For `sampling.AnalyticPredictor`."""

    def update_fn(self, score_fn: ScoreFn, x: Tensor, t: Tensor, step_size: float) -> Tensor:
        """Tokens [B, L] at time t - step_size, drawn given x [B, L] at time t [B, 1]; errors as `reverse_step`."""
        return _draw(self, score_fn, x, self.noise(t)[0], sigma_next=self.noise(t - step_size)[0])


class EulerPredictor(_Step):
    """For `sampling.EulerPredictor`."""

    def update_fn(self, score_fn: ScoreFn, x: Tensor, t: Tensor, step_size: float) -> Tensor:
        """As `AnalyticPredictor.update_fn`, by the rates at time t; entries below 0 count as 0."""
        sigma, dsigma = self.noise(t)
        return _draw(self, score_fn, x, sigma, step_size=step_size * dsigma)


class Denoiser(_Step):
    """For `sampling.Denoiser`."""

    def update_fn(self, score_fn: ScoreFn, x: Tensor, t: Tensor) -> Tensor:
        """Tokens [B, L] with no noise left, drawn given x [B, L] at time t [B, 1]; errors as `reverse_step`."""
        return _draw(self, score_fn, x, self.noise(t)[0], sigma_next=0)


def _draw(step: _Step, score_fn: ScoreFn, x: Tensor, sigma: Tensor, **move: Any) -> Tensor:
    log_score = score_fn(x, sigma).float().log()  # in bfloat16 the logarithm would be off by up to 3%
    return reverse_step(log_score, x, sigma, graph=_name(step.graph), **move)


def _name(graph: Any) -> str:
    return "absorb" if graph.absorb else "uniform"
