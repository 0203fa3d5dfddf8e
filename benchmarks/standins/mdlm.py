"""MDLM's seams: its parametrisations, its losses and a step of its sampler."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.integrations import mdlm
from standins import Network, Problem, published
from standins.sedd import default_dtype, expm1_sigma
from standins.sedd import sample_categorical as _sample_categorical


@dataclass
class Loss:
    loss: Tensor
    nlls: Tensor
    token_mask: Tensor


class LogLinearNoise:
    """t -> (sigma, dsigma)."""

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.log1p(-(1 - 1e-3) * t), (1 - 1e-3) / (1 - (1 - 1e-3) * t)


def antithetic(n: int, eps: float, high: float = 1.0) -> Tensor:
    """Times [n] at equal distances on [eps, high], each moved within its distance by itself."""
    return eps + (high - eps) * (torch.rand(n) / n + torch.arange(n) / n) % 1


class Diffusion:
    """Attributes are those of the codebase: backbone, noise, mask_index, parameterization and so on."""

    def _process_sigma(self, sigma: Tensor) -> Tensor:
        sigma = sigma.squeeze(-1) if sigma.ndim > 1 else sigma
        return sigma if self.time_conditioning else torch.zeros_like(sigma)

    def _subs_parameterization(self, logits: Tensor, xt: Tensor) -> Tensor:
        offset = logits.new_zeros(logits.shape[-1])
        offset[self.mask_index] = self.neg_infinity
        logits = logits + offset  # the codebase does it in place, for which autograd copies the gradient instead
        logits = logits - torch.logsumexp(logits, -1, keepdim=True)
        clean = xt != self.mask_index
        logits[clean] = self.neg_infinity
        logits[clean, xt[clean]] = 0
        return logits

    def _sedd_parameterization(self, logits: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        e1 = expm1_sigma(sigma).log().to(logits.dtype)
        logits = logits - e1[:, None, None] - math.log(logits.shape[-1] - 1)
        return torch.scatter(logits, -1, xt[..., None], torch.zeros_like(logits[..., :1]))

    def _d3pm_parameterization(self, logits: Tensor) -> Tensor:
        offset = logits.new_zeros(logits.shape[-1])
        offset[self.mask_index] = self.neg_infinity if self.subs_masking else 0
        return (logits + offset).log_softmax(-1)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = self._process_sigma(sigma)
        logits = self.backbone(x, sigma)
        if self.parameterization == "subs":
            return self._subs_parameterization(logits, x)
        if self.parameterization == "d3pm":
            return self._d3pm_parameterization(logits)
        return self._sedd_parameterization(logits, x, sigma)

    def _score_entropy(self, log_score: Tensor, sigma: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
        masked = xt == self.mask_index
        ratio = 1 / torch.expm1(sigma).expand_as(xt)[masked]
        negative = ratio * log_score[masked].gather(-1, x0[masked][:, None]).squeeze(-1)
        score = log_score[masked].exp()
        if self.mask_index == self.vocab_size - 1:
            positive = score[:, :-1].sum(-1)
        else:
            positive = score[:, : self.mask_index].sum(-1) + score[:, self.mask_index + 1 :].sum(-1)
        entropy = torch.zeros(xt.shape, device=xt.device)
        entropy[masked] += positive - negative + ratio * (ratio.log() - 1)
        return entropy

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype  # as of a LightningModule

    def _d3pm_loss(self, model_output: Tensor, xt: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        t = t[:, None].clamp(0, 1 - 1e-4)
        s = t - 1 / self.T
        c = model_output[:, :, self.mask_index].exp()
        at_x0 = model_output.gather(-1, x0[..., None]).squeeze(-1)
        now, before = torch.log((1 - t) * c / t + 1), torch.log((1 - s) * c / s + 1)
        share = 1 / (self.T * t)
        return self.T * (share * (now - at_x0) + (1 - share) * (now - before)) * (xt == self.mask_index)

    def _reconstruction_loss(self, x0: Tensor) -> Tensor:
        sigma = self.noise(torch.zeros(len(x0), dtype=self.dtype))[0][:, None]
        return -self.forward(x0, sigma).gather(-1, x0[..., None]).squeeze(-1)

    def _forward_pass_diffusion(self, x0: Tensor) -> Tensor:
        t = self._sample_t(len(x0), x0.device)
        if self.T > 0:
            t = (t * self.T).int() / self.T + 1 / self.T
        if self.change_of_variables:
            high, low = (torch.log1p(-torch.exp(-end)) for end in (self.noise.sigma_max, self.noise.sigma_min))
            conditioning, move_chance = t[:, None], torch.exp(low + t * (high - low))[:, None]
        else:
            sigma, dsigma = self.noise(t)
            conditioning, move_chance = sigma[:, None], 1 - torch.exp(-sigma[:, None])
        xt = self.q_xt(x0, move_chance)
        model_output = self.forward(xt, conditioning)
        if torch.isnan(model_output).any():
            print("model_output", model_output)
        if self.parameterization == "sedd":
            return dsigma[:, None] * self._score_entropy(model_output, sigma[:, None], xt, x0)
        if self.T > 0:
            loss = self._d3pm_loss(model_output, xt, x0, t)
            return self._reconstruction_loss(x0) + loss if self.parameterization == "d3pm" else loss
        log_p = model_output.gather(-1, x0[..., None]).squeeze(-1)
        if self.change_of_variables or self.importance_sampling:
            return log_p * torch.log1p(-torch.exp(-self.noise.sigma_min))
        return -log_p * (dsigma / torch.expm1(sigma))[:, None]

    def _sample_t(self, n: int, device: torch.device) -> Tensor:
        return antithetic(n, self.sampling_eps)

    def q_xt(self, x0: Tensor, move_chance: Tensor) -> Tensor:
        return torch.where(torch.rand(x0.shape) < move_chance, self.mask_index, x0)

    def _maybe_sub_sample(self, x0: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        ar = self.parameterization == "ar"
        return (x0[:, :-1], x0[:, 1:], attention_mask[:, 1:]) if ar else (x0, None, attention_mask)

    def _loss(self, x0: Tensor, attention_mask: Tensor) -> Loss:
        x0, targets, attention_mask = self._maybe_sub_sample(x0, attention_mask)
        if self.parameterization == "ar":
            loss = -self.backbone(x0, None).gather(-1, targets[..., None]).squeeze(-1)
        else:
            loss = self._forward_pass_diffusion(x0)
        nlls = loss * attention_mask
        return Loss(nlls.sum() / attention_mask.sum(), nlls, attention_mask)

    def _compute_loss(self, batch: dict[str, Tensor], prefix: str) -> Tensor:
        losses = self._loss(batch["input_ids"], batch["attention_mask"])
        metrics = self.train_metrics if prefix == "train" else self.valid_metrics
        metrics.update(losses.nlls, losses.token_mask)
        self.log_dict(metrics, on_step=False, on_epoch=True, sync_dist=True)
        return losses.loss

    def _ddpm_caching_update(
        self, x: Tensor, t: Tensor, dt: float, p_x0: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        sigma_t = self.noise(t)[0]
        move_t = t.reshape(-1, 1, 1)
        move_s = move_t - dt
        if p_x0 is None:
            p_x0 = self.forward(x, sigma_t).exp()
        q_xs = p_x0 * (move_t - move_s)
        q_xs[:, :, self.mask_index] = move_s[:, :, 0]
        return p_x0, torch.where(x != self.mask_index, x, _sample_categorical(q_xs))


PUBLISHED, StandIn = published("mdlm", "diffusion", "noise_schedule"), Diffusion
Diffusion, LogLinearNoise = PUBLISHED["diffusion"].Diffusion, PUBLISHED["noise_schedule"].LogLinearNoise


SETTINGS = dict(
    config=SimpleNamespace(noise=SimpleNamespace(type="loglinear"), model=SimpleNamespace(length=math.inf)),
    parameterization="subs",
    T=0,
    time_conditioning=True,
    change_of_variables=False,
    importance_sampling=False,
    subs_masking=False,
    neg_infinity=-1e6,
    training=True,
)


class Noise:
    """The problem's, at whatever time it is asked."""

    def __init__(self, p: Problem, dtype: torch.dtype) -> None:
        self.values = p.sigma.to(dtype), p.dsigma.to(dtype)
        self.sigma_min, self.sigma_max = torch.tensor(1e-3, dtype=dtype), torch.tensor(7.0, dtype=dtype)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self.values


