"""MDLM: its times and weights, padding, the sampler's step by frequency, autocast, errors."""

from unittest import mock

import pytest
import torch
from standins import mdlm as published
from standins import problem

from fastdiff.integrations import mdlm
from fastdiff.schedules import Cosine, LogLinear

P = problem(3, 8, 11)
Z = torch.randn(3, 8, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def diffusion(**attributes):
    """A Diffusion of the codebase at the problem's noise, whose backbone gives Z."""
    settings = dict(
        backbone=lambda x, sigma: Z.clone(),
        noise=published.Noise(P, torch.float64),
        _sample_t=lambda n, device: P.t,
        q_xt=lambda x0, move_chance: P.xt,
    )
    return published.given(published.Diffusion, 11, **(settings | attributes))


@pytest.fixture
def swap(applied):
    return lambda: applied(published, mdlm.apply_to_mdlm)


def test_padding_weighs_nothing(swap):
    attention_mask = torch.ones(3, 8).index_fill(1, torch.tensor([6, 7]), 0)
    expected = published.loss_per_token(diffusion(), P.x0, attention_mask)
    swap()
    loss = published.loss_per_token(diffusion(), P.x0, attention_mask)
    torch.testing.assert_close(loss, expected)
    assert not torch.isclose(loss, published.loss_per_token(diffusion(), P.x0, torch.ones(3, 8)))


@pytest.mark.parametrize("options", [dict(change_of_variables=True), dict(parameterization="sedd"), {}])
def test_noise_and_conditioning_are_the_published_ones(options, swap):
    seen = []
    for _ in range(2):
        q_xt, backbone = mock.Mock(return_value=P.xt), mock.Mock(side_effect=lambda *_: Z.clone())
        with published.default_dtype(torch.float64):
            loss = diffusion(q_xt=q_xt, backbone=backbone, **options)._forward_pass_diffusion(P.x0)
        seen.append((loss, q_xt.call_args[0][1], backbone.call_args[0][1]))
        swap()
    torch.testing.assert_close(*seen, rtol=1e-9, atol=1e-12)


def test_without_time_conditioning_the_backbone_is_told_no_time():
    backbone = mock.Mock(side_effect=lambda *_: Z.clone())
    mdlm.Diffusion._forward_pass_diffusion(diffusion(backbone=backbone, time_conditioning=False), P.x0)
    assert torch.equal(backbone.call_args[0][1], torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("masked", [False, True])
def test_nothing_and_everything_masked(masked, swap):
    xt = torch.full_like(P.x0, 10) if masked else P.x0
    expected = diffusion(q_xt=lambda *_: xt)._forward_pass_diffusion(P.x0)
    swap()
    loss = diffusion(q_xt=lambda *_: xt)._forward_pass_diffusion(P.x0)
    torch.testing.assert_close(loss, expected)
    assert bool(loss.any()) == masked


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


def test_what_is_not_here_is_an_error():
    with pytest.raises(ValueError, match="parameterization: expected one of 'subs', 'sedd', got 'd3pm'"):
        mdlm.Diffusion._forward_pass_diffusion(diffusion(parameterization="d3pm"), P.x0)
    with pytest.raises(ValueError, match="T: expected 0"):
        mdlm.Diffusion._forward_pass_diffusion(diffusion(T=1000), P.x0)
    with pytest.raises(ValueError, match="parameterization"):
        mdlm.Diffusion._ddpm_caching_update(diffusion(parameterization="d3pm"), P.xt, P.t, 0.1)


@pytest.mark.parametrize("enabled", [False, True])
def test_autocast_on_the_cpu_stays_as_it_is(enabled):
    seen = []

    def backbone(x, sigma):
        seen.append(torch.is_autocast_enabled("cpu"))
        return Z

    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        mdlm.Diffusion._forward_pass_diffusion(diffusion(backbone=backbone), P.x0)
    assert seen == [enabled]
