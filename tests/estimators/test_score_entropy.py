import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from networks import z_score
from oracles import AbsorbingScores, UniformScores, markov_chain, mixture
from torch import Tensor, nn

from fastdiff.estimators.estimate import NLLEstimate
from fastdiff.estimators.score_entropy import dse_nll
from fastdiff.noise.graphs import Absorbing, Uniform
from fastdiff.schedules import Cosine, Geometric, Linear, LogLinear, Polynomial, Schedule

TIMES, DENSITIES = ("stratified", "iid"), ("sqrt", "schedule")
SCHEDULES = [
    LogLinear(),
    LogLinear(0),
    LogLinear(0.2),
    Geometric(0.05, 3),
    Cosine(),
    Linear(0.1, 0.8),
    Polynomial(2, 0.1),
]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
each_density = pytest.mark.parametrize("density", DENSITIES)


SMALL = mixture(4, 3)
STRINGS = torch.tensor(list(itertools.product(range(3), repeat=4)))
X0 = SMALL.sample(1, 4, seed=1)


def law(x0: Tensor, sigma: float) -> Tensor:
    """p_sigma|0(. | x0) over STRINGS, a row per row of x0."""
    column = Uniform(3).transition(x0, torch.tensor(sigma, dtype=torch.float64))  # [k, 4, 3]
    return torch.stack([column[:, i, STRINGS[:, i]] for i in range(4)]).prod(0)


def divergence(x0: Tensor, sigma: float) -> float:
    """KL of p_sigma|0(. | x0) from p_sigma, by enumeration; at 0 it is -log p(x0)."""
    marginal = torch.exp(-SMALL.nll(STRINGS)) @ law(STRINGS, sigma)
    noised = law(x0, sigma)[0]
    return (torch.special.xlogy(noised, noised) - noised * marginal.log()).sum().item()


