"""Duo: signatures, swapping, what the model's output is when, digits near alpha = 1, the step by frequency, labels."""

from inspect import getfullargspec
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
METHODS = ["_process_model_output", "nll_per_token", "_ancestral_update"]


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
def swap(monkeypatch):
    return lambda *names: [monkeypatch.setattr(published.DUO_BASE, name, getattr(duo.DUO_BASE, name)) for name in names]


@pytest.mark.parametrize("name", METHODS)
def test_signatures_are_those_of_the_seam(name):
    assert getfullargspec(getattr(duo.DUO_BASE, name))[:4] == getfullargspec(getattr(published.DUO_BASE, name))[:4]


@pytest.mark.parametrize("swapped", [METHODS[1:2], METHODS[:2]])
@pytest.mark.parametrize("dalpha_t", [-1.0, torch.tensor([[-1.0], [-0.5], [-2.0]])])
@pytest.mark.parametrize("xt", [P.x0, P.moved, (P.x0 + 1) % 7], ids=["none moved", "some", "all"])
def test_nll_through_the_model(swapped, dalpha_t, xt, swap):
    """From log-probabilities, and from logits."""
    it, alpha_t = diffusion(), torch.exp(-P.sigma)[:, None]

    def nll():
        return it.nll_per_token(it.forward(xt, it._sigma_from_alphat(alpha_t)), xt, P.x0, alpha_t, dalpha_t)

    expected = nll()
    swap(*swapped)
    torch.testing.assert_close(nll(), expected, check_dtype=False, rtol=1e-5, atol=1e-5)


def test_log_probabilities_are_kept_for_those_who_need_them():
    """Sampling, and distillation, which compares them; training has logits and not a copy."""
    process = duo.DUO_BASE._process_model_output
    assert process(diffusion(), Z, P.moved, P.sigma) is Z
    sampling = diffusion(backbone=SimpleNamespace(training=False))
    for it in (sampling, diffusion(algo="distillation")):
        assert torch.equal(process(it, Z, P.moved, P.sigma), Z.log_softmax(-1))


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
    with mock.patch.object(published, "sample_categorical", return_value=x) as drawn_from:
        it._ancestral_update(x, torch.full((1, 1), 0.6), None, dt, noise_removal_step=noise_removal_step)
    law = drawn_from.call_args[0][0][0]
    swap("_ancestral_update")
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
