"""MDLM (kuleshov-group/mdlm): its losses, from the backbone's hidden states, and the reverse step of its sampler.

undo = apply_to_mdlm()
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checks import check_choice
from fastdiff.generation.tokens import sample_tokens
from fastdiff.integrations.loss_head import LossHead
from fastdiff.integrations.patching import patch
from fastdiff.losses.row_losses import dse_loss

# What a loss that makes no logits does not call.
BYPASSED = (
    *("forward", "_forward_pass_diffusion", "_subs_parameterization", "_sedd_parameterization", "_score_entropy"),
    *("_d3pm_parameterization", "_d3pm_loss", "_reconstruction_loss"),
)
LAST_LAYERS = ("output_layer.linear", "backbone.output_layer.linear", "model.lm_head")  # DIT, the hub's, DiMamba


def apply_to_mdlm() -> Callable[[], None]:
    """Replaces the methods of `diffusion.Diffusion` that are here; returns what undoes that.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    return patch("MDLM", {"diffusion": (Diffusion,)})


@dataclass
class Loss:
    """As `diffusion.Loss`: the mean over tokens; what it sums, [B, L]; the tokens, [B, L], 0 where they are padding."""

    loss: Tensor
    nlls: Tensor
    token_mask: Tensor

    def __add__(self, other: "Loss") -> "Loss":
        return Loss(self.loss + other.loss, self.nlls + other.nlls, self.token_mask)


class Diffusion:
    """For `diffusion.Diffusion`, whose attributes the methods read."""

    def _loss(self: Any, x0: Tensor, attention_mask: Tensor) -> Loss:
        """NELBO of a token, in nats, at a time and under a noise drawn for x0 [B, L] int64. No logits are made.

        For the parameterizations "subs" (with importance sampling of t or a change of variables too), "d3pm" with
        subs_masking, and "sedd", in continuous time and in T steps. "ar" is MDLM's own, and so is "d3pm" without
        subs_masking, whose loss follows the probability of the mask too, from logits.

        Raises:
            ValueError: another parameterization.
            TypeError: a class derived from this one has its own of what is not called here.
            ValueError, TypeError, RuntimeError: as `LossHead.dce_loss`.
        """
        x0, targets, attention_mask = self._maybe_sub_sample(x0, attention_mask)
        if self.parameterization == "ar":
            return mean_loss(-at(self.backbone(x0, None), targets), attention_mask)
        if self.parameterization == "d3pm" and not self.subs_masking:
            return mean_loss(self._forward_pass_diffusion(x0), attention_mask)
        check_bypassed(self, Diffusion._loss, *BYPASSED)
        check_choice("parameterization", self.parameterization, ("subs", "d3pm", "sedd", "ar"))
        t = self._sample_t(len(x0), x0.device)
        if self.T > 0:
            t = at_step(t, self.T)
        if self.change_of_variables:
            low, high = (_log_masked(end) for end in (self.noise.sigma_min, self.noise.sigma_max))
            conditioning, move_chance = t, torch.exp(low + t * (high - low))
        else:
            sigma, dsigma = self.noise(t)
            conditioning, move_chance = sigma, -torch.expm1(-sigma)
        xt = self.q_xt(x0, move_chance[:, None])

        head, logits = _head(self, conditioning)
        if self.parameterization == "sedd":
            return sedd_loss(self, head, logits, xt, x0, sigma[:, None], dsigma[:, None], attention_mask)
        if self.T > 0:
            weight = 1 / t.clamp_max(1 - 1e-4)[:, None]  # T (alpha_s - alpha_t) / (1 - alpha_t), as if log-linear
        elif self.change_of_variables or self.importance_sampling:
            weight = -_log_masked(self.noise.sigma_min)[None]  # every log of the masked share is as likely
        else:
            weight = (dsigma / torch.expm1(sigma))[:, None]
        loss = subs_loss(self, head, logits, xt, x0, weight, attention_mask)
        return loss if self.parameterization == "subs" else loss + _reconstruction_loss(self, x0, attention_mask)

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


# ---------------------------------------------------------------------------------------------------------
# What BD3-LM shares.

Model = Callable[[Tensor], Tensor]


def subs_loss(
    diffusion: Any, head: LossHead, model: Model, x: Tensor, x0: Tensor, weight: Tensor, attention_mask: Tensor
) -> Loss:
    """Cross-entropy at masks, times weight, [B, L] or what broadcasts to it.

    Where x is [xt, x0], [B, 2 L], so are the hidden states; the rows of x0 are not scored.
    """
    halves, weight = x.shape[1] // x0.shape[1], weight * attention_mask
    scored = _scored(x, x0.repeat(1, halves), attention_mask.repeat(1, halves))
    options: dict[str, Any] = dict(xt=scored, weight=weight.repeat(1, halves), mask_index=diffusion.mask_index)
    options |= dict(reduction="mean", num_items=attention_mask.sum(), return_stats=True)
    with head.dce_loss(x0.repeat(1, halves), **options) as loss_of:
        loss, stats = loss_of(model(x))
    return Loss(loss, weight * stats.nll[:, : x0.shape[1]], attention_mask)


