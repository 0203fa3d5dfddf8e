"""Duo (s-sahoo/duo): the uniform-state NELBO, and the reverse step of its samplers.

undo = apply_to_duo()
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.integrations.patching import patch, setting
from fastdiff.losses import dse_loss
from fastdiff.reverse import reverse_step


def apply_to_duo() -> Callable[[], None]:
    """Replaces the methods of `algo.DUO_BASE`, and so of what derives from it; returns what undoes that.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    return patch("Duo", {"algo": (DUO_BASE,)})


class DUO_BASE:
    """For `algo.DUO_BASE`, whose attributes the methods read."""

    def _loss(
        self: Any,
        x0: Tensor,
        labels: Tensor | None,
        valid_tokens: Tensor,
        current_accumulation_step: int | None = None,
        train_mode: bool = False,
    ) -> Any:
        """That of the base class, to which the model gives logits, except for distillation, which compares
        log-probabilities."""
        here = next(c for c in type(self).__mro__ if vars(c).get("_loss") is DUO_BASE._loss)
        with setting(self, "gives_logits", self.config.algo.name != "distillation"):
            base: Any = super(here, self)
            return base._loss(x0, labels, valid_tokens, current_accumulation_step, train_mode)

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
        alpha_t = alpha_t.double()
        options: dict[str, Any] = dict(graph="uniform", parametrization="logits", dsigma=-dalpha_t / alpha_t)
        return dse_loss(log_x_theta, -torch.log(alpha_t), xt, x0, **options)

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