def ends(schedule: Schedule) -> list[float]:
    return schedule.total_noise(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()


def test_uniform_scores_are_ratios_of_marginals() -> None:
    marginal = torch.exp(-SMALL.nll(STRINGS)) @ law(STRINGS, 0.7)
    score = UniformScores(SMALL)(STRINGS, torch.full((81,), 0.7)).exp()
    place = {tuple(x): i for i, x in enumerate(STRINGS.tolist())}
    for i, x in enumerate(STRINGS.tolist()):
        for j, y in itertools.product(range(4), range(3)):
            other = place[(*x[:j], y, *x[j + 1 :])]
            assert score[i, j, y].item() == pytest.approx((marginal[other] / marginal[i]).item(), rel=1e-6)


@each_schedule
@each_density
@pytest.mark.parametrize("times", TIMES)
def test_uniform_graph_gives_the_bound_of_the_true_score(schedule: Schedule, density: str, times: str) -> None:
    low, high = ends(schedule)
    model = UniformScores(SMALL)
    estimate = dse_nll(
        model, X0.expand(1000, -1), graph=Uniform(3), schedule=schedule, num_samples=8, times=times, density=density
    )
    last = law(X0, min(high, 700.0))[0]
    end = torch.special.xlogy(last, 81 * last).sum().item()  # KL from the uniform law
    truth = divergence(X0, low) - divergence(X0, min(high, 700.0)) + end
    assert abs(z_score(estimate, truth)) < 3.5
    sigma = torch.cat(model.asked)
    assert sigma.dtype == torch.float32
    assert low * 0.9999 <= sigma.min() < low + 0.1
    assert 0.6 * min(high, 5) < sigma.max() <= high
    assert (estimate.bias == 0).all() == (low == 0)


@each_schedule
@each_density
@pytest.mark.parametrize("times", TIMES)
def test_eps_gives_the_mean_that_is_published(schedule: Schedule, density: str, times: str) -> None:
    """Of the uniform graph a difference of divergences, of the absorbing one an integral over lambda of a constant."""
    low, high = schedule.total_noise(torch.tensor([0.1, 1.0], dtype=torch.float64)).tolist()
    options = dict(schedule=schedule, num_samples=8, times=times, density=density, eps=0.1)
    estimate = dse_nll(UniformScores(SMALL), X0.expand(1000, -1), graph=Uniform(3), **options)
    truth = (divergence(X0, low) - divergence(X0, min(high, 700.0))) / 0.9
    assert abs(z_score(estimate, truth)) < 3.5
    assert estimate.bias.isnan().all()
    even = torch.zeros(1, 4, 4, dtype=torch.float64)  # each token costs log 3 wherever it is masked

    def model(xt: Tensor, sigma: Tensor) -> Tensor:
        return even.expand(len(xt), -1, -1)

    options |= dict(parametrization="logits")
    estimate = dse_nll(model, X0.expand(4000, -1), graph=Absorbing(4, 3), **options)
    truth = 4 * math.log(3) * (math.exp(-low) - math.exp(-high)) / 0.9
    assert abs(z_score(estimate, truth)) < 3.5


@pytest.mark.parametrize("schedule", [Geometric(0.01, 5), Geometric(0.05, 3)], ids=repr)
@pytest.mark.parametrize("x0", [X0, torch.tensor([[2, 0, 1, 1]])], ids=["likely", "unlikely"])
@each_density
def test_bias_is_what_the_first_noise_leaves_out(schedule: Schedule, x0: Tensor, density: str) -> None:
    estimate = dse_nll(
        UniformScores(SMALL), x0.expand(1000, -1), graph=Uniform(3), schedule=schedule, num_samples=32, density=density
    )
    left_out = divergence(x0, ends(schedule)[0]) - divergence(x0, 0)
    assert estimate.bias.mean().item() == pytest.approx(left_out, rel=0.2)


@each_schedule
@each_density
@pytest.mark.parametrize("times", TIMES)
def test_absorbing_graph_gives_the_nll_whatever_the_ends(schedule: Schedule, density: str, times: str) -> None:
    oracle = markov_chain(3)
    x0, model, (low, high) = oracle.sample(1, 6, seed=2), AbsorbingScores(oracle), ends(schedule)
    estimate = dse_nll(
        model,
        x0.expand(1000, -1),
        graph=Absorbing(4),
        schedule=schedule,
        num_samples=8,
        times=times,
        density=density,
    )
    assert abs(z_score(estimate, oracle.nll(x0).item())) < 3.5
    assert not estimate.bias.any()
    sigma = torch.cat(model.asked).double()
    assert low * 0.9999 <= sigma.min()
    assert sigma.max() <= high * 1.0001
    if high < math.inf:
        assert (sigma > high * 0.9999).any()


@pytest.mark.parametrize("parametrization", ["log_score", "logits", "scale_by_sigma"])
def test_parametrizations_of_one_score_agree(parametrization: str) -> None:
    oracle = mixture(8, 3)
    x0 = oracle.sample(3, 8)
    options = dict(graph=Absorbing(4), schedule=Geometric(1e-3, 10), num_samples=32)
    expected = dse_nll(AbsorbingScores(oracle), x0, **options)
    estimate = dse_nll(AbsorbingScores(oracle, parametrization), x0, parametrization=parametrization, **options)
    torch.testing.assert_close(estimate.nll, expected.nll, rtol=1e-5, atol=0)


def test_scores_that_do_not_normalise_cost_their_excess() -> None:
    """With kappa c for c, each cross-entropy gains kappa - 1 - log kappa; all noise counted, that is H_L in all."""
    oracle = mixture(6, 3)
    x0, scores = oracle.sample(1, 6).expand(2000, -1), AbsorbingScores(oracle)
    options = dict(graph=Absorbing(4), schedule=LogLinear(0.2), num_samples=16)
    once = dse_nll(scores, x0, **options)
    twice = dse_nll(lambda xt, sigma: scores(xt, sigma) + math.log(2), x0, **options)
    # int_0^1 E[masked] / lambda d lambda = L
    excess = NLLEstimate(**{**vars(once), "nll": twice.nll - once.nll})
    assert abs(z_score(excess, 6 * (1 - math.log(2)))) < 3.5


def wide_estimate(graph, **options) -> NLLEstimate:
    oracle = mixture(24, 6, components=4)
    scores = AbsorbingScores(oracle) if graph.name == "absorb" else UniformScores(oracle)
    x0 = oracle.sample(1, 24, seed=5).expand(300, -1)
    return dse_nll(scores, x0, graph=graph, num_samples=32, **{"schedule": LogLinear(), **options})


@pytest.mark.parametrize("graph", [Absorbing(7), Uniform(6)], ids=["absorb", "uniform"])
@pytest.mark.parametrize("times", TIMES)
def test_stderr_is_the_spread(graph, times: str) -> None:
    estimate = wide_estimate(graph, times=times)
    assert 0.85 < (estimate.stderr.square().mean().sqrt() / estimate.nll.std()).item() < 1.15


def test_stratified_times_beat_independent_ones() -> None:
    stratified, iid = (wide_estimate(Absorbing(7), times=times).nll.var() for times in TIMES)
    assert stratified < 0.5 * iid


@pytest.mark.parametrize(
    ("graph", "schedule"), [(Absorbing(7), LogLinear()), (Absorbing(7), Geometric()), (Uniform(6), LogLinear())]
)
def test_the_default_density_beats_the_schedules(graph, schedule: Schedule) -> None:
    default, published = (wide_estimate(graph, schedule=schedule, density=density).nll.var() for density in DENSITIES)
    assert default < 0.75 * published


@pytest.mark.parametrize("graph", [Absorbing(4), Uniform(3)], ids=["absorb", "uniform"])
def test_a_sequence_does_not_see_its_batch(graph) -> None:
    oracle, names = mixture(8, 3), torch.tensor([40, 2**35 + 1, 7])
    x0 = oracle.sample(3, 8)
    scores = AbsorbingScores(oracle) if graph.name == "absorb" else UniformScores(oracle)
    options = dict(graph=graph, schedule=Geometric(0.01, 5), num_samples=9, seed=5)
    batch = dse_nll(scores, x0, sample_ids=names, batch_size=4, **options)
    assert len({*batch.nll.tolist()}) == 3
    assert max(len(sigma) for sigma in scores.asked) == 4
    assert batch.num_tokens.tolist() == [8] * 3
    assert batch.num_forwards.tolist() == [9] * 3
    assert sum(len(sigma) for sigma in scores.asked) == 27
    for b in range(3):
        one = dse_nll(scores, x0[b : b + 1], sample_ids=names[b : b + 1], **options)
        for name in ("nll", "stderr", "bias"):
            torch.testing.assert_close(getattr(one, name), getattr(batch, name)[b : b + 1], rtol=1e-9, atol=0)
    other = dse_nll(scores, x0[:1].expand(2, -1), **{**options, "seed": None})
    assert other.nll[0] != other.nll[1] != batch.nll[0]


@pytest.mark.parametrize("schedule", [Linear(0, 90), Geometric(1e-6, 1e4), Linear(0.5, 0.6)], ids=repr)
@pytest.mark.parametrize("graph", [Absorbing(4), Uniform(3)], ids=["absorb", "uniform"])
@each_density
def test_extreme_schedules_stay_finite(graph, schedule: Schedule, density: str) -> None:
    scores = AbsorbingScores(SMALL) if graph.name == "absorb" else UniformScores(SMALL)
    estimate = dse_nll(scores, X0.expand(50, -1), graph=graph, schedule=schedule, density=density, num_samples=256)
    assert estimate.nll.isfinite().all()
    if density == "sqrt" and ends(schedule)[1] > 1:
        assert estimate.nll.mean().item() == pytest.approx(SMALL.nll(X0).item(), rel=0.1)


class Network(nn.Module):
    """Scores from an embedding through dropout, with sigma's type and shape looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop = nn.Embedding(5, 5), nn.Dropout(0.5)

    def forward(self, xt: Tensor, sigma: Tensor) -> SimpleNamespace:
        assert sigma.shape == xt.shape[:1]
        assert sigma.dtype == torch.float32
        assert not self.training
        return SimpleNamespace(logits=self.drop(self.embed(xt)))


def test_a_module_is_evaluated_without_gradients_and_gets_its_mode_back() -> None:
    torch.manual_seed(0)
    network, x0 = Network(), torch.tensor([[0, 1, 2, 3]])
    estimate = dse_nll(network, x0, graph=Absorbing(5), schedule=LogLinear())
    assert not estimate.nll.requires_grad
    assert estimate.nll.dtype == torch.float64
    assert network.training


def test_an_empty_batch_gives_an_empty_estimate() -> None:
    for graph in (Absorbing(4), Uniform(3)):
        estimate = dse_nll(Network(), X0[:0], graph=graph, schedule=LogLinear())
        assert all(len(column) == 0 for column in estimate.to_dict().values())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"graph": "uniform"}, TypeError, r"^graph: .*Absorbing, Uniform or Mixture, got 'uniform'"),
        ({"schedule": "loglinear"}, TypeError, r"^schedule: .*'loglinear'"),
        ({"model": (1, 2)}, TypeError, r"^model: .*callable of xt and sigma"),
        ({"eps": 1}, ValueError, r"^eps: .*\[0, 1\), got 1"),
        ({"density": "lambda"}, ValueError, r"^density: .*'sqrt', 'schedule', got 'lambda'"),
        ({"times": "even"}, ValueError, r"^times: .*'even'"),
        ({"parametrization": "score"}, ValueError, r"^parametrization: .*'score'"),
        ({"num_samples": 1}, ValueError, r"^num_samples: .*at least 2.*got 1"),
        ({"batch_size": 0}, ValueError, r"^batch_size: .*got 0"),
        ({"sample_ids": torch.arange(3)}, ValueError, r"^sample_ids: .*\(1,\), got \(3,\)"),
        ({"x0": X0.int()}, TypeError, r"^x0: .*int32"),
        ({"x0": X0.clamp(min=3)}, ValueError, r"^x0: .*no mask"),
        ({"x0": X0 + 3}, ValueError, r"^x0: .*\[0, 4\), got 5"),
        ({"x0": X0 + 1, "graph": Uniform(3)}, ValueError, r"^x0: .*\[0, 3\), got 3"),
        ({"graph": Absorbing(5)}, ValueError, r"^model's log score: .*5 states, got 4"),
        ({"model": lambda xt, sigma: xt}, ValueError, r"^model's log score: .*\[1, 4, 4\], got \[1, 4\]"),
        ({"model": lambda xt, sigma: None}, TypeError, r"^model's log score: .*NoneType"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"model": AbsorbingScores(SMALL), "x0": X0, "graph": Absorbing(4), "schedule": LogLinear(), **change}
    with pytest.raises(error, match=message):
        dse_nll(**arguments)