def sedd_loss(
    diffusion: Any,
    head: LossHead,
    model: Model,
    xt: Tensor,
    x0: Tensor,
    sigma: Tensor,
    dsigma: Tensor,
    attention_mask: Tensor,
) -> Loss:
    """Score entropy at masks of what the backbone gives before it is scaled by sigma, [B, 1], times dsigma, [B, L] or
    what broadcasts to it."""
    options: dict[str, Any] = dict(parametrization="scale_by_sigma", mask_index=diffusion.mask_index, summed=True)
    count = attention_mask.sum()
    options |= dict(dsigma=dsigma.double() * attention_mask / count)  # so that backward starts from 1
    with head.dse_loss(sigma, _scored(xt, x0, attention_mask), x0, **options) as loss_of:
        shares = loss_of(model(xt))
    return Loss(shares.sum(), shares.detach() * count, attention_mask)


def mean_loss(losses: Tensor, attention_mask: Tensor) -> Loss:
    nlls = losses * attention_mask
    return Loss(nlls.sum() / attention_mask.sum(), nlls, attention_mask)


def at_step(t: Tensor, num_steps: int) -> Tensor:
    """The time in 1/T, 2/T, ..., 1 that ends the step in which t is."""
    return (t * num_steps).int() / num_steps + 1 / num_steps


def _scored(xt: Tensor, x0: Tensor, attention_mask: Tensor) -> Tensor:
    """xt with masks nowhere but where a token is scored."""
    return torch.where(attention_mask != 0, xt, x0)


def last_layer(backbone: nn.Module) -> nn.Module | None:
    """What makes logits of hidden states, where these codebases have it; None if it is not there."""
    for name in LAST_LAYERS:
        try:
            return backbone.get_submodule(name)
        except AttributeError:
            continue
    return None


def at(rows: Tensor, tokens: Tensor) -> Tensor:
    """The number of each row [..., V] that is its token's, [...]."""
    return rows.gather(-1, tokens[..., None]).squeeze(-1)


def check_bypassed(diffusion: Any, ours: Callable[..., Any], *names: str) -> None:
    """That no class derived from the one that has our method has its own of what this does not call."""
    for cls in type(diffusion).__mro__:
        if vars(cls).get(ours.__name__) is ours:
            return
        for name in names:
            if name in vars(cls):
                raise TypeError(
                    f"{cls.__name__}.{name}: expected the published one, as {ours.__name__} does not call it"
                )


def float32_on_gpus(x: Tensor) -> AbstractContextManager[Any]:
    """The autocast of `Diffusion.forward`: CUDA's alone."""
    return torch.autocast("cuda", dtype=torch.float32) if x.is_cuda else nullcontext()


def _reconstruction_loss(diffusion: Any, x0: Tensor, attention_mask: Tensor) -> Loss:
    """Cross-entropy at all tokens of x0 [B, L], of which the model sees each."""
    head, logits = _head(diffusion, diffusion.noise(torch.zeros(len(x0), dtype=diffusion.dtype, device=x0.device))[0])
    options: dict[str, Any] = dict(mask=attention_mask != 0, weight=attention_mask, mask_index=diffusion.mask_index)
    options |= dict(reduction="mean", num_items=attention_mask.sum(), return_stats=True)
    with head.dce_loss(x0, **options) as loss_of:
        loss, stats = loss_of(logits(x0))
    return Loss(loss, stats.nll * attention_mask, attention_mask)


def _head(diffusion: Any, conditioning: Tensor) -> tuple[LossHead, Model]:
    """The backbone's last layer, and how it is asked for logits [n, L, V] at noise [B]."""

    def logits(x: Tensor) -> Tensor:
        return _logits(diffusion, x, conditioning[: len(x), None])

    return LossHead(diffusion.backbone, last_layer(diffusion.backbone), logits=logits), logits


def _logits(diffusion: Any, x: Tensor, sigma: Tensor) -> Tensor:
    """What `Diffusion.forward` has before it is parametrised."""
    with float32_on_gpus(x):
        return diffusion.backbone(x, diffusion._process_sigma(sigma))


def _log_masked(sigma: Tensor) -> Tensor:
    return torch.log(-torch.expm1(-sigma))
