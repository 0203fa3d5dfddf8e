"""BD3-LM's seams, where they are not MDLM's: a time for each block, a backbone that sees x0 too, sampling by blocks."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from fastdiff.integrations import bd3lm
from standins import Network, Problem, mdlm, published
from standins.sedd import default_dtype
from standins.sedd import sample_categorical as _sample_categorical


class LogLinearNoise:
    """t -> (-1 / t, t): what weighs the log-likelihood, and the probability of a mask."""

    eps = 1e-3
    sigma_max = -torch.log(torch.tensor(1e-3))

    def total_noise(self, t: Tensor) -> Tensor:
        return -torch.log1p(-(1 - self.eps) * t)

    def rate_noise(self, t: Tensor) -> Tensor:
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -1 / t, t


class Diffusion(mdlm.StandIn):
    def _process_sigma(self, sigma: Tensor) -> Tensor:
        sigma = sigma.mean(-1)
        return sigma if self.time_conditioning else torch.zeros_like(sigma)

    def _sigma_from_p(self, p: Tensor) -> Tensor:
        return torch.min(-torch.log(1 - p), self.noise.sigma_max)

    def forward(self, x: Tensor, sigma: Tensor, sample_mode: bool = False, store_kv: bool = False) -> Tensor:
        sigma = self._process_sigma(sigma)
        flags = dict(sample_mode=sample_mode, store_kv=store_kv) if self.config.algo.name == "bd3lm" else {}
        logits = self.backbone(x, sigma, **flags)
        x = x[:, : logits.shape[1]]
        if self.parameterization == "subs":
            return self._subs_parameterization(logits, x)
        return self._sedd_parameterization(logits, x, sigma)

    def _forward_pass_diffusion(
        self,
        x0: Tensor,
        t: Tensor | None = None,
        sampling_eps_min: float | None = None,
        sampling_eps_max: float | None = None,
    ) -> Tensor:
        if t is None:
            t = self._sample_t(x0.shape, x0.device, sampling_eps_min, sampling_eps_max)
        loss_scale, p = self.noise(t)
        sigma = self._sigma_from_p(p[:, 0].unsqueeze(-1))
        dsigma = -loss_scale * torch.expm1(sigma)
        if self.mdlm_loss_scale:
            sigma, dsigma = self.noise.total_noise(t), self.noise.rate_noise(t)
            p, loss_scale = 1 - torch.exp(-sigma), -(dsigma / torch.expm1(sigma))
        xt = self.q_xt(x0, p, sampling_eps_min=sampling_eps_min, sampling_eps_max=sampling_eps_max)
        if sampling_eps_min is not None and sampling_eps_min > 0.5:
            loss_scale = -torch.ones_like(loss_scale)
        if self.ignore_bos:
            xt[:, 0] = x0[:, 0]
        model_output = self.forward(torch.cat((xt, x0), -1) if self.cross_attn else xt, sigma)
        if torch.isnan(model_output).any():
            print("model_output", model_output)
        if self.parameterization == "sedd":
            return dsigma * self._score_entropy(model_output, sigma, xt, x0)
        return loss_scale * model_output.gather(-1, x0[..., None]).squeeze(-1)

    def _sample_t(self, shape: torch.Size, device: torch.device, eps_min: float, eps_max: float) -> Tensor:
        blocks = shape[1] // self.block_size
        t = mdlm.antithetic(shape[0] * blocks, eps_min, eps_max).view(-1, blocks)
        return t if blocks == 1 else t.repeat_interleave(self.block_size, -1)

    def q_xt(self, x0: Tensor, p: Tensor, **clip: Any) -> Tensor:
        return torch.where(torch.rand(x0.shape) <= p, self.mask_index, x0)

    def _loss(
        self,
        x0: Tensor,
        attention_mask: Tensor,
        t: None = None,
        sampling_eps_min: float | None = None,
        sampling_eps_max: float | None = None,
    ) -> mdlm.Loss:
        if not hasattr(self, "sampling_eps_min"):
            sampling_eps_min, sampling_eps_max = 1e-3, 1.0
        elif sampling_eps_min is None:
            sampling_eps_min, sampling_eps_max = self.sampling_eps_min, self.sampling_eps_max
        x0, targets, attention_mask = self._maybe_sub_sample(x0, attention_mask)
        if self.parameterization == "ar":
            loss = -self.forward(x0, None).gather(-1, targets[..., None]).squeeze(-1)
        else:
            loss = self._forward_pass_diffusion(
                x0, sampling_eps_min=sampling_eps_min, sampling_eps_max=sampling_eps_max
            )
        if self.ignore_bos and not self.training:
            attention_mask[:, 0] = 0
        nlls = loss * attention_mask
        return mdlm.Loss(nlls.sum() / attention_mask.sum(), nlls, attention_mask)

    def _ddpm_caching_update(
        self, x: Tensor, t: Tensor, dt: float, p_x0: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        move_t, move_s = self.noise(t)[1], self.noise(t - dt)[1]
        sigma_t, stay = self._sigma_from_p(move_t), (move_s / move_t)[:, None]
        block, kv_cache = x[:, -self.block_size :], self.config.sampling.kv_cache
        if p_x0 is None:
            log_p = self.forward(block if kv_cache else x, sigma_t, sample_mode=True)
            p_x0 = log_p.double()[:, -self.block_size :].exp()
        q_xs = p_x0 * (1 - stay)
        q_xs[:, :, self.mask_index] = stay.squeeze(-1)
        block = torch.where(block != self.mask_index, block, _sample_categorical(q_xs))
        if kv_cache and self.mask_index not in block:
            self.forward(block, sigma_t, sample_mode=True, store_kv=True)
        x_new = torch.cat((x[:, : -self.block_size], block), -1)
        return (p_x0 if torch.equal(x_new, x) else None), x_new


PUBLISHED = published("bd3lm", "diffusion", "noise_schedule")
Diffusion = PUBLISHED["diffusion"].Diffusion

SETTINGS = dict(
    noise=LogLinearNoise(),
    config=SimpleNamespace(
        algo=SimpleNamespace(name="bd3lm"),
        model=SimpleNamespace(length=8),
        sampling=SimpleNamespace(kv_cache=False, first_hitting=False, nucleus_p=1.0),
    ),
    block_size=4,
    num_tokens=math.inf,
    cross_attn=True,
    ignore_bos=True,
    mdlm_loss_scale=False,
)


class Backbone(mdlm.Backbone):
    """One that takes [xt, x0], if cross_attn, of the length of its mask, and gives the rows of xt."""

    def __init__(self, network: Network, cross_attn: bool = True) -> None:
        super().__init__(network)
        if cross_attn:
            self.block_diff_mask = torch.ones((network.hidden.shape[1],) * 2)

    def forward(self, x: Tensor, sigma: Tensor, sample_mode: bool = False, store_kv: bool = False) -> Tensor:
        logits = super().forward(x, sigma, sample_mode=sample_mode, store_kv=store_kv)
        if sample_mode or not hasattr(self, "block_diff_mask"):
            return logits
        assert x.shape[1] == len(self.block_diff_mask)
        return logits[:, : x.shape[1] // 2]


def given(cls: type, num_states: int, **attributes: Any) -> Any:
    """An object of the class whose mask is the last state, with these attributes and no more."""
    return mdlm.given(cls, num_states, **(SETTINGS | attributes))


def cases(p: Problem) -> dict[str, tuple[Callable[[Network], Tensor], Callable[[Network], Tensor]]]:
    """SUBS with a time for each block, SUBS weighted as in MDLM, and SEDD's loss."""
    ours = type("Ours", (Diffusion,), {"_loss": bd3lm.Diffusion._loss})
    blocks = (p.t[:, None] + 0.37 * (torch.arange(p.x0.shape[1]) // 4)) % 0.9 + 0.05
    config = SimpleNamespace(**vars(SETTINGS["config"]) | dict(model=SimpleNamespace(length=p.x0.shape[1])))

    def loss(cls: type, t: Tensor, cross_attn: bool, **options: Any) -> Callable[[Network], Tensor]:
        def of(network: Network) -> Tensor:
            with default_dtype(network.lm_head.weight.dtype):
                diffusion = given(
                    cls,
                    p.num_states,
                    config=config,
                    backbone=Backbone(network, cross_attn),
                    cross_attn=cross_attn,
                    q_xt=lambda x0, move_chance, **clip: p.xt.clone(),
                    _sample_t=lambda *_, **__: t.to(torch.get_default_dtype()),
                    **options,
                )
                return diffusion._loss(p.x0, torch.ones_like(p.x0)).loss

        return of

    settings = {
        "subs": dict(t=blocks, cross_attn=True),
        "subs_mdlm_loss_scale": dict(t=p.t[:, None], mdlm_loss_scale=True, cross_attn=False),
        "sedd": dict(t=p.t[:, None], parameterization="sedd", cross_attn=False),
    }
    return {name: (loss(Diffusion, **options), loss(ours, **options)) for name, options in settings.items()}
