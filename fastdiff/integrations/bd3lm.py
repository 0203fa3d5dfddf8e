"""BD3-LM (kuleshov-group/bd3lms): its losses, and the reverse step of its sampler, from the backbone's logits.

undo = apply_to_bd3lm()
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_choice
from fastdiff.integrations import mdlm
from fastdiff.integrations.patching import patch
from fastdiff.losses import dce_loss, dse_loss
from fastdiff.tokens import sample_tokens


def apply_to_bd3lm() -> Callable[[], None]:
    """Replaces the methods of `diffusion.Diffusion` that are here; returns what undoes that.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    return patch("BD3-LM", {"diffusion": (Diffusion,)})


class Diffusion:
    """For `diffusion.Diffusion`, whose attributes the methods read."""

    def _forward_pass_diffusion(
        self: Any,
        x0: Tensor,
        t: Tensor | None = None,
        sampling_eps_min: float | Tensor | None = None,
        sampling_eps_max: float | Tensor | None = None,
    ) -> Tensor:
        """NELBO of each token, [B, L] float32 in nats, under a noise drawn for x0 [B, L] int64.

        Args:
            t: [B, L] times, or [B, 1] where a block is the whole sequence; None draws them, one a block.
            sampling_eps_min, sampling_eps_max: the clipped schedule; from 0.5 on, tokens are not weighted.

        Raises:
            ValueError: a parameterization other than "subs" and "sedd"; else as `fastdiff.dce_loss`.
        """
        check_choice("parameterization", self.parameterization, ("subs", "sedd"))
        clip = dict(sampling_eps_min=sampling_eps_min, sampling_eps_max=sampling_eps_max)
        if t is None:
            t = self._sample_t(x0.shape, x0.device, **clip)
        if self.mdlm_loss_scale:
            sigma = self.noise.total_noise(t)
            move_chance, weight = -torch.expm1(-sigma), self.noise.rate_noise(t) / torch.expm1(sigma)
        else:
            loss_scale, move_chance = self.noise(t)
            sigma, weight = self._sigma_from_p(move_chance[:, :1]), -loss_scale
        xt = self.q_xt(x0, move_chance, **clip)
        if self.ignore_bos:
            xt[:, 0] = x0[:, 0]
        logits = _logits(self, torch.cat((xt, x0), -1) if self.cross_attn else xt, sigma)
        if self.parameterization == "sedd":
            parametrization = "scale_by_sigma"
            if sigma.shape[1] > 1:  # the tail has the mean of a sequence's noise, and the loss that of each token
                logits = self._sedd_parameterization(logits, xt, self._process_sigma(sigma))
                parametrization = "log_score"
            options: dict[str, Any] = dict(parametrization=parametrization, mask_index=self.mask_index)
            return dse_loss(logits, sigma, xt, x0, dsigma=weight * torch.expm1(sigma), **options)
        if sampling_eps_min is not None and sampling_eps_min > 0.5:
            weight = torch.ones_like(weight)
        return dce_loss(logits, x0, xt=xt, weight=weight, mask_index=self.mask_index)

    _score_entropy = mdlm.Diffusion._score_entropy

    @torch.no_grad()
    def _ddpm_caching_update(
        self: Any, x: Tensor, t: Tensor, dt: float, p_x0: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """The last block of x [B, L] int64 at t [B, 1] a step on, or with one mask less (first_hitting): (cache, x).

        p_x0: the cache of the step before, logits [B, block, V] as long as no token changes, else None.

        Raises:
            ValueError: a parameterization other than "subs".
        """
        check_choice("parameterization", self.parameterization, ("subs",))
        sampling, move_chance = self.config.sampling, self.noise(t)[1]
        sigma, block = self._sigma_from_p(move_chance), x[:, -self.block_size :]
        if p_x0 is None:
            p_x0 = _logits(self, block if sampling.kv_cache else x, sigma, sample_mode=True)[:, -self.block_size :]
        masked, u = block == self.mask_index, torch.rand(block.shape, dtype=torch.float32, device=x.device)
        if sampling.first_hitting:
            first = u.masked_fill(~masked, -1).argmax(-1, keepdim=True)
            revealed = masked & (torch.arange(block.shape[1], device=x.device) == first)
        else:
            revealed = masked & (u * move_chance >= self.noise((t - dt).clamp_min(0))[1])
        block = sample_tokens(p_x0, block, mask=revealed, mask_index=self.mask_index, top_p=sampling.nucleus_p)
        if sampling.kv_cache and self.mask_index not in block:
            _logits(self, block, sigma, sample_mode=True, store_kv=True)
        return None if revealed.any() else p_x0, torch.cat((x[:, : -self.block_size], block), -1)


def _logits(diffusion: Any, x: Tensor, sigma: Tensor, sample_mode: bool = False, store_kv: bool = False) -> Tensor:
    """What `Diffusion.forward` has before it is parametrised."""
    flags = dict(sample_mode=sample_mode, store_kv=store_kv) if diffusion.config.algo.name == "bd3lm" else {}
    with mdlm.float32_on_gpus(x):
        return diffusion.backbone(x, diffusion._process_sigma(sigma), **flags)
