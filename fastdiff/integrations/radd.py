"""RADD (ML-GSAI/RADD): its four losses t_DSE, t_DCE, lambda_DCE and k_DCE, without logits, and its noise.

undo = apply_to_radd()    # before losses.get_step_fn, or the evaluation's get_loss_fn
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.checks import check_choice
from fastdiff.integrations.loss_head import LossHead
from fastdiff.integrations.patching import patch, setting
from fastdiff.noise.noising import mask_exactly, mask_tokens

LOSSES = ("t_DSE", "t_DCE", "lambda_DCE", "k_DCE")
Noise = Callable[[Tensor], tuple[Tensor, Tensor]]


def apply_to_radd() -> Callable[[], None]:
    """Replaces the losses, the noise that they draw and the model's tail; returns what undoes that.

    Raises:
        ImportError, RuntimeError: as `patch`.
    """
    noise = (add_noise_t, add_noise_lambda, add_noise_k)
    return patch("RADD", {"losses": (get_loss_fn, Batch_Uniform_Sampler), "noise_lib": noise, "model": (RADD,)})


class RADD:
    """For `model.RADD`."""

    def forward(self: Any, indices: Tensor) -> Tensor:
        """Log-probabilities [B, L, V] of indices [B, L] int64; to these losses, its last layer's output."""
        x = self.logits(indices)
        if not getattr(self, "gives_logits", False):
            x[..., :-1] = x[..., :-1].log_softmax(-1)
        return x


def add_noise_t(batch: Tensor, sigma: Tensor, mask_token: int) -> Tensor:
    """For `noise_lib.add_noise_t`: batch [B, L] int64 with tokens masked at total noise sigma, [B, 1] or [B, L]."""
    return mask_tokens(batch, -torch.expm1(-sigma), mask_index=mask_token).xt


def add_noise_lambda(batch: Tensor, Lambda: Tensor, mask_token: int) -> Tensor:
    """For `noise_lib.add_noise_lambda`: batch [B, L] int64 with tokens masked with probability Lambda [B]."""
    return mask_tokens(batch, Lambda, mask_index=mask_token).xt


def add_noise_k(batch: Tensor, k: Tensor, mask_token: int) -> Tensor:
    """For `noise_lib.add_noise_k`: batch [B, L] int64 with exactly k [B] tokens of each sequence masked."""
    return mask_exactly(batch, k, mask_index=mask_token).xt


def Batch_Uniform_Sampler(B: int, type: str = "naive", device: torch.device | str = "cuda") -> Tensor:
    """For `losses.Batch_Uniform_Sampler`: [B] numbers in [0, 1), independent ("naive"), evenly spaced from one random
    start ("vdm"), or one in each of B strata ("decoupled")."""
    check_choice("type", type, ("naive", "vdm", "decoupled"))
    made: dict[str, Any] = dict(dtype=torch.float32, device=device)
    u = torch.rand(1 if type == "vdm" else B, **made)
    return u if type == "naive" else (torch.arange(B, **made) / B + (u if type == "vdm" else u / B)) % 1


def get_loss_fn(
    noise: Noise,
    token_dim: int,
    train: bool,
    sampling_eps: float = 1e-3,
    loss_type: str = "lambda_DCE",
    order: Tensor | None = None,
) -> Callable[..., Tensor]:
    """For `losses.get_loss_fn`: a function of (model, batch [B, L] int64) that noises the batch and bounds its NLL.

    Args:
        noise: t [B] -> (sigma, dsigma), each [B].
        token_dim: V, the mask, which is the last, included.
        train: whether the model is put into training or evaluation mode.
        sampling_eps: the smallest t.
        loss_type: "t_DSE", "t_DCE", "lambda_DCE" or "k_DCE".
        order: unused, as there.

    Returns:
        The function, whose result is [B] float32 in nats per sequence ("lambda_DCE": float64), to be summed or
        averaged: they must weigh alike in what backward starts from, or that is a ValueError. Its model is RADD's, as
        it is or wrapped by DDP; its last layer computes the loss, and no logits are made.

    Raises:
        ValueError: loss_type is not one of the four.
    """
    check_choice("loss_type", loss_type, LOSSES)

    def loss_fn(model: nn.Module, batch: Tensor, cond: None = None) -> Tensor:
        B, L = batch.shape
        if loss_type == "lambda_DCE":
            Lambda = Batch_Uniform_Sampler(B, "decoupled", batch.device)
            weight, perturbed_batch = 1 / Lambda.double(), add_noise_lambda(batch, Lambda, token_dim - 1)
        elif loss_type == "k_DCE":
            k = torch.randint(1, L + 1, (B,), device=batch.device)
            weight, perturbed_batch = L / k.double(), add_noise_k(batch, k, token_dim - 1)
        else:
            sigma, dsigma = noise((1 - sampling_eps) * Batch_Uniform_Sampler(B, "vdm", batch.device) + sampling_eps)
            weight, perturbed_batch = dsigma / torch.expm1(sigma), add_noise_t(batch, sigma[:, None], token_dim - 1)
        network: Any = getattr(model, "module", model)
        scoring = LossHead(model, network.output_layer.linear, logits=model).dce_loss(
            batch, xt=perturbed_batch, weight=weight, summed=True
        )
        model.train(train)
        with setting(network, "gives_logits", True), scoring as loss_of:
            loss = loss_of(model(perturbed_batch))
        return loss.sum(-1, dtype=torch.float64 if loss_type == "lambda_DCE" else None)

    return loss_fn
