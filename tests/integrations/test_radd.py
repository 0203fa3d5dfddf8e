"""RADD: noise, what the losses are on average, which networks they take, and what these say to a sampler."""

from contextlib import nullcontext
from functools import partial

import one_step
import pytest
import torch
from repeated import Repeated
from standins import is_real
from standins import radd as published
from step import assert_same_step

from fastdiff.integrations import radd
from fastdiff.schedules import LogLinear

V, MASK = 12, 11
X0 = torch.arange(24).remainder(MASK).expand(4, 24)


@pytest.fixture
def model():
    return published.network(Repeated(24, V))


@pytest.mark.parametrize("type", ["naive", "vdm", "decoupled"])
def test_times_are_the_published_ones(type):
    samplers = (published.PUBLISHED["losses"].Batch_Uniform_Sampler, radd.Batch_Uniform_Sampler)
    theirs, ours = (torch.manual_seed(0) and sampler(7, type, "cpu") for sampler in samplers)
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
def test_every_loss_averages_to_the_likelihood(loss_type, model, applied):
    """Of a network that thinks the same at any noise."""
    applied(published, radd.apply_to_radd)
    loss_fn = published.PUBLISHED["losses"].get_loss_fn(LogLinear(), V, True, loss_type=loss_type)
    torch.manual_seed(0)
    losses = loss_fn(model, X0.repeat(2000, 1)).view(2000, 4).detach().double()
    z = model.logits(X0).detach()
    nll = -(z[..., :-1].log_softmax(-1)).gather(-1, X0[..., None]).sum((1, 2)).double()
    # From sampling_eps on, and over weights 1 / t, the t losses miss 1e-3 of it.
    assert ((losses.mean(0) - nll).abs() <= 5 * losses.std(0) / 2000**0.5 + 2e-3 * nll).all()
    assert loss_fn(model, X0).dtype == (torch.float64 if loss_type == "lambda_DCE" else torch.float32)


def test_t_dce_is_t_dse(model, applied):
    """Without the zero-mean log(e1) / e1 that the published one adds, on the same draws."""
    applied(published, radd.apply_to_radd)
    losses = []
    for loss_type in ("t_DSE", "t_DCE"):
        torch.manual_seed(0)
        losses.append(radd.get_loss_fn(LogLinear(), V, True, loss_type=loss_type)(model, X0))
    assert torch.equal(*losses)


def test_nothing_masked_is_no_loss(model, monkeypatch, applied):
    applied(published, radd.apply_to_radd)
    monkeypatch.setattr(radd, "Batch_Uniform_Sampler", lambda B, type, device: torch.zeros(B))
    assert not radd.get_loss_fn(LogLinear(), V, True)(model, X0).any()


@pytest.mark.parametrize("train", [True, False])
def test_the_model_is_put_into_its_mode(train, model, applied):
    applied(published, radd.apply_to_radd)
    model.train(not train)
    radd.get_loss_fn(LogLinear(), V, train)(model, X0)
    assert model.training == train


def test_other_losses_are_an_error():
    with pytest.raises(ValueError, match="loss_type"):
        radd.get_loss_fn(LogLinear(), V, True, loss_type="ar_forward")


@pytest.mark.parametrize("loss_type", radd.LOSSES)
def test_no_logits_are_made_and_who_samples_has_probabilities(loss_type, model, applied):
    expected, seen = model(X0), []  # in training mode, before and after
    applied(published, radd.apply_to_radd)
    model.register_forward_hook(lambda module, arguments, out: seen.append(out.shape))
    published.PUBLISHED["losses"].get_loss_fn(LogLinear(), V, True, loss_type=loss_type)(model, X0)
    assert seen[-1] != (*X0.shape, V)
    torch.testing.assert_close(model(X0), expected)


def test_a_tail_that_the_loss_does_not_know_is_an_error(model):
    """As the model has without the seam in the place of its forward."""
    with pytest.raises(ValueError, match="logits"):
        radd.get_loss_fn(LogLinear(), V, True)(model, X0)


@pytest.mark.skipif(not is_real(published.PUBLISHED["model"]), reason="RADD's sampler is in its checkout")
def test_its_direct_sampler_draws_from_the_probabilities(applied):
    applied(published, radd.apply_to_radd)
    inner, z = Repeated(24, V), torch.zeros(V).index_fill(0, torch.tensor([3]), 2.0)
    inner.lm_head.weight.data.zero_()
    inner.lm_head.bias.data.copy_(z)
    model = published.network(inner.half())  # as the sampler has it
    radd.get_loss_fn(LogLinear(), V, True)(model, X0)
    DiffusionSampler = published.PUBLISHED["sampling"].DiffusionSampler
    sampler = DiffusionSampler("tweedie", model, LogLinear(), (200, 24), V, "direct", device=torch.device("cpu"))
    torch.manual_seed(0)
    share = (sampler.sample(4) == 3).double().mean()
    torch.testing.assert_close(share, z[:-1].double().softmax(0)[3], rtol=0, atol=0.03)


@pytest.fixture
def transformer(monkeypatch):
    """The codebase's own, small and random, in float64 throughout."""
    monkeypatch.setattr(torch.Tensor, "float", lambda x: x)
    sizes = dict(hidden_size=32, length=24, n_blocks=2, n_heads=2, dropout=0, use_checkpoint=False, dtype="float32")
    return one_step.drawn(published.RADD(dict(tokens=MASK, model=sizes))).double()


@pytest.mark.skipif(not is_real(published.PUBLISHED["model"]), reason="RADD's transformer is in its checkout")
@pytest.mark.parametrize("wrap", [nullcontext, one_step.in_ddp], ids=["bare", "DDP"])
@pytest.mark.parametrize("loss_type", radd.LOSSES)
def test_a_step_of_its_transformer(loss_type, wrap, transformer, applied, monkeypatch):
    losses, most = published.PUBLISHED["losses"], torch.tensor([3, 9, 14, 20])[:, None]
    xt = torch.where(torch.arange(24) < most, MASK, X0)
    draws = dict.fromkeys(("add_noise_t", "add_noise_lambda", "add_noise_k"), lambda *_: xt)
    draws["Batch_Uniform_Sampler"] = lambda B, *_, **__: torch.linspace(0.1, 0.9, B).double()
    step_fn = partial(losses.get_step_fn, LogLinear(), V, accum=1, loss_type=loss_type)

    def step(module):
        with monkeypatch.context() as patched:
            for name, draw in draws.items():
                patched.setattr(module, name, draw)
            return one_step.results(lambda train, optimize: step_fn(train, optimize_fn=optimize), model, X0)

    with wrap(transformer) as model:
        expected = step(losses)
        applied(published, radd.apply_to_radd)
        got = step(radd)
    assert_same_step(got[2:], expected[2:])
    if loss_type not in ("t_DCE", "k_DCE"):  # the values have a constant more, end in float32
        assert_same_step(got[:2], expected[:2])
