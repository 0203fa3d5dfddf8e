"""RADD's seams: its losses, the noise they draw, and the last lines of its model."""

import sys
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from fastdiff.integrations import radd
from standins import Case, LastLayer, Loss, Problem, published


def Batch_Uniform_Sampler(B: int, type: str = "naive", device: str = "cuda") -> Tensor:
    if type == "naive":
        return torch.rand(B, device=device)
    u = torch.rand(1 if type == "vdm" else B, device=device).expand(B)
    return torch.tensor([(u[i] + i / B) % 1 if type == "vdm" else (u[i] + i) / B for i in range(B)], device=device)


def add_noise_t(batch: Tensor, sigma: Tensor, mask_token: int) -> Tensor:
    return torch.where(torch.rand(batch.shape, device=batch.device) < 1 - (-sigma).exp(), mask_token, batch)


def add_noise_lambda(batch: Tensor, Lambda: Tensor, mask_token: int) -> Tensor:
    return torch.where(torch.rand(batch.shape, device=batch.device) < Lambda[..., None], mask_token, batch)


def add_noise_k(batch: Tensor, k: Tensor, mask_token: int) -> Tensor:
    ranks = [torch.randperm(batch.shape[1], device=batch.device) for _ in batch]
    return torch.where(torch.stack(ranks) < k[:, None], mask_token, batch)


def get_loss_fn(
    noise: Callable,
    token_dim: int,
    train: bool,
    sampling_eps: float = 1e-3,
    loss_type: str = "lambda_DCE",
    order: Tensor | None = None,
) -> Callable[..., Tensor]:
    """The loss of each sequence, [B]."""

    def t_loss(model: nn.Module, batch: Tensor, cond: None = None) -> Tensor:
        t = (1 - sampling_eps) * Batch_Uniform_Sampler(len(batch), type="vdm", device=batch.device) + sampling_eps
        sigma, dsigma = (value[:, None] for value in noise(t))
        xt = add_noise_t(batch, sigma, token_dim - 1)
        masked = xt == token_dim - 1
        model.train(train)
        log_score = model(xt)
        e1 = torch.where(sigma < 0.5, torch.expm1(sigma), torch.exp(sigma) - 1)
        log_score -= e1.log()[..., None]
        loss = torch.zeros(batch.shape, dtype=log_score.dtype, device=batch.device)
        loss[masked] = -log_score[masked].gather(-1, batch[masked][:, None]).squeeze(-1)
        loss /= e1
        if loss_type == "t_DSE":
            ratio = (1 / e1).expand_as(xt)[masked]
            loss[masked] += log_score[masked][:, :-1].exp().sum(-1)
            loss[masked] += ratio * (ratio.log() - 1)
        return (dsigma * loss).sum(-1)

    def count_loss(model: nn.Module, batch: Tensor, cond: None = None) -> Tensor:
        if loss_type == "lambda_DCE":
            Lambda = Batch_Uniform_Sampler(len(batch), type="decoupled", device=batch.device)
            xt = add_noise_lambda(batch, Lambda, token_dim - 1)
        else:
            k = torch.randint(1, batch.shape[1] + 1, (len(batch),), device=batch.device)
            xt = add_noise_k(batch, k, token_dim - 1)
        masked = xt == token_dim - 1
        model.train(train)
        log_condition = model(xt)
        loss = torch.zeros(batch.shape, dtype=log_condition.dtype, device=batch.device)
        loss[masked] = log_condition[masked].gather(-1, batch[masked][:, None]).squeeze(-1)
        loss = -loss.sum(-1)
        if loss_type == "lambda_DCE":
            return loss.double() / Lambda.double()
        return (loss / k * batch.shape[1]).to(torch.promote_types(loss.dtype, torch.float32))

    return count_loss if loss_type in ("lambda_DCE", "k_DCE") else t_loss


class RADD(nn.Module):
    def logits(self, indices: Tensor) -> Tensor:
        return self.output_layer(self.vocab_embed(indices))

    def forward(self, indices: Tensor) -> Tensor:
        x = self.logits(indices)
        x[..., :-1] = x[..., :-1].log_softmax(-1)
        return x


PUBLISHED = published("radd", "losses", "noise_lib", "model", "sampling")
RADD = PUBLISHED["model"].RADD


def network(inner: nn.Module) -> nn.Module:
    """The codebase's model, whose last layer is a network's, which may be wrapped."""
    made = RADD.__new__(RADD)
    nn.Module.__init__(made)
    made.vocab_embed, made.rotary_emb, made.blocks = lambda x: x, lambda x: None, []
    made.output_layer = LastLayer(inner)
    made.dtype = torch.float32
    return made


def cases(p: Problem) -> dict[str, Case]:
    """The four losses, at this noise."""
    here, losses, model_of = sys.modules[__name__], PUBLISHED["losses"], cache(network)
    masked, randint = (p.xt == p.mask_index).sum(1), torch.randint

    def counts(low: int, *rest: Any, **options: Any) -> Tensor:
        return masked.clamp_min(1) if low == 1 else randint(low, *rest, **options)

    def loss(module: ModuleType, loss_type: str, forward: Callable) -> Loss:
        def of(inner: nn.Module) -> Tensor:
            precision = torch.promote_types(next(inner.parameters()).dtype, torch.float32)
            sigma, dsigma, t = (value.to(precision) for value in (p.sigma, p.dsigma, p.t))
            draws = dict.fromkeys(("add_noise_t", "add_noise_lambda", "add_noise_k"), mock.Mock(return_value=p.xt))
            draws["Batch_Uniform_Sampler"] = mock.Mock(return_value=t)
            with (
                mock.patch.multiple(module, **draws),
                mock.patch("torch.randint", counts),
                mock.patch.object(RADD, "forward", forward),
            ):
                loss_fn = module.get_loss_fn(lambda t: (sigma, dsigma), p.num_states, True, loss_type=loss_type)
                return loss_fn(model_of(inner), p.x0).mean()

        return of

    def t_dce(inner: nn.Module) -> Tensor:
        """Without log(e1) / e1, which the published t_DCE adds at each mask: its mean and its gradient are 0."""
        e1 = torch.expm1(p.sigma)
        return published_t_dce(inner) - (masked * p.dsigma * e1.log() / e1).mean()

    # The real k_DCE ends in float32, which comparisons in float64 would see.
    theirs = {"k_DCE": here}
    pairs = {
        name: (loss(theirs.get(name, losses), name, RADD.forward), loss(radd, name, radd.RADD.forward))
        for name in radd.LOSSES
    }
    published_t_dce, ours = pairs["t_DCE"]
    return pairs | {"t_DCE": (t_dce, ours)}
