"""SEDD's seams: the score entropies of its graphs, the tail of its model, its noise and its predictors."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff.integrations import sedd
from standins import Case, LastLayer, Loss, Problem, published


def expm1_sigma(sigma: Tensor) -> Tensor:
    return torch.where(sigma < 0.5, torch.expm1(sigma), torch.exp(sigma) - 1)


class LogLinearNoise(nn.Module):
    """t -> (sigma, dsigma)."""

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.log1p(-(1 - 1e-3) * t), (1 - 1e-3) / (1 - (1 - 1e-3) * t)


class GeometricNoise(nn.Module):
    def __init__(self, sigma_min: float, sigma_max: float) -> None:
        super().__init__()
        self.ends = sigma_min, sigma_max

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        low, high = self.ends
        sigma = low ** (1 - t) * high**t
        return sigma, sigma * math.log(high / low)


class SEDD(nn.Module):
    """The model's last layer and its tail: log scores, 0 at the tokens themselves."""

    def forward(self, indices: Tensor, sigma: Tensor) -> Tensor:
        x = self.output_layer(self.vocab_embed(indices), self.sigma_map(sigma))
        if self.scale_by_sigma:
            x = x - expm1_sigma(sigma).log().to(x.dtype)[:, None, None] - math.log(x.shape[-1] - 1)
        return torch.scatter(x, -1, indices[..., None], torch.zeros_like(x[..., :1]))


def sample_categorical(probs: Tensor) -> Tensor:
    """Of weights that need not be normalised, by noise over all of them."""
    return (probs / (1e-10 - (torch.rand_like(probs) + 1e-10).log())).argmax(-1)


class Graph:
    absorb: bool
    dim: int

    def reverse_rate(self, i: Tensor, score: Tensor) -> Tensor:
        rate = self.transp_rate(i) * score
        rate.scatter_(-1, i[..., None], torch.zeros_like(rate))
        return rate.scatter_(-1, i[..., None], -rate.sum(-1, keepdim=True))

    def sample_rate(self, i: Tensor, rate: Tensor) -> Tensor:
        return sample_categorical(F.one_hot(i, self.dim).to(rate) + rate)