class Backbone(nn.Module):
    """A network as the codebase calls its own, with the last layer where a DIT has it."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network, self.output_layer = network, nn.ModuleDict({"linear": network.lm_head})

    def forward(self, x: Tensor, sigma: Tensor, **flags: Any) -> Tensor:
        return self.network(x, sigma, **flags).logits


def given(cls: type, num_states: int, **attributes: Any) -> Any:
    """An object of the class whose mask is the last state, with these attributes and no more."""
    made = cls.__new__(cls)
    made.__dict__.update(SETTINGS | attributes, mask_index=num_states - 1, vocab_size=num_states)
    made.__dict__.update(_dtype=torch.get_default_dtype(), _device=torch.device("cpu"))
    return made


def cases(p: Problem) -> dict[str, tuple[Callable[[Network], Tensor], Callable[[Network], Tensor]]]:
    """SUBS with times as they come and by importance, and SEDD's loss."""
    ours = type("Ours", (Diffusion,), {"_loss": mdlm.Diffusion._loss})

    def loss(cls: type, **options: Any) -> Callable[[Network], Tensor]:
        def of(network: Network) -> Tensor:
            with default_dtype(network.lm_head.weight.dtype):
                diffusion = given(
                    cls,
                    p.num_states,
                    backbone=Backbone(network),
                    noise=Noise(p, torch.get_default_dtype()),
                    _sample_t=lambda n, device: p.t.to(torch.get_default_dtype()),
                    q_xt=lambda x0, move_chance: p.xt,
                    **options,
                )
                return diffusion._loss(p.x0, torch.ones_like(p.x0)).loss

        return of

    settings = {
        "subs": {},
        "subs_importance": dict(importance_sampling=True),
        "sedd": dict(parameterization="sedd"),
        "subs_in_steps": dict(T=1000),
        "d3pm": dict(T=1000, parameterization="d3pm", subs_masking=True),
    }
    return {name: (loss(Diffusion, **options), loss(ours, **options)) for name, options in settings.items()}
