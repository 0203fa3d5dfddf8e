"""Duo: what the model's output is when, digits near alpha = 1, the step by frequency, labels."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from standins import duo as published
from standins import problem

from fastdiff.integrations import duo
from fastdiff.schedules import LogLinear

P = problem(3, 8, 7)
Z = torch.randn(3, 8, 7, generator=torch.Generator().manual_seed(1))


def noise(t):
    """As the codebase's, t -> (dalpha, alpha)."""
    return -torch.ones_like(t), LogLinear().alpha(t)


def diffusion(guid_weight=None, algo="duo_base", **attributes):
    config = SimpleNamespace(
        algo=SimpleNamespace(name=algo), sampling=SimpleNamespace(guid_weight=guid_weight, use_float64=True)
    )
    return published.given(
        published.DUO_BASE, 7, **(dict(config=config, noise=noise, backbone=published.Backbone(Z)) | attributes)
    )


@pytest.fixture
def swap(applied):
    return lambda: applied(published, duo.apply_to_duo)


@pytest.mark.parametrize("xt", [P.x0, P.moved, (P.x0 + 1) % 7], ids=["none moved", "some", "all"])
def test_loss_through_the_model(xt, swap):
    attention = torch.ones(3, 8).index_fill(1, torch.tensor([6, 7]), 0)

    def loss():
        it = diffusion(_sample_t=lambda n, step: P.t.float(), q_xt=lambda x0, alpha_t: xt)
        return it._loss(P.x0, None, attention).loss

    expected = loss()
    swap()
    torch.testing.assert_close(loss(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dalpha_t", [-1.0, torch.tensor([[-1.0], [-0.5], [-2.0]])])
def test_nll_of_log_probabilities_and_of_logits(dalpha_t, swap):
    it, alpha_t = diffusion(), torch.exp(-P.sigma)[:, None]
    expected = it.nll_per_token(Z.log_softmax(-1), P.moved, P.x0, alpha_t, dalpha_t)
    swap()
    for z in (Z, Z.log_softmax(-1)):
        nll = it.nll_per_token(z, P.moved, P.x0, alpha_t, dalpha_t)
        torch.testing.assert_close(nll, expected, check_dtype=False, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("algo", ["duo_base", "distillation"])
def test_the_loss_has_logits_and_all_others_log_probabilities(algo, swap):
    """In whatever mode the network is; distillation compares log-probabilities in its loss."""
    seen = []

    def nll_per_token(log_x_theta, *_, **__):
        seen.append(log_x_theta)
        return log_x_theta.sum(-1)

    swap()
    it = diffusion(algo=algo, _sample_t=lambda n, step: P.t, q_xt=lambda *_: P.moved, nll_per_token=nll_per_token)
    it._loss(P.x0, None, torch.ones(3, 8))
    assert torch.equal(seen[0], Z if algo == "duo_base" else Z.log_softmax(-1))
    assert torch.equal(it.forward(P.moved, P.sigma[:, None]), Z.log_softmax(-1))
    assert it.backbone.training


def test_little_noise_keeps_its_digits():
    z = torch.randn(1, 8, 50257, generator=torch.Generator().manual_seed(0)) * 3
    x0, alpha_t, it = torch.arange(8)[None], torch.tensor([[0.9999]]), published.given(published.DUO_BASE, 50257)
    exact = published.DUO_BASE.nll_per_token(it, z.double().log_softmax(-1), x0, x0, alpha_t.double(), -1.0)
    theirs = published.DUO_BASE.nll_per_token(it, z.log_softmax(-1), x0, x0, alpha_t, -1.0)
    ours = duo.DUO_BASE.nll_per_token(it, z, x0, x0, alpha_t, -1.0)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)
    assert ((theirs - exact) / exact).abs().max() > 1e-4


@pytest.mark.parametrize("noise_removal_step", [False, True])
def test_a_step_is_drawn_from_the_published_law(noise_removal_step, swap):
    n, x, dt = 20_000, torch.tensor([[0, 3, 6]]), None if noise_removal_step else 0.3
    backbone = mock.Mock(side_effect=lambda x, **_: Z[:1, :3].expand(len(x), 3, 7), training=False)
    it = diffusion(backbone=backbone)
    with mock.patch.object(published.PUBLISHED["trainer_base"], "sample_categorical", return_value=x) as drawn_from:
        it._ancestral_update(x, torch.full((1, 1), 0.6), None, dt, noise_removal_step=noise_removal_step)
    law = drawn_from.call_args[0][0][0]
    swap()
    torch.manual_seed(0)
    arguments = (x.expand(n, 3), torch.full((n, 1), 0.6), None, dt)
    cache, drawn = it._ancestral_update(*arguments, noise_removal_step=noise_removal_step)
    share = torch.nn.functional.one_hot(drawn, 7).double().mean(0)
    assert ((share - law).abs() <= 5 * (law * (1 - law) / n).sqrt() + 1e-9).all()
    torch.manual_seed(0)
    again = it._ancestral_update(*arguments, p_x0=cache, noise_removal_step=noise_removal_step)
    assert torch.equal(again[1], drawn)
    assert it.backbone.call_count == 2


@pytest.mark.parametrize(("guid_weight", "asked"), [(None, 9), (0.0, 9), (1.0, 4)])
def test_labels_are_those_that_guidance_means(guid_weight, asked):
    backbone = mock.Mock(return_value=Z, training=False)
    it = diffusion(guid_weight, backbone=backbone, class_conditional=True, num_classes=9)
    duo.DUO_BASE._ancestral_update(it, P.moved, torch.full((3, 1), 0.6), torch.full((3,), 4), 0.1)
    assert backbone.call_args[1]["class_cond"].tolist() == [asked] * 3


def test_what_is_not_here_is_an_error():
    for name, it in (("p_nucleus", diffusion(p_nucleus=0.9)), ("guid_weight", diffusion(2.0, class_conditional=True))):
        with pytest.raises(ValueError, match=f"{name}: expected"):
            duo.DUO_BASE._ancestral_update(it, P.moved, torch.full((3, 1), 0.6), None, 0.1)
    with pytest.raises(ValueError, match="sigma"):
        duo.DUO_BASE.nll_per_token(diffusion(), Z, P.moved, P.x0, torch.ones(3, 1), -1.0)
