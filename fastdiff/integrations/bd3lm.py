"""BD3-LM (kuleshov-group/bd3lms): its losses, from the backbone's hidden states, and the reverse step of its sampler.

undo = apply_to_bd3lm()
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checks import check_choice
from fastdiff.generation.tokens import sample_tokens
from fastdiff.integrations import mdlm
from fastdiff.integrations.loss_head import LossHead
from fastdiff.integrations.patching import patch


def apply_to_bd3lm() -> Callable[[], None]:
    """Replaces the methods of `diffusion.Diffusion` that are here; returns what undoes that.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    return patch("BD3-LM", {"diffusion": (Diffusion,)})


class Diffusion:
    """For `diffusion.Diffusion`, whose attributes the methods read."""

    def _loss(
        self: Any,
        x0: Tensor,
        attention_mask: Tensor,
        t: None = None,
        sampling_eps_min: float | Tensor | None = None,
        sampling_eps_max: float | Tensor | None = None,
    ) -> mdlm.Loss:
        """NELBO of a token, in nats, under a noise drawn for x0 [B, L] int64. No logits are made.

        For the parameterizations "subs" and "sedd"; "ar" is BD3-LM's own, and so are the log scores of "sedd" of
        [xt, x0], or under noise that differs within a sequence.

        Args:
            attention_mask: [B, L], 0 at padding; outside training ignore_bos sets it to 0 at the first token.
            t: unused, as there.
            sampling_eps_min, sampling_eps_max: the clipped schedule; from 0.5 on, tokens are not weighted.

        Raises:
            ValueError: another parameterization.
            TypeError: a class derived from this one has its own of what is not called here.
            ValueError, TypeError, RuntimeError: as `LossHead.dce_loss`.
        """
        check_choice("parameterization", self.parameterization, ("subs", "sedd", "ar"))
        if not hasattr(self, "sampling_eps_min"):
            sampling_eps_min, sampling_eps_max = 1e-3, 1.0
        elif sampling_eps_min is None:
            sampling_eps_min, sampling_eps_max = self.sampling_eps_min, self.sampling_eps_max
        clip: dict[str, Any] = dict(sampling_eps_min=sampling_eps_min, sampling_eps_max=sampling_eps_max)
        x0, targets, attention_mask = self._maybe_sub_sample(x0, attention_mask)
        if self.ignore_bos and not self.training:
            attention_mask[:, 0] = 0
        if self.parameterization == "ar":
            return mdlm.mean_loss(-mdlm.at(self.forward(x0, None), targets), attention_mask)
        mdlm.check_bypassed(self, Diffusion._loss, *mdlm.BYPASSED)
        xt, sigma, weight = _noised(self, x0, clip)
        x = torch.cat((xt, x0), -1) if self.cross_attn else xt

        def logits(x: Tensor) -> Tensor:
            return _logits(self, x, sigma[: len(x)])

        head = LossHead(self.backbone, mdlm.last_layer(self.backbone), logits=_without_x0(self.backbone)(logits))
        if self.parameterization == "subs":
            weight = torch.ones_like(weight) if sampling_eps_min > 0.5 else weight
            return mdlm.subs_loss(self, head, logits, x, x0, weight, attention_mask)
        dsigma = weight * torch.expm1(sigma)
        if sigma.shape[1] == 1 and not self.cross_attn:
            return mdlm.sedd_loss(self, head, logits, xt, x0, sigma, dsigma, attention_mask)
        # Losses per token may need rows that are cut off with those of x0; and if each token has its noise, the model's
        # tail has the mean of a sequence's.
        losses = dsigma * self._score_entropy(self.forward(x, sigma), sigma, xt, x0)
        return mdlm.mean_loss(losses, attention_mask)

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


def _noised(diffusion: Any, x0: Tensor, clip: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """xt [B, L], what the backbone is told of its noise, [B, 1] or [B, L], and the weight of a masked token, alike."""
    t = diffusion._sample_t(x0.shape, x0.device, **clip)
    if diffusion.mdlm_loss_scale:
        sigma = diffusion.noise.total_noise(t)
        move_chance, weight = -torch.expm1(-sigma), diffusion.noise.rate_noise(t) / torch.expm1(sigma)
    else:
        loss_scale, move_chance = diffusion.noise(t)
        sigma, weight = diffusion._sigma_from_p(move_chance[:, :1]), -loss_scale
    xt = diffusion.q_xt(x0, move_chance, **clip)
    if diffusion.ignore_bos:
        xt[:, 0] = x0[:, 0]
    return xt, sigma, weight


def _logits(diffusion: Any, x: Tensor, sigma: Tensor, sample_mode: bool = False, store_kv: bool = False) -> Tensor:
    """What `Diffusion.forward` has before it is parametrised."""
    flags = dict(sample_mode=sample_mode, store_kv=store_kv) if diffusion.config.algo.name == "bd3lm" else {}
    with mdlm.float32_on_gpus(x):
        return diffusion.backbone(x, diffusion._process_sigma(sigma), **flags)


@contextmanager
def _without_x0(backbone: nn.Module) -> Iterator[None]:
    """With a backbone that takes any tokens, and not [xt, x0] of one length: without DIT's mask, or the hub's flag."""
    names = ("block_diff_mask", "cross_attn")
    held = [(vars(m), {name: vars(m)[name] for name in names if name in vars(m)}) for m in backbone.modules()]
    for now, before in held:
        now.pop("block_diff_mask", None)
        now.update(dict.fromkeys(before.keys() & {"cross_attn"}, False))
    try:
        yield
    finally:
        for now, before in held:
            now.update(before)
