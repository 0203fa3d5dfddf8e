"""BD3-LM: a training step, clipped schedules, noise of each token, the sampler's step by frequency and by calls."""

from types import SimpleNamespace
from unittest import mock

import pytest
import standins
import torch
from backbones import random_numbers, tiny_dit
from standins import Network, is_real, problem
from standins import bd3lm as published
from standins.sedd import default_dtype
from step import NoLogits, assert_same_step, loss_and_grads

from fastdiff.integrations import bd3lm

P = problem(3, 8, 11)
Z = torch.randn(3, 8, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TIMES = torch.rand(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64).clamp_min(0.05)
REAL = is_real(published.PUBLISHED["diffusion"])


class Backbone(published.Backbone):
    """Over hidden states of a few dimensions; keeps what it was asked."""

    def __init__(self, cross_attn=True):
        torch.manual_seed(0)
        super().__init__(Network(P, 5, bias=True, dtype=torch.float64), cross_attn)

    def forward(self, x, sigma, **flags):
        self.asked = x, sigma
        return super().forward(x, sigma, **flags)


def step(it, backbone, **arguments):
    return loss_and_grads(lambda: it._loss(P.x0, attention(), **arguments).loss, backbone)


def attention():
    """New for each step, which may write to it."""
    return torch.ones(3, 8).index_fill(1, torch.tensor([6, 7]), 0)


def diffusion(sampling=None, **attributes):
    """A Diffusion of the codebase whose noise is the problem's and whose backbone gives Z."""
    settings = dict(
        backbone=lambda x, sigma, **flags: Z.clone(),
        _sample_t=lambda *_, **__: TIMES,
        q_xt=lambda x0, move_chance, **clip: P.xt.clone(),
    )
    algo, sampling = (
        SimpleNamespace(name="bd3lm"),
        dict(kv_cache=False, first_hitting=False, nucleus_p=1.0) | (sampling or {}),
    )
    config = SimpleNamespace(algo=algo, model=SimpleNamespace(length=8), sampling=SimpleNamespace(**sampling))
    return published.given(published.Diffusion, 11, config=config, **(settings | attributes))


@pytest.fixture
def swap(applied):
    return lambda: applied(published, bd3lm.apply_to_bd3lm)


@pytest.fixture(autouse=True)
def _in_float64():
    """SEDD's losses are collected in the default type."""
    with default_dtype(torch.float64):
        yield


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {}),
        (dict(t=TIMES.flip(0)), {}),
        (dict(sampling_eps_min=torch.tensor(0.6), sampling_eps_max=torch.tensor(1.0)), {}),
        (
            dict(sampling_eps_min=torch.tensor(0.6), sampling_eps_max=1.0),
            dict(sampling_eps_min=1e-3, sampling_eps_max=1),
        ),
        (dict(sampling_eps_min=0.3, sampling_eps_max=0.8), {}),
        (dict(ignore_bos=False, cross_attn=False, time_conditioning=False), {}),
        (dict(mdlm_loss_scale=True), {}),
        (dict(parameterization="sedd"), {}),
        (dict(parameterization="sedd", cross_attn=False), {}),
        (dict(parameterization="sedd", cross_attn=False, mdlm_loss_scale=True, t=TIMES[:, :1]), {}),
        (dict(parameterization="sedd", cross_attn=False, mdlm_loss_scale=True), {}),
    ],
)
def test_a_training_step_is_the_published_one(options, arguments, training, swap):
    """Loss, gradients, the numbers of each token, and what is asked of the noise and of the backbone."""
    seen, t = [], options.get("t", TIMES)
    for _ in range(2):
        q_xt, backbone = mock.Mock(side_effect=lambda *_, **__: P.xt.clone()), Backbone(options.get("cross_attn", True))
        it = diffusion(q_xt=q_xt, backbone=backbone, training=training, _sample_t=lambda *_, **__: t, **options)
        tokens = it._loss(P.x0, attention(), **arguments)
        clip = [torch.as_tensor(number) for number in q_xt.call_args[1].values()]
        seen.append(
            [
                *step(it, backbone, **arguments),
                tokens.nlls,
                tokens.token_mask,
                q_xt.call_args[0][1],
                *clip,
                *backbone.asked,
            ]
        )
        swap()
    assert_same_step(*reversed(seen))


