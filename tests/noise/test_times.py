"""Times by importance and complementary masks: unbiased, named by the row of the batch, resumed bit for bit."""

import math

import pytest
import torch

from fastdiff.data import Table
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.noise.noising import sample_times
from fastdiff.noise.times import RENEWED, ImportanceTimes
from fastdiff.reference import subsets
from fastdiff.training import TrainConfig, diffusion_loss, noise, train

L, MASK = 4, 5
X0 = torch.tensor([[3, 0, 4, 1]])


def of_times(t):
    """What a row loses at a time, in the tests."""
    return 1 / (0.05 + t)


def learned(eps=1e-3, **options):
    """A law that has met losses of two tokens with these squares."""
    law = ImportanceTimes(eps=eps, **options)
    for step in range(RENEWED):
        t, weight = law.sample(256, seed=7, step=step)
        law.update(t, (weight * of_times(t)).unsqueeze(1).expand(-1, 2))
    return law


def z_score(samples, truth):
    return abs(samples.mean(0) - truth) / samples.std(0) * len(samples) ** 0.5


@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_before_it_learns_times_are_uniform_and_stratified(eps):
    t, weight = ImportanceTimes(eps=eps).sample(64, seed=3, step=5)
    assert torch.equal(t.float(), sample_times(64, eps=eps, seed=3, step=5))
    assert (weight == 1).all()


def test_the_law_follows_the_roots_of_squares():
    law = learned(bins=8, share=0.2)
    t, weight = law.sample(100_000, seed=0)
    at = ((t - 1e-3) / (1 - 1e-3) * 8).long()
    mean = torch.stack([of_times(t[at == b]).square().mean().sqrt() for b in range(8)])
    density = torch.stack([1 / weight[at == b].mean() for b in range(8)])
    torch.testing.assert_close(density, 0.2 + 0.8 * mean / mean.mean(), rtol=0.01, atol=0)
    torch.testing.assert_close(at.bincount() / len(t) * 8, density, rtol=1e-3, atol=0, check_dtype=False)
    assert (weight * of_times(t).square() * weight).mean() < of_times(torch.rand(100_000)).square().mean()
    assert t.min() >= 1e-3
    assert t.max() < 1


def test_a_bin_that_was_never_met_keeps_the_law_uniform():
    law = ImportanceTimes(bins=4)
    for _ in range(RENEWED):
        law.update(torch.tensor([0.1, 0.4, 0.6], dtype=torch.float64), torch.ones(3, 2))
    assert (law.sample(8, seed=0)[1] == 1).all()


def test_a_weighted_mean_is_unbiased():
    """Of 1000 batches of 20, each under the law that those before it have left."""
    law, means = learned(), []
    for step in range(1000):
        t, weight = law.sample(20, seed=0, step=step)
        losses = weight * of_times(t)
        means.append(losses.mean())
        law.update(t, losses.unsqueeze(1))
    truth = (math.log(1.05) - math.log(0.05 + 1e-3)) / (1 - 1e-3)
    assert z_score(torch.stack(means), truth) < 4


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    model = DiffusionTransformer(ModelConfig(MASK + 1, L, 8, 1, 2)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


def truth(model):
    """The time-free NLL, sum over masks, and its gradient by the last layer."""
    masks, weights = subsets(L)
    logits = model(torch.where(masks, MASK, X0))
    nll = -logits[..., :MASK].log_softmax(-1).gather(-1, X0.expand(len(masks), -1).unsqueeze(-1)).squeeze(-1)
    loss = (weights * (nll * masks).sum(1)).sum()
    return loss, torch.autograd.grad(loss, model.lm_head.weight)[0]


@pytest.mark.parametrize("by_law", [False, True])
@pytest.mark.parametrize("complementary", [False, True])
def test_loss_and_gradient_of_a_network_are_unbiased(model, by_law, complementary):
    """500 batches of 40 rows against the sum over all masks."""
    law, losses, gradients = learned(eps=0) if by_law else None, [], []
    options = dict(law=law, complementary=complementary)
    for step in range(500):
        batch = noise(X0.expand(40, -1), "dce-k", MASK + 1, seed=1, step=step, **options)
        loss = diffusion_loss(model, batch, "dce-k").sum() / 40
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, model.lm_head.weight)[0].flatten())
    nll, gradient = truth(model)
    assert z_score(torch.stack(losses), nll.item()) < 4
    off = z_score(torch.stack(gradients)[:, gradient.flatten() != 0], gradient[gradient != 0])
    assert off.max() < 4.5  # of 40 numbers


