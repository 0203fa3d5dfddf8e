"""Duo (s-sahoo/duo): the uniform-state NELBO, from the backbone's hidden states, and the reverse step of its samplers.

undo = apply_to_duo()
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastdiff.generation.reverse import reverse_step
from fastdiff.integrations.loss_head import LossHead
from fastdiff.integrations.mdlm import at_step, check_bypassed, float32_on_gpus, last_layer
from fastdiff.integrations.patching import patch, setting
from fastdiff.losses.row_losses import dse_loss


def apply_to_duo() -> Callable[[], None]:
    """Replaces the methods of `algo.DUO_BASE`, and so of what derives from it; returns what undoes that.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    return patch("Duo", {"algo": (DUO_BASE,)})


@dataclass
class Loss:
    """As `trainer_base.Loss`: the mean over tokens; their sum, without gradient, and their number."""

    loss: Tensor
    nlls: Tensor
    prior_loss: float
    num_tokens: Tensor


@dataclass
class _Sum:
    """Of weighted losses of all tokens; no tensor, as nobody shall go on as if it were one loss a token."""

    loss: Tensor


class DUO_BASE:
    """For `algo.DUO_BASE`, whose attributes the methods read."""

    def _loss(
        self: Any,
        x0: Tensor,
        labels: Tensor | None,
        valid_tokens: Tensor,
        current_accumulation_step: int | None = None,
        train_mode: bool = False,
    ) -> Loss:
        """Mean of `nll` over tokens, which makes no logits; or, in the curriculum, it is given them, and in
        distillation log-probabilities.

        Args:
            x0: [B, L] int64. labels: [B] classes or None. valid_tokens: [B, L], 0 at padding.
            current_accumulation_step, train_mode: for `nll`.
        """
        x0, output_tokens, valid_tokens = self._process_model_input(x0, valid_tokens)
        num_tokens, distillation = valid_tokens.sum(), self.config.algo.name == "distillation"
        weights = valid_tokens.double() / num_tokens  # so that backward starts from 1
        with setting(self, "gives_logits", not distillation), setting(self, "token_weights", weights):
            nlls = self.nll(x0, labels, output_tokens, current_accumulation_step, train_mode)
        loss = nlls.loss if isinstance(nlls, _Sum) else (nlls * valid_tokens).sum() / num_tokens
        return Loss(loss, loss.detach() * num_tokens, 0.0, num_tokens)

    def nll(
        self: Any,
        x0: Tensor,
        labels: Tensor | None,
        output_tokens: None,
        current_accumulation_step: int | None = None,
        train_mode: bool = False,
    ) -> Any:
        """NELBO of each token, [B, L] in nats, at a time and under a noise drawn for x0 [B, L] int64; within `_loss`
        their mean over tokens, marked as such.

        Raises:
            ValueError: labels though the model is not class-conditional, or none though it is.
            TypeError: a class derived from this one has its own of what is not called here.
            ValueError, TypeError, RuntimeError: as `LossHead.dse_loss`.
        """
        check_bypassed(self, DUO_BASE.nll, "forward", "_process_model_output", "nll_per_token")
        if self.class_conditional != (labels is not None):
            raise ValueError(f"labels: expected classes if class_conditional, else None, got {labels}")
        t = self._sample_t(len(x0), current_accumulation_step)
        if self.T > 0:
            t = at_step(t, self.T)
        dalpha_t, alpha_t = (number[:, None] for number in self.noise(t))
        xt, sigma = self.q_xt(x0, alpha_t), self._sigma_from_alphat(alpha_t)
        if labels is not None:
            dropped = torch.rand(labels.shape, dtype=torch.float32, device=labels.device) < self.class_cond_dropout
            labels = torch.where(dropped, self.num_classes, labels)
        layer = last_layer(self.backbone)
        if layer is None:  # as in UNet, whose logits are not a product
            return self.nll_per_token(self.forward(xt, sigma, labels), xt, x0, alpha_t, dalpha_t)

        def logits(x: Tensor) -> Tensor:
            n, classes = len(x), None if labels is None else labels[: len(x)]
            with float32_on_gpus(x):
                return self.backbone(x=x, sigma=self._process_sigma(sigma[:n]), class_cond=classes, weights=None)

        options, weights = _options(alpha_t, dalpha_t), getattr(self, "token_weights", False)
        if weights is not False:
            options |= dict(dsigma=options["dsigma"] * weights, reduction="sum")
        with LossHead(self.backbone, layer, logits=logits).dse_loss(xt=xt, x0=x0, **options) as loss_of:
            loss = loss_of(logits(xt))
        return loss if weights is False else _Sum(loss)

    def _process_model_output(self: Any, model_output: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        """Log-probabilities [B, L, V]; or within `_loss` the logits as they are, which `nll_per_token` normalises."""
        return model_output if getattr(self, "gives_logits", False) else model_output.log_softmax(-1)

    def nll_per_token(
        self: Any,
        log_x_theta: Tensor,
        xt: Tensor,
        x0: Tensor,
        alpha_t: Tensor,
        dalpha_t: float | Tensor,
        low_var: bool = False,
    ) -> Tensor:
        """NELBO of each token, [B, L] float32 (float64 for float64 log_x_theta) in nats.

        Args:
            log_x_theta: [B, L, V] log-probabilities or logits of x0, in any float type.
            xt, x0: [B, L] int64 noised and clean tokens.
            alpha_t: [B, 1] in (0, 1). dalpha_t: its derivative in t, < 0, a number or [B, 1].
            low_var: unused, as there.

        Raises:
            ValueError, TypeError: as `fastdiff.dse_loss`.
        """
        return dse_loss(log_x_theta, xt=xt, x0=x0, **_options(alpha_t, dalpha_t))

    def _ancestral_update(
        self: Any,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None,
        dt: Any,
        p_x0: Tensor | None = None,
        noise_removal_step: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """The model's log-probabilities [B, L, V], and tokens [B, L] at t - dt, or 0, drawn given x [B, L] at t [B, 1].

        labels: [B] classes or None. dt: a number, unused in the step that removes all noise (noise_removal_step).
        p_x0: what this returned for the same x before, or None to ask the model.

        Raises:
            ValueError: sampling.p_nucleus < 1, or guidance of a class-conditional model other than by 0 or 1.
        """
        if self.p_nucleus < 1:
            raise ValueError(f"p_nucleus: expected 1, got {self.p_nucleus}")
        guidance = self.config.sampling.guid_weight if self.class_conditional else None
        if guidance not in (None, 0, 1):
            raise ValueError(f"guid_weight: expected None, 0 or 1, got {guidance}")
        sigma = self._sigma_from_alphat(self.noise(t)[1])
        sigma_next = 0 if noise_removal_step else self._sigma_from_alphat(self.noise(t - dt)[1])
        if p_x0 is None:
            if labels is not None and guidance != 1:
                labels = torch.full_like(labels, self.num_classes)
            p_x0 = self.forward(x, sigma, labels)
        return p_x0, reverse_step(p_x0, x, sigma, sigma_next=sigma_next, graph="uniform", parametrization="logits")


def _options(alpha_t: Tensor, dalpha_t: float | Tensor) -> dict[str, Any]:
    """Those of `dse_loss` that make it Duo's NELBO."""
    alpha_t = alpha_t.double()
    sigma, dsigma = -torch.log(alpha_t), -dalpha_t / alpha_t
    return dict(sigma=sigma, dsigma=dsigma, graph="uniform", parametrization="logits")
