"""MDLM: a training step, its times and weights, padding, backbones, the sampler's step by frequency, errors."""

from unittest import mock

import pytest
import torch
from backbones import tiny_dit
from standins import Network, is_real, problem
from standins import mdlm as published
from step import NoLogits, assert_same_step, loss_and_grads
from torch import nn

from fastdiff.integrations import mdlm
from fastdiff.schedules import Cosine, LogLinear

P = problem(3, 8, 11)
Z = torch.randn(3, 8, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
REAL = is_real(published.PUBLISHED["diffusion"])
ATTENTION = torch.tensor([1, 1, 1, 1, 1, 0.5, 0, 0]).repeat(3, 1)  # one of them weighs half
BATCH = {"input_ids": P.x0, "attention_mask": ATTENTION}


class Backbone(published.Backbone):
    """Over hidden states of a few dimensions; keeps what it was asked."""

    def __init__(self, dtype=torch.float64):
        torch.manual_seed(0)
        super().__init__(Network(P, 5, bias=True, dtype=dtype))

    def forward(self, x, sigma):
        self.asked, self.autocast = (x, sigma), torch.is_autocast_enabled("cpu")
        return super().forward(x, sigma)


class Mean:
    """What torchmetrics computes of values and weights."""

    def __init__(self):
        self.value = self.weight = 0

    def update(self, values, weights):
        self.value, self.weight = self.value + (values * weights).sum().item(), self.weight + weights.sum().item()


def diffusion(**attributes):
    """A Diffusion of the codebase at the problem's noise, whose backbone gives Z to samplers."""
    settings = dict(
        backbone=lambda x, sigma: Z.clone(),
        noise=published.Noise(P, torch.float64),
        _sample_t=lambda n, device: P.t,
        q_xt=lambda x0, move_chance: P.xt,
        train_metrics=Mean(),
        valid_metrics=Mean(),
        log_dict=mock.Mock(),
    )
    return published.given(published.Diffusion, 11, **(settings | attributes))


@pytest.fixture
def swap(applied):
    return lambda: applied(published, mdlm.apply_to_mdlm)


@pytest.fixture(autouse=True)
def _in_float64():
    """SEDD's losses are collected in the default type."""
    with published.default_dtype(torch.float64):
        yield


OPTIONS = [
    {},
    dict(importance_sampling=True),
    dict(change_of_variables=True),
    dict(time_conditioning=False),
    dict(parameterization="sedd"),
    dict(T=1000),
    dict(T=1000, change_of_variables=True),
    dict(T=1000, parameterization="d3pm", subs_masking=True),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_training_step_is_the_published_one_without_logits(options, swap):
    """Loss, gradients, metrics, and what is asked of the noise and of the backbone."""
    seen = []
    for _ in range(2):
        backbone, q_xt = Backbone(), mock.Mock(return_value=P.xt)
        it = diffusion(backbone=backbone, q_xt=q_xt, **options)
        with torch.inference_mode():  # Lightning validates before it trains
            valid = it._compute_loss(BATCH, "val")
        step = loss_and_grads(it._compute_loss, backbone, BATCH, "train")
        metrics = [torch.tensor([m.value, m.weight]) for m in (it.train_metrics, it.valid_metrics)]
        seen.append([*step, valid, *metrics, it._loss(P.x0, ATTENTION).nlls, q_xt.call_args[0][1], *backbone.asked])
        swap()
    assert_same_step(*reversed(seen))
    with NoLogits(3, 8, 11):
        loss_and_grads(it._compute_loss, backbone, BATCH, "train")


@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_of_the_real_backbone(options, swap, monkeypatch):
    """With its own noise, dropout, adaLN and metrics, in float64."""
    if not REAL:
        pytest.skip("the backbone is that of a checkout: FASTDIFF_CHECKOUTS")
    code = published.PUBLISHED["diffusion"]
    backbone, seen = tiny_dit(code.models.dit, monkeypatch, num_states=211), []
    batch = {"input_ids": torch.randint(210, (32, 8)), "attention_mask": ATTENTION[:1].repeat(32, 1)}
    for _ in range(2):
        metrics = code.torchmetrics.MetricCollection({"nll": code.NLL(), "ppl": code.Perplexity()})
        noise = code.noise_schedule.LogLinearNoise()
        it = code.Diffusion.__new__(code.Diffusion)
        code.L.LightningModule.__init__(it)
        it.__dict__.update(published.SETTINGS | dict(antithetic_sampling=True, sampling_eps=1e-3) | options)
        it.__dict__.update(mask_index=210, vocab_size=211, log_dict=mock.Mock(), log=mock.Mock())
        it.backbone, it.noise, it.train_metrics = backbone, noise, metrics.set_dtype(torch.float64)
        torch.manual_seed(1)
        step = loss_and_grads(it.training_step, backbone, batch, 0)
        seen.append([*step, *it.train_metrics.compute().values()])
        swap()
    assert all(grad.any() for grad in seen[0][1].values())
    assert_same_step(*reversed(seen))
    with NoLogits(32, 8, 211):
        loss_and_grads(it.training_step, backbone, batch, 0)


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_and_everything_masked(masked, swap):
    xt = torch.full_like(P.x0, 10) if masked else P.x0
    it = diffusion(backbone=Backbone(), q_xt=lambda *_: xt)
    expected = it._loss(P.x0, ATTENTION)
    swap()
    losses = it._loss(P.x0, ATTENTION)
    torch.testing.assert_close(losses.nlls, expected.nlls)
    torch.testing.assert_close(losses.loss, expected.loss)
    assert bool(losses.loss > 0) == masked


class Hub(nn.Module):
    """As a checkpoint of the hub has its DIT."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x, sigma):
        return self.backbone(x, sigma)


class DiMamba(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.model = backbone.network

    def forward(self, x, sigma):
        return self.model(x).logits


class Normalising(Hub):
    """As the autoregressive backbone, which gives log-probabilities."""

    def forward(self, x, sigma):
        return self.backbone(x, sigma).log_softmax(-1)


@pytest.mark.parametrize("around", [Hub, DiMamba, torch.compile], ids=["hub", "dimamba", "compiled"])
def test_other_backbones(around, swap):
    swap()
    backbone = Backbone()
    expected = diffusion(backbone=backbone)._loss(P.x0, ATTENTION)
    other = torch.compile(backbone, backend="eager") if around is torch.compile else around(backbone)
    with NoLogits(3, 8, 11):
        assert_same_step(vars(diffusion(backbone=other)._loss(P.x0, ATTENTION)), vars(expected))


def test_a_backbone_that_gives_no_plain_logits_is_refused(swap):
    swap()
    with pytest.raises(ValueError, match="logits: expected a model that scales, caps"):
        diffusion(backbone=Normalising(Backbone()))._loss(P.x0, ATTENTION)
    with pytest.raises(TypeError, match="layer: expected a last layer"):
        diffusion(backbone=nn.Linear(5, 11))._loss(P.x0, ATTENTION)


def test_the_autoregressive_loss_is_the_published_one(swap):
    backbone = Normalising(Backbone())
    it = diffusion(backbone=lambda x, sigma: backbone(x, sigma), parameterization="ar")
    expected = it._loss(P.x0, ATTENTION)
    swap()
    losses = it._loss(P.x0, ATTENTION)
    assert losses.nlls.shape == (3, 7)
    assert_same_step(vars(losses), vars(expected))


def test_d3pm_whose_loss_follows_the_mask_is_the_published_one(swap):
    backbone = Backbone()
    it = diffusion(backbone=backbone, parameterization="d3pm", T=1000)
    expected = loss_and_grads(it._compute_loss, backbone, BATCH, "train")
    swap()
    assert_same_step(loss_and_grads(it._compute_loss, backbone, BATCH, "train"), expected, rtol=0)


def test_the_first_of_the_steps_has_a_loss(swap):
    """Which is 0 / 0 in the published code."""
    options = dict(backbone=Backbone(), T=1000, _sample_t=lambda n, device: torch.full((n,), 1e-4, dtype=torch.float64))
    assert diffusion(**options)._loss(P.x0, ATTENTION).loss.isnan()
    swap()
    loss = diffusion(**options)._loss(P.x0, ATTENTION).loss
    one = diffusion(**options | dict(T=0, noise=lambda t: (-torch.log1p(-t), 1 / (1 - t))))
    one._sample_t = lambda n, device: torch.full((n,), 1 / 1000, dtype=torch.float64)
    torch.testing.assert_close(loss, one._loss(P.x0, ATTENTION).loss)  # weight 1 / t


def test_a_method_of_a_derived_class_that_the_loss_does_not_call_is_an_error(swap):
    class Own(published.Diffusion):
        def forward(self, x, sigma):
            return -super().forward(x, sigma)

    it = published.given(Own, 11, **vars(diffusion(backbone=Backbone())))
    it._loss(P.x0, ATTENTION)
    swap()
    with pytest.raises(TypeError, match=r"Own\.forward: expected the published one"):
        it._loss(P.x0, ATTENTION)


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_on_the_cpu_stays_as_it_is(enabled, swap):
    """And its 16-bit logits are found to be plain."""
    swap()
    backbone = Backbone(torch.float32)
    expected = diffusion(backbone=backbone)._loss(P.x0, ATTENTION).loss
    backbone = Backbone(torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        loss = diffusion(backbone=backbone)._loss(P.x0, ATTENTION).loss
    assert backbone.autocast == enabled
    torch.testing.assert_close(loss, expected, rtol=2**-7 if enabled else 0, atol=0)


def test_score_entropy_with_a_mask_amid_the_vocabulary():
    it = diffusion(parameterization="sedd")
    it.mask_index = 4
    x0 = P.x0 + (P.x0 >= 4)
    xt = torch.where(P.xt == 10, 4, x0)
    expected = published.Diffusion._score_entropy(it, Z, P.sigma[:, None], xt, x0)
    ours = mdlm.Diffusion._score_entropy(it, Z, P.sigma[:, None], xt, x0)
    torch.testing.assert_close(ours, expected, check_dtype=False)


def test_a_step_is_drawn_from_the_published_law(swap):
    n, t, dt = 20_000, 0.5, 0.2
    x = torch.tensor([10, 2, 10]).expand(n, 3)
    it = diffusion(noise=LogLinear(), backbone=lambda x, sigma: Z[0, :3].expand(len(x), 3, 11))
    time = torch.full((n, 1), t, dtype=torch.float64)
    with mock.patch.object(published.PUBLISHED["diffusion"], "_sample_categorical", return_value=x[:1]) as drawn_from:
        it._ddpm_caching_update(x[:1], time[:1], dt)
    weights = drawn_from.call_args[0][0][0]
    law = weights / weights.sum(-1, keepdim=True)
    law[1] = torch.eye(11)[2]  # not masked
    swap()
    torch.manual_seed(0)
    _, drawn = it._ddpm_caching_update(x, time, dt)
    share = torch.nn.functional.one_hot(drawn, 11).double().mean(0)
    assert ((share - law).abs() <= 5 * (law * (1 - law) / n).sqrt() + 1e-9).all()


def test_the_cache_saves_the_backbone():
    backbone = mock.Mock(side_effect=lambda *_: Z.clone())
    it = diffusion(noise=LogLinear(), backbone=backbone)
    x, t = torch.full((3, 8), 10), torch.full((3,), 0.5)
    cache, _ = mdlm.Diffusion._ddpm_caching_update(it, x, t, 0.1)
    torch.manual_seed(0)
    again = mdlm.Diffusion._ddpm_caching_update(it, x, t, 0.1, p_x0=cache)
    torch.manual_seed(0)
    assert torch.equal(again[1], mdlm.Diffusion._ddpm_caching_update(it, x, t, 0.1)[1])
    assert again[0] is cache
    assert backbone.call_count == 2


@pytest.mark.parametrize("noise", [LogLinear(), Cosine()])
@pytest.mark.parametrize("t", [0.1, 0.0])
def test_no_mask_is_left_at_time_0(t, noise):
    """Also in a step that starts there, as the last one of MDLM's semi-autoregressive sampler does."""
    it = diffusion(noise=noise)
    _, drawn = mdlm.Diffusion._ddpm_caching_update(it, torch.full((3, 8), 10), torch.full((3,), t), 0.1)
    assert not (drawn == 10).any()


def test_what_is_not_here_is_an_error(swap):
    swap()
    with pytest.raises(ValueError, match="parameterization: expected one of 'subs', 'd3pm', 'sedd', 'ar', got 'mean'"):
        diffusion(parameterization="mean")._loss(P.x0, ATTENTION)
    with pytest.raises(ValueError, match="parameterization"):
        mdlm.Diffusion._ddpm_caching_update(diffusion(parameterization="d3pm"), P.xt, P.t, 0.1)