@pytest.mark.parametrize(
    "options", [{}, dict(mdlm_loss_scale=True), dict(parameterization="sedd", cross_attn=False), dict(cross_attn=False)]
)
def test_a_step_makes_no_logits(options, swap):
    swap()
    backbone = Backbone(options.get("cross_attn", True))
    it = diffusion(backbone=backbone, **options)
    if options.get("parameterization") == "sedd":
        it._sample_t = lambda *_, **__: TIMES[:, :1].expand(3, 8)
    with NoLogits(3, 8, 11):
        step(it, backbone)


def backbone_of(code, cross_attn, hub, monkeypatch):
    """A DIT, or the hub's model of one."""
    backbone = tiny_dit(code.models.dit, monkeypatch, 211, cross_attn=cross_attn)
    if not hub:
        return backbone
    modeling = standins.published("bd3lm", "models.hf.modeling_bd3lm")["models.hf.modeling_bd3lm"]
    sizes = dict(block_size=4, vocab_size=211, model_length=8, hidden_dim=16, cond_dim=6, n_blocks=2, n_heads=2)
    config = modeling.BD3LMConfig(
        **sizes, cross_attn=cross_attn, attn_backend="sdpa", time_conditioning=True, return_dict=False
    )
    return random_numbers(modeling.BD3LM(config))


@pytest.mark.parametrize("hub", [False, True], ids=["DIT", "hub"])
@pytest.mark.parametrize(
    "options",
    [{}, dict(time_conditioning=False), dict(parameterization="sedd", cross_attn=False), dict(cross_attn=False)],
)
def test_a_step_of_the_real_backbone(options, hub, swap, monkeypatch):
    """With its own noise, attention over [xt, x0], dropout and adaLN, in float64."""
    if not REAL:
        pytest.skip("the backbone is that of a checkout: FASTDIFF_CHECKOUTS")
    code = published.PUBLISHED["diffusion"]
    backbone, seen = backbone_of(code, options.get("cross_attn", True), hub, monkeypatch), []
    x0 = torch.randint(210, (32, 8))
    for _ in range(2):
        it = code.Diffusion.__new__(code.Diffusion)
        code.L.LightningModule.__init__(it)
        config = SimpleNamespace(**vars(published.SETTINGS["config"]), training=SimpleNamespace(resample=False))
        it.__dict__.update(published.mdlm.SETTINGS | published.SETTINGS | dict(config=config, num_tokens=8) | options)
        it.__dict__.update(mask_index=210, vocab_size=211, antithetic_sampling=True, log=mock.Mock())
        it.__dict__.update(noise=code.noise_schedule.LogLinearNoise(), metrics=mock.Mock())
        it.backbone = backbone
        torch.manual_seed(1)
        batch = {"input_ids": x0, "attention_mask": attention()[:1].repeat(32, 1)}
        step = loss_and_grads(it.training_step, backbone, batch, 0)
        seen.append([*step, *it.metrics.train_nlls.update.call_args[0]])
        swap()
    assert any(grad.any() for name, grad in seen[0][1].items() if "adaLN" in name)
    assert_same_step(*reversed(seen))
    with NoLogits(32, 8, 211):
        loss_and_grads(it.training_step, backbone, batch, 0)


def test_a_backbone_is_left_as_it_was(swap):
    """Which is asked once about a few tokens without x0, and then about [xt, x0]."""
    swap()
    backbone = Backbone()
    mask, lengths = backbone.block_diff_mask, []
    backbone.network.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    for _ in range(2):
        diffusion(backbone=backbone)._loss(P.x0, attention())
    assert lengths == [4, 16, 16]
    assert backbone.block_diff_mask is mask


def test_the_first_token_is_never_scored(swap):
    swap()
    q_xt = mock.Mock(return_value=torch.full_like(P.x0, 10))
    nlls = diffusion(q_xt=q_xt, backbone=Backbone())._loss(P.x0, torch.ones(3, 8)).nlls
    assert not nlls[:, 0].any()
    assert (nlls[:, 1:] > 0).all()


def test_the_autoregressive_loss_is_the_published_one(swap):
    it = diffusion(parameterization="ar", forward=lambda x, sigma: Z[:, : x.shape[1]].log_softmax(-1), ignore_bos=False)
    expected = it._loss(P.x0, attention())
    swap()
    losses = it._loss(P.x0, attention())
    assert losses.nlls.shape == (3, 7)
    assert_same_step(vars(losses), vars(expected))


