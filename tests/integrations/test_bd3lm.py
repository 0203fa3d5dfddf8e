"""BD3-LM: clipped schedules, noise of each token, the sampler's step by frequency and by calls of the backbone."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from standins import bd3lm as published
from standins import problem
from standins.sedd import default_dtype

from fastdiff.integrations import bd3lm

P = problem(3, 8, 11)
Z = torch.randn(3, 8, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TIMES = torch.rand(3, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64).clamp_min(0.05)


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


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {}),
        ({}, dict(t=TIMES.flip(0))),
        ({}, dict(sampling_eps_min=0.6, sampling_eps_max=torch.tensor(1.0))),
        ({}, dict(sampling_eps_min=torch.tensor(0.3), sampling_eps_max=0.8)),
        (dict(ignore_bos=False, cross_attn=False, time_conditioning=False), {}),
        (dict(mdlm_loss_scale=True), {}),
        (dict(parameterization="sedd", cross_attn=False), {}),
        (dict(parameterization="sedd", cross_attn=False, mdlm_loss_scale=True), dict(t=TIMES[:, :1])),
        (dict(parameterization="sedd", cross_attn=False, mdlm_loss_scale=True), {}),
    ],
)
def test_loss_and_calls_are_the_published_ones(options, arguments, swap):
    """The loss, and what is asked of the noise and of the backbone."""
    seen = []
    for _ in range(2):
        q_xt, backbone = (
            mock.Mock(side_effect=lambda *_, **__: P.xt.clone()),
            mock.Mock(side_effect=lambda *_, **__: Z.clone()),
        )
        with default_dtype(torch.float64):
            it = diffusion(q_xt=q_xt, backbone=backbone, **options)
            loss = it._forward_pass_diffusion(P.x0, **arguments)
        assert q_xt.call_args[1] == dict(sampling_eps_min=None, sampling_eps_max=None) | {
            name: value for name, value in arguments.items() if name != "t"
        }
        seen.append((loss, q_xt.call_args[0][1], *backbone.call_args[0]))
        swap()
    torch.testing.assert_close(*seen, rtol=1e-9, atol=1e-12)


def test_the_first_token_is_never_scored():
    q_xt = mock.Mock(return_value=torch.full_like(P.x0, 10))
    loss = bd3lm.Diffusion._forward_pass_diffusion(diffusion(q_xt=q_xt), P.x0)
    assert not loss[:, 0].any()
    assert (loss[:, 1:] > 0).all()


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


def test_other_parameterizations_are_an_error():
    for method, arguments in (
        ("_forward_pass_diffusion", (P.x0,)),
        ("_ddpm_caching_update", (P.xt, TIMES[:, :1], 0.1)),
    ):
        with pytest.raises(ValueError, match="parameterization"):
            getattr(bd3lm.Diffusion, method)(diffusion(parameterization="ar"), *arguments)
