"""MDLM (kuleshov-group/mdlm): its losses, and the reverse step of its sampler, from the backbone's logits.

undo = apply_to_mdlm()
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_choice
from fastdiff.integrations.patching import patch
from fastdiff.losses import dce_loss, dse_loss
from fastdiff.tokens import sample_tokens


def apply_to_mdlm() -> Callable[[], None]:
    """Replaces the methods of `diffusion.Diffusion` that are here; returns what undoes that.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    return patch("MDLM", {"diffusion": (Diffusion,)})


class Diffusion:
    """For `diffusion.Diffusion`, whose attributes the methods read."""

    def _forward_pass_diffusion(self: Any, x0: Tensor) -> Tensor:
        """NELBO of each token, [B, L] float32 in nats, at a time and under a noise drawn for x0 [B, L] int64.

        For the parameterizations "subs" (with importance sampling of t or a change of variables too) and "sedd".

        Raises:
            ValueError: another parameterization, or discrete time (T > 0); else as `fastdiff.dce_loss`.
        """
        check_choice("parameterization", self.parameterization, ("subs", "sedd"))
        if self.T > 0:
            raise ValueError(f"T: expected 0, continuous time, got {self.T}")
        t = self._sample_t(len(x0), x0.device)
        if self.change_of_variables:
            low, high = (_log_masked(end) for end in (self.noise.sigma_min, self.noise.sigma_max))
            conditioning, move_chance = t, torch.exp(low + t * (high - low))
        else:
            sigma, dsigma = self.noise(t)
            conditioning, move_chance = sigma, -torch.expm1(-sigma)
        xt = self.q_xt(x0, move_chance[:, None])
        logits = _logits(self, xt, conditioning[:, None])
        if self.parameterization == "sedd":
            options: dict[str, Any] = dict(parametrization="scale_by_sigma", mask_index=self.mask_index)
            return dse_loss(logits, sigma, xt, x0, dsigma=dsigma, **options)
        if self.change_of_variables or self.importance_sampling:
            weight = -_log_masked(self.noise.sigma_min)  # every log of the masked share is as likely
        else:
            weight = dsigma / torch.expm1(sigma)
        return dce_loss(logits, x0, xt=xt, weight=weight, mask_index=self.mask_index)

    def _score_entropy(self: Any, log_score: Tensor, sigma: Tensor, xt: Tensor, x0: Tensor) -> Tensor:
        """Score entropy of each token in nats per unit of sigma, [B, L] float32; 0 where xt is not the mask.

        Args:
            log_score: [B, L, V], in any float type. sigma: [B, 1] total noise. xt, x0: [B, L] int64.

        Raises:
            ValueError, TypeError: as `fastdiff.dse_loss`.
        """
        return dse_loss(log_score, sigma, xt, x0, mask_index=self.mask_index)

    def _ddpm_caching_update(
        self: Any, x: Tensor, t: Tensor, dt: float, p_x0: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The backbone's logits [B, L, V], and tokens [B, L] at t - dt drawn given x [B, L] int64 at t [B] or [B, 1].

        p_x0: what this returned for the same x before, or None to ask the backbone. With any noise schedule.

        Raises:
            ValueError: a parameterization other than "subs".
        """
        check_choice("parameterization", self.parameterization, ("subs",))
        t = t.reshape(-1, 1)
        sigma, sigma_next = self.noise(t)[0], self.noise((t - dt).clamp_min(0))[0]
        logits = _logits(self, x, sigma) if p_x0 is None else p_x0
        u = torch.rand(x.shape, dtype=torch.float32, device=x.device)
        stays = u * torch.expm1(-sigma) > torch.expm1(-sigma_next)  # both are < 0
        revealed = (x == self.mask_index) & ~stays
        return logits, sample_tokens(logits, x, mask=revealed, mask_index=self.mask_index)


def _logits(diffusion: Any, x: Tensor, sigma: Tensor) -> Tensor:
    """What `Diffusion.forward` has before it is parametrised."""
    with float32_on_gpus(x):
        return diffusion.backbone(x, diffusion._process_sigma(sigma))


def float32_on_gpus(x: Tensor) -> AbstractContextManager[Any]:
    """The autocast of `Diffusion.forward`: CUDA's alone."""
    return torch.autocast("cuda", dtype=torch.float32) if x.is_cuda else nullcontext()


def _log_masked(sigma: Tensor) -> Tensor:
    return torch.log(-torch.expm1(-sigma))
