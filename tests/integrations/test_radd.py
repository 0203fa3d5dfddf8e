"""RADD: signatures, noise, what the losses are on average, and which networks they take."""

from inspect import getfullargspec

import pytest
import torch
from standins import radd as published

from fastdiff.integrations import radd
from fastdiff.schedules import LogLinear

V, MASK = 12, 11
X0 = torch.arange(24).remainder(MASK).expand(4, 24)


def logits(xt):
    """Some numbers for each token, whatever is masked."""
    return torch.randn(*X0.shape, V, generator=torch.Generator().manual_seed(1)).repeat(len(xt) // len(X0), 1, 1)


class Model(torch.nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, xt):
        return self.answer(xt)


@pytest.mark.parametrize(
    "name", ["get_loss_fn", "Batch_Uniform_Sampler", "add_noise_t", "add_noise_lambda", "add_noise_k"]
)
def test_signatures_are_those_of_the_seam(name):
    assert getfullargspec(getattr(radd, name))[:4] == getfullargspec(getattr(published, name))[:4]


@pytest.mark.parametrize("type", ["naive", "vdm", "decoupled"])
def test_times_are_the_published_ones(type):
    theirs, ours = (torch.manual_seed(0) and m.Batch_Uniform_Sampler(7, type, "cpu") for m in (published, radd))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_noise_has_the_published_law():
    x0 = torch.zeros(3, 20_000, dtype=torch.int64)
    p = torch.tensor([0.0, 0.3, 1.0])
    for xt in (
        radd.add_noise_lambda(x0, p, MASK),
        radd.add_noise_t(x0, -torch.log1p(-p.clamp_max(0.999999))[:, None], MASK),
    ):
        torch.testing.assert_close((xt == MASK).double().mean(1), p.double(), rtol=0, atol=0.015)
    counts = torch.tensor([0, 7, 20_000])
    assert torch.equal((radd.add_noise_k(x0, counts, MASK) == MASK).sum(1), counts)


@pytest.mark.parametrize("loss_type", radd.LOSSES)
def test_every_loss_averages_to_the_likelihood(loss_type, monkeypatch):
    """Of a network that thinks the same at any noise; swapped in by the documented line."""
    monkeypatch.setattr(published, "get_loss_fn", radd.get_loss_fn)
    loss_fn = published.get_loss_fn(LogLinear(), V, True, loss_type=loss_type)
    torch.manual_seed(0)
    losses = loss_fn(Model(logits), X0.repeat(2000, 1)).view(2000, 4).double()
    z = logits(X0)
    nll = -(z[..., :-1].log_softmax(-1)).gather(-1, X0[..., None]).sum((1, 2)).double()
    # From sampling_eps on, and over weights 1 / t, the t losses miss 1e-3 of it.
    assert ((losses.mean(0) - nll).abs() <= 5 * losses.std(0) / 2000**0.5 + 2e-3 * nll).all()
    assert loss_fn(Model(logits), X0).dtype == (torch.float64 if loss_type == "lambda_DCE" else torch.float32)


def test_t_dce_is_t_dse():
    """Without the zero-mean log(e1) / e1 that the published one adds, on the same draws."""
    losses = []
    for loss_type in ("t_DSE", "t_DCE"):
        torch.manual_seed(0)
        losses.append(radd.get_loss_fn(LogLinear(), V, True, loss_type=loss_type)(Model(logits), X0))
    assert torch.equal(*losses)


@pytest.mark.parametrize("loss_type", radd.LOSSES)
def test_logits_do_as_well_as_log_probabilities(loss_type):
    losses = []
    for answer in (logits, lambda xt: published.log_probs(logits(xt))):
        torch.manual_seed(0)
        losses.append(radd.get_loss_fn(LogLinear(), V, True, loss_type=loss_type)(Model(answer), X0))
    torch.testing.assert_close(*losses)


def test_nothing_masked_is_no_loss(monkeypatch):
    monkeypatch.setattr(radd, "Batch_Uniform_Sampler", lambda B, type, device: torch.zeros(B))
    assert not radd.get_loss_fn(LogLinear(), V, True)(Model(logits), X0).any()


@pytest.mark.parametrize("train", [True, False])
def test_the_model_is_put_into_its_mode(train):
    model = Model(logits).train(not train)
    radd.get_loss_fn(LogLinear(), V, train)(model, X0)
    assert model.training == train


def test_other_losses_are_an_error():
    with pytest.raises(ValueError, match="loss_type"):
        radd.get_loss_fn(LogLinear(), V, True, loss_type="ar_forward")
