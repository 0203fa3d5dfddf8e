"""Duo's seams: the uniform-state NELBO, from log-probabilities, and a reverse step."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.integrations import duo
from standins import Network, Problem, mdlm, published
from standins.sedd import sample_categorical


@dataclass
class Loss:
    loss: Tensor
    nlls: Tensor
    prior_loss: float
    num_tokens: Tensor


class LogLinear:
    """t -> (dalpha, alpha)."""

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(t, self.eps - 1), 1 - (1 - self.eps) * t


class Diffusion:
    """Attributes are those of the codebase: backbone, noise, vocab_size and so on."""

    def _process_model_input(self, x0: Tensor, valid_tokens: Tensor) -> tuple[Tensor, None, Tensor]:
        return x0, None, valid_tokens

    def _loss(
        self,
        x0: Tensor,
        labels: Tensor | None,
        valid_tokens: Tensor,
        current_accumulation_step: int | None = None,
        train_mode: bool = False,
    ) -> Loss:
        x0, output_tokens, valid_tokens = self._process_model_input(x0, valid_tokens)
        loss = self.nll(x0, labels, output_tokens, current_accumulation_step, train_mode)
        nlls, num_tokens = (loss * valid_tokens).sum(), valid_tokens.sum()
        return Loss(nlls / num_tokens, nlls, 0.0, num_tokens)

    def nll(
        self,
        x0: Tensor,
        labels: Tensor | None,
        output_tokens: None,
        current_accumulation_step: int | None = None,
        train_mode: bool = False,
    ) -> Tensor:
        t = self._sample_t(len(x0), current_accumulation_step)
        if self.T > 0:
            t = (t * self.T).int() / self.T + 1 / self.T
        dalpha_t, alpha_t = (value[:, None] for value in self.noise(t))
        xt = self.q_xt(x0, alpha_t)
        if self.class_conditional:
            dropped = torch.rand(labels.shape, dtype=torch.float32) < self.class_cond_dropout
            labels = torch.where(dropped, self.num_classes, labels)
        log_x_theta = self.forward(xt, self._sigma_from_alphat(alpha_t), labels)
        if torch.isnan(log_x_theta).any():
            print("model_output", log_x_theta)
        return self.nll_per_token(log_x_theta, xt, x0, alpha_t, dalpha_t)

    def _sample_t(self, n: int, accum_step: None) -> Tensor:
        return mdlm.antithetic(n, self.sampling_eps)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        step = batch_idx % self.trainer.accumulate_grad_batches
        losses = self._loss(batch["input_ids"], batch.get("labels"), batch["attention_mask"], step, train_mode=True)
        self.metrics.update_train(losses.nlls, losses.prior_loss, losses.num_tokens)
        self.log(name="trainer/loss", value=losses.loss.item(), on_step=True, on_epoch=False, sync_dist=True)
        return losses.loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        losses = self._loss(batch["input_ids"], batch.get("labels"), batch["attention_mask"])
        self.metrics.update_valid(losses.nlls, losses.prior_loss, losses.num_tokens)
        return losses.loss

    def _process_sigma(self, sigma: Tensor) -> Tensor:
        return sigma.mean(-1) if self.time_conditioning else torch.zeros_like(sigma.mean(-1))

    def forward(self, xt: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        model_output = self.backbone(x=xt, sigma=self._process_sigma(sigma), class_cond=labels, weights=None)
        return self._process_model_output(model_output=model_output, xt=xt, sigma=sigma)


class DUO_BASE(Diffusion):
    def q_xt(self, x0: Tensor, alpha_t: Tensor) -> Tensor:
        return torch.where(torch.rand(x0.shape) < 1 - alpha_t, torch.randint_like(x0, self.vocab_size), x0)

    def _sigma_from_alphat(self, alpha_t: Tensor) -> Tensor:
        return -torch.log(alpha_t)

    def _process_model_output(self, model_output: Tensor, xt: Tensor, sigma: Tensor) -> Tensor:
        return model_output.log_softmax(-1)

    def nll_per_token(
        self,
        log_x_theta: Tensor,
        xt: Tensor,
        x0: Tensor,
        alpha_t: Tensor,
        dalpha_t: float | Tensor,
        low_var: bool = False,
    ) -> Tensor:
        n, same = self.vocab_size, (x0 == xt).float()
        marginal = n * alpha_t[..., None] * log_x_theta.exp() + 1 - alpha_t[..., None]
        at_xt, at_x0 = (marginal.gather(-1, x[..., None]).squeeze(-1) for x in (xt, x0))
        floor = (1 - alpha_t) / (n * alpha_t + 1 - alpha_t)
        first = n * (1 / (1 - alpha_t + n * alpha_t * same) - 1 / at_xt)
        second = -(same * floor + 1 - same) * (marginal.log().sum(-1) - n * at_xt.log())
        second = second - n * alpha_t / (1 - alpha_t) * (at_x0.log() - at_xt.log()) * (1 - same)
        second = second + ((n - 1) * floor * same - (1 - same) / floor) * floor.log()
        return dalpha_t / (n * alpha_t) * (first - second)

    def _posterior_from_x0(self, x0: Tensor, xt: Tensor, alpha_s: Tensor, alpha_t: Tensor) -> Tensor:
        n, here = self.vocab_size, F.one_hot(xt, self.vocab_size)
        alpha_s, alpha_t = alpha_s[..., None], alpha_t[..., None]
        alpha_ts = alpha_t / alpha_s
        drawn_anew = (1 - alpha_ts) * (1 - alpha_s) / n
        joint = alpha_t * n * x0 * here + (alpha_ts - alpha_t) * here + (alpha_s - alpha_t) * x0 + drawn_anew
        return joint / (alpha_t * n * x0.gather(-1, xt[..., None]) + 1 - alpha_t)

    def _ancestral_update(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor | None,
        dt: float | None,
        p_x0: Tensor | None = None,
        noise_removal_step: bool = False,
    ) -> tuple[Tensor, Tensor]:
        alpha_t = self.noise(t)[1]
        alpha_s = torch.ones_like(alpha_t) if noise_removal_step else self.noise(t - dt)[1]
        if p_x0 is None:
            p_x0 = self.forward(x, self._sigma_from_alphat(alpha_t), labels).double().exp()
        return p_x0, sample_categorical(self._posterior_from_x0(p_x0, x, alpha_s, alpha_t))


PUBLISHED = published("duo", "algo", "trainer_base")
DUO_BASE, LogLinear = PUBLISHED["algo"].DUO_BASE, PUBLISHED["trainer_base"].LogLinear


def given(cls: type, num_states: int, **attributes: Any) -> Any:
    """An object of the class with these attributes and no more."""
    sampling = SimpleNamespace(guid_weight=None, use_float64=True)
    settings = dict(
        config=SimpleNamespace(algo=SimpleNamespace(name="duo_base"), sampling=sampling),
        class_conditional=False,
        training=True,
        time_conditioning=True,
        p_nucleus=1.0,
        vocab_size=num_states,
        T=0,
        ignore_bos=False,
        loss_type="elbo",
        _dtype=torch.float32,
        _device=torch.device("cpu"),
    )
    made = cls.__new__(cls)
    made.__dict__.update(settings | attributes)
    return made


def cases(p: Problem) -> dict[str, tuple[Callable[[Network], Tensor], Callable[[Network], Tensor]]]:
    """The NELBO of a token, with the model's log_softmax and the look for NaN that comes before the loss."""
    ours = type("Ours", (DUO_BASE,), {n: f for n, f in vars(duo.DUO_BASE).items() if callable(f)})

    def loss(cls: type) -> Callable[[Network], Tensor]:
        def of(network: Network) -> Tensor:
            dtype = torch.promote_types(network.lm_head.weight.dtype, torch.float32)
            alpha_t = torch.exp(-p.sigma).to(dtype)
            diffusion = given(
                cls,
                p.num_states,
                backbone=mdlm.Backbone(network),
                noise=lambda t: (-torch.ones_like(alpha_t), alpha_t),
                _sample_t=lambda n, step: p.t,
                q_xt=lambda x0, alpha_t: p.moved,
            )
            return diffusion._loss(p.x0, None, torch.ones_like(p.x0)).loss

        return of

    return {"nelbo": (loss(DUO_BASE), loss(ours))}