@pytest.mark.parametrize("loss", ["dce-t", "dce-lambda", "dse-absorb", "dse-uniform"])
def test_times_of_a_law_leave_each_loss_its_mean(loss):
    """Of a model that loses f nats where f is the share of tokens that are noised."""
    law, means = learned(), []
    for by_law in (None, law):
        found = []
        for step in range(400):
            x0 = torch.zeros(50, 8, dtype=torch.int64)
            batch = noise(x0, loss, MASK + 1, seed=1 + (by_law is None), step=step, law=by_law)
            moved = (batch.xt != x0).double().mean(1)
            scale = torch.exp(-batch.sigma) if loss.startswith("dse") else 1
            found.append((batch.weight * scale * moved**2).mean())
        means.append(torch.stack(found).double())
    ours, uniform = means
    error = (ours.var() / len(ours) + uniform.var() / len(uniform)).sqrt()
    assert abs(ours.mean() - uniform.mean()) < 4 * error


def test_pairs_are_complements_of_every_size():
    x0 = torch.zeros(10, L, dtype=torch.int64)
    xt, _, weight = noise(x0, "dce-k", MASK + 1, seed=0, step=0, complementary=True)[1:4]
    masked = xt == MASK
    assert torch.equal(masked[::2], ~masked[1::2])
    counts = masked.sum(1)
    assert sorted(counts[::2].tolist()) == [0, 1, 2, 3, 4]
    torch.testing.assert_close(weight, (L + 1) / counts.clamp_min(1).double())


@pytest.mark.parametrize(
    ("loss", "complementary"), [("dce-k", False), ("dce-k", True), ("dce-t", False), ("dse-uniform", False)]
)
def test_rows_are_those_of_the_whole_batch(loss, complementary):
    x0 = torch.zeros(12, 5, dtype=torch.int64)
    options = dict(seed=1, step=2, law=learned(eps=0 if loss == "dce-k" else 1e-3), complementary=complementary)
    whole = noise(x0, loss, MASK + 1, **options)
    for first, n in ((0, 4), (3, 6), (11, 1)):
        part = noise(x0[:n], loss, MASK + 1, first=first, batch_size=12, **options)
        for of_part, of_whole in zip((*part[:4], part.times), (*whole[:4], whole.times), strict=True):
            assert torch.equal(of_part, of_whole[first : first + n])


TOKENS = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 1]])


def run(out=None, resume=False, **settings):
    records = []
    torch.manual_seed(0)
    loss = settings.get("loss", "dce-k")
    size = ModelConfig(4 + (loss != "dse-uniform"), 4, 16, 1, 2, 8 * loss.startswith("dse"))
    config = TrainConfig(**dict(batch_size=8, lr=0.01, warmup=2, eval_every=0, times="importance") | settings)
    source = Table(TOKENS, num_tokens=4, held_out=TOKENS)
    averaged = train(config, DiffusionTransformer(size), source, out=out, resume=resume, callback=records.append)
    return averaged.state_dict(), [record["loss"] for record in records]


@pytest.mark.parametrize("complementary", [False, True])
def test_a_run_goes_on_as_if_unbroken(tmp_path, complementary):
    """Stopped between two changes of the law."""
    settings = dict(steps=2 * RENEWED + 3, complementary=complementary)
    unbroken, losses = run(**settings)
    _, first = run(tmp_path / "run", **settings | dict(steps=RENEWED + 5))
    weights, second = run(tmp_path / "run", resume=True, **settings)
    assert first + second == losses
    assert all(torch.equal(weights[name], tensor) for name, tensor in unbroken.items())
    assert losses[-1] != run(**settings, times="stratified")[1][-1]


@pytest.mark.parametrize(("loss", "steps"), [("dce-k", RENEWED + 4), ("dse-absorb", 3)])
def test_parts_and_large_vocabularies_change_nothing(loss, steps, monkeypatch):
    settings = dict(loss=loss, steps=steps, complementary=loss == "dce-k")
    _, whole = run(**settings)
    assert run(**settings, accumulation=4)[1] == pytest.approx(whole, rel=1e-4)
    monkeypatch.setattr("fastdiff.training.objectives.LARGE_VOCABULARY", 2)
    assert run(**settings)[1] == pytest.approx(whole, rel=1e-4)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="eps, share: expected"):
        ImportanceTimes(share=0)
    with pytest.raises(ValueError, match="bins: expected"):
        ImportanceTimes(bins=0)
    with pytest.raises(ValueError, match=r"t, losses: expected float64 \[n\] and \[n, L\]"):
        ImportanceTimes().update(torch.rand(3), torch.ones(3, 2))
    with pytest.raises(ValueError, match="times: expected 'stratified' for loss 'dce-harmonic', got importance"):
        TrainConfig("dce-harmonic", times="importance")
    with pytest.raises(ValueError, match="times: expected one of"):
        TrainConfig(times="uniform")
    with pytest.raises(ValueError, match="complementary: expected False unless loss is 'dce-k', got True"):
        TrainConfig("dce-t", complementary=True)
    with pytest.raises(ValueError, match="batch_size: expected an even number"):
        TrainConfig(complementary=True, batch_size=3)