def test_a_step_is_drawn_from_the_published_law(swap):
    n = 20_000
    x = torch.tensor([1, 2, 3, 4, 10, 2, 10, 10]).expand(n, 8)
    it = diffusion(backbone=lambda x, sigma, **flags: Z[:1].expand(len(x), 8, 11))
    with mock.patch.object(
        published.PUBLISHED["diffusion"], "_sample_categorical", return_value=x[:1, 4:]
    ) as drawn_from:
        it._ddpm_caching_update(x[:1], torch.full((1, 1), 0.5), 0.2)
    law = drawn_from.call_args[0][0][0]
    law[1] = torch.eye(11)[2]  # not masked
    swap()
    torch.manual_seed(0)
    _, drawn = it._ddpm_caching_update(x, torch.full((n, 1), 0.5), 0.2)
    share = torch.nn.functional.one_hot(drawn[:, 4:], 11).double().mean(0)
    assert ((share - law).abs() <= 5 * (law * (1 - law) / n).sqrt() + 1e-9).all()
    assert torch.equal(drawn[:, :4], x[:, :4])


def test_at_time_0_tokens_are_drawn_by_their_probabilities():
    """Where the published step divides by 0 and token 0 takes every mask."""
    x = torch.cat((P.x0[:, :4], torch.full((3, 4), 10)), 1).repeat(200, 1)
    it = diffusion(backbone=lambda x, sigma, **flags: Z.repeat(200, 1, 1))
    theirs, ours = (m.Diffusion._ddpm_caching_update(it, x, torch.zeros(600, 1), 0.1)[1] for m in (published, bd3lm))
    assert not theirs[:, 4:].any()
    assert set(ours[:, 4:].unique().tolist()) == set(range(10))


def test_first_hitting_reveals_one_mask_of_each_sequence():
    x = torch.tensor([1, 2, 3, 4, 10, 2, 10, 10]).repeat(9_000, 1)
    it = diffusion(sampling=dict(first_hitting=True), backbone=lambda x, sigma, **flags: Z[:1].expand(len(x), 8, 11))
    _, drawn = bd3lm.Diffusion._ddpm_caching_update(it, x, torch.full((9_000, 1), 0.5), 0.1)
    changed = drawn != x
    assert (changed.sum(1) == 1).all()
    torch.testing.assert_close(
        changed.double().mean(0)[4:], torch.tensor([1, 0, 1, 1]) / 3, atol=0.03, rtol=0, check_dtype=False
    )
    token = drawn[changed[:, 4], 4]
    torch.testing.assert_close(
        (token == Z[0, 4, :10].argmax()).double().mean(), Z[0, 4, :10].softmax(0).max(), atol=0.05, rtol=0
    )


def test_nucleus_keeps_the_token_that_reaches_p():
    logits = torch.tensor([0.6, 0.3, 0.1]).log().repeat(500, 8, 1)
    logits = torch.nn.functional.pad(logits, (0, 8), value=-50.0)
    it = diffusion(sampling=dict(nucleus_p=0.7), backbone=lambda x, sigma, **flags: logits)
    _, drawn = bd3lm.Diffusion._ddpm_caching_update(it, torch.full((500, 8), 10), torch.full((500, 1), 0.1), 0.1)
    assert set(drawn[:, 4:].unique().tolist()) == {0, 1}


def test_cache_of_logits_and_of_keys():
    backbone = mock.Mock(side_effect=lambda x, sigma, **flags: Z[:, : x.shape[1]])
    it = diffusion(sampling=dict(kv_cache=True), backbone=backbone)
    x = torch.cat((P.x0[:, :4], torch.full((3, 4), 10)), 1)
    cache, same = bd3lm.Diffusion._ddpm_caching_update(it, x, torch.full((3, 1), 0.5), 0.0)
    assert torch.equal(same, x)
    assert torch.equal(cache, Z[:, :4])
    assert torch.equal(backbone.call_args[0][0], x[:, 4:])
    assert backbone.call_args[1] == dict(sample_mode=True, store_kv=False)
    cache, full = bd3lm.Diffusion._ddpm_caching_update(it, x, torch.full((3, 1), 0.5), 0.5, p_x0=cache)
    assert cache is None
    assert backbone.call_count == 2
    assert torch.equal(backbone.call_args[0][0], full[:, 4:])
    assert backbone.call_args[1] == dict(sample_mode=True, store_kv=True)


def test_other_parameterizations_are_an_error(swap):
    swap()
    it = diffusion(parameterization="d3pm")
    for call in (lambda: it._loss(P.x0, attention()), lambda: it._ddpm_caching_update(P.xt, TIMES[:, :1], 0.1)):
        with pytest.raises(ValueError, match="parameterization"):
            call()