class Uniform(Graph):
    absorb = False

    def __init__(self, dim: int) -> None:
        self.dim = dim

    def sample_transition(self, i: Tensor, sigma: Tensor) -> Tensor:
        move = torch.rand(i.shape, device=i.device) < 1 - (-sigma).exp()
        return torch.where(move, torch.randint_like(i, self.dim), i)

    def transp_rate(self, i: Tensor) -> Tensor:
        return torch.full((*i.shape, self.dim), 1 / self.dim).scatter(-1, i[..., None], 1 / self.dim - 1)

    def transp_transition(self, i: Tensor, sigma: Tensor) -> Tensor:
        moved = (1 - (-sigma).exp())[..., None] / self.dim
        probs = (torch.ones(*i.shape, self.dim) * moved).scatter(-1, i[..., None], 0)
        return probs.scatter(-1, i[..., None], 1 - probs.sum(-1, keepdim=True))

    def staggered_score(self, score: Tensor, dsigma: Tensor) -> Tensor:
        decay = (-dsigma).exp()[..., None]
        return (decay - 1) / (self.dim * decay) * score.sum(-1, keepdim=True) + score / decay

    def score_entropy(self, score: Tensor, sigma: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        n, e1, same = self.dim, expm1_sigma(sigma), x == x0
        ratio = 1 - n / (e1 + n)
        at_x, at_x0 = (score.gather(-1, i[..., None]).squeeze(-1) for i in (x, x0))
        negative = score.mean(-1) - at_x / n
        negative = torch.where(same, ratio * negative, at_x0 / e1 + negative)
        still = (n - 1) / n * ratio * (ratio.log() - 1)
        constant = torch.where(same, still, ((-ratio.log() - 1) / ratio - (n - 2)) / n)
        score = score.exp()
        positive = score.mean(-1) - score.gather(-1, x[..., None]).squeeze(-1) / n
        return positive - negative + constant


class Absorbing(Graph):
    absorb = True

    def __init__(self, dim: int) -> None:
        self.dim = dim + 1  # given the tokens without the mask

    def sample_transition(self, i: Tensor, sigma: Tensor) -> Tensor:
        move = torch.rand(i.shape, device=i.device) < 1 - (-sigma).exp()
        return torch.where(move, self.dim - 1, i)

    def transp_rate(self, i: Tensor) -> Tensor:
        return (i == self.dim - 1)[..., None].long() - F.one_hot(i, self.dim)

    def transp_transition(self, i: Tensor, sigma: Tensor) -> Tensor:
        came = torch.where(i == self.dim - 1, 1 - (-sigma).exp(), 0)
        return (-sigma).exp()[..., None] * F.one_hot(i, self.dim) + came[..., None]

    def staggered_score(self, score: Tensor, dsigma: Tensor) -> Tensor:
        extra = (1 - dsigma.exp()) * score.sum(-1)
        score = score * dsigma.exp()[:, None]
        score[..., -1] += extra
        return score

    def score_entropy(self, score: Tensor, sigma: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        masked = x == self.dim - 1
        ratio = 1 / expm1_sigma(sigma).expand_as(x)[masked]
        negative = ratio * score[masked].gather(-1, x0[masked][:, None]).squeeze(-1)
        positive = score[masked][:, :-1].exp().sum(-1)
        entropy = torch.zeros(x.shape, device=x.device)
        entropy[masked] += positive - negative + ratio * (ratio.log() - 1)
        return entropy


class Predictor:
    def __init__(self, graph: Graph, noise: Callable) -> None:
        self.graph, self.noise = graph, noise


class AnalyticPredictor(Predictor):
    def update_fn(self, score_fn: Callable, x: Tensor, t: Tensor, step_size: float) -> Tensor:
        sigma = self.noise(t)[0]
        dsigma = sigma - self.noise(t - step_size)[0]
        score = self.graph.staggered_score(score_fn(x, sigma), dsigma)
        return sample_categorical(score * self.graph.transp_transition(x, dsigma))


class EulerPredictor(Predictor):
    def update_fn(self, score_fn: Callable, x: Tensor, t: Tensor, step_size: float) -> Tensor:
        sigma, dsigma = self.noise(t)
        rate = self.graph.reverse_rate(x, score_fn(x, sigma))
        return self.graph.sample_rate(x, step_size * dsigma[..., None] * rate)


class Denoiser(Predictor):
    def update_fn(self, score_fn: Callable, x: Tensor, t: Tensor) -> Tensor:
        sigma = self.noise(t)[0]
        score = self.graph.staggered_score(score_fn(x, sigma), sigma)
        probs = score * self.graph.transp_transition(x, sigma)
        return sample_categorical(probs[..., :-1] if self.graph.absorb else probs)


def get_loss_fn(
    noise: Callable, graph: Graph, train: bool, sampling_eps: float = 1e-3, lv: bool = False
) -> Callable[..., Tensor]:
    """The loss of each sequence, [B]."""

    def loss_fn(
        model: nn.Module,
        batch: Tensor,
        cond: None = None,
        t: Tensor | None = None,
        perturbed_batch: Tensor | None = None,
    ) -> Tensor:
        if t is None:
            t = (1 - sampling_eps) * torch.rand(len(batch), device=batch.device) + sampling_eps
        sigma, dsigma = noise(t)
        if perturbed_batch is None:
            perturbed_batch = graph.sample_transition(batch, sigma[:, None])
        model.train(train)
        loss = graph.score_entropy(model(perturbed_batch, sigma), sigma[:, None], perturbed_batch, batch)
        return (dsigma[:, None] * loss).sum(-1)

    return loss_fn


PUBLISHED = published("sedd", "graph_lib", "losses", "model", "noise_lib", "sampling")
SEDD = PUBLISHED["model"].SEDD
Absorbing, Uniform = PUBLISHED["graph_lib"].Absorbing, PUBLISHED["graph_lib"].Uniform
AnalyticPredictor, Denoiser = PUBLISHED["sampling"].AnalyticPredictor, PUBLISHED["sampling"].Denoiser
GeometricNoise, LogLinearNoise = PUBLISHED["noise_lib"].GeometricNoise, PUBLISHED["noise_lib"].LogLinearNoise
EulerPredictor, get_loss_fn = PUBLISHED["sampling"].EulerPredictor, PUBLISHED["losses"].get_loss_fn


def network(inner: nn.Module, scaled: bool = False) -> nn.Module:
    """The codebase's model, whose last layer is a network's, which may be wrapped."""
    made = SEDD.__new__(SEDD)
    nn.Module.__init__(made)
    made.vocab_embed, made.sigma_map, made.rotary_emb, made.blocks = (
        lambda x: x,
        lambda sigma: sigma,
        lambda x: None,
        [],
    )
    made.output_layer, made.absorb, made.scale_by_sigma = LastLayer(inner), True, scaled
    return made


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """The codebase collects losses in zeros of the default type, which would round float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.promote_types(dtype, torch.float32))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def cases(p: Problem) -> dict[str, Case]:
    """The loss of each graph from log scores, and of the absorbing one from what the model scales to them."""
    absorb, uniform, model_of = Absorbing(p.num_states - 1), Uniform(p.num_states), cache(network)

    def noise(t: Tensor) -> tuple[Tensor, Tensor]:
        return p.sigma.to(torch.get_default_dtype()), p.dsigma.to(torch.get_default_dtype())

    def loss(get_loss_fn: Callable, forward: Callable, graph: Graph, xt: Tensor, scaled: bool) -> Loss:
        def of(inner: nn.Module) -> Tensor:
            dtype = next(inner.parameters()).dtype
            with default_dtype(dtype), mock.patch.object(SEDD, "forward", forward):
                loss_fn = get_loss_fn(noise, graph, True)
                return loss_fn(model_of(inner, scaled), p.x0, t=p.t, perturbed_batch=xt).mean()

        return of

    settings = {
        "absorb": (absorb, p.xt, False),
        "absorb_scaled": (absorb, p.xt, True),
        "uniform": (uniform, p.moved, False),
    }
    theirs, ours = (get_loss_fn, SEDD.forward), (sedd.get_loss_fn, sedd.SEDD.forward)
    return {name: (loss(*theirs, *case), loss(*ours, *case)) for name, case in settings.items()}
