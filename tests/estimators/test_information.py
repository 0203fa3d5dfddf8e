import itertools
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from oracles import AbsorbingScores, UniformScores, mixture
from torch import Tensor

from fastdiff.estimators.information import InformationCurve, mutual_information
from fastdiff.noise.graphs import Absorbing, Uniform
from fastdiff.schedules import Cosine, Geometric, LogLinear

ORACLE = mixture(6, 3)
STRINGS = torch.tensor(list(itertools.product(range(3), repeat=6)))
P = torch.exp(-ORACLE.nll(STRINGS))
X0 = ORACLE.sample(1600, 6)


def masked_information(times: Tensor) -> Tensor:
    """I(x0; x_lambda): the entropy of the tokens that are seen, averaged over all masks."""
    information = torch.zeros_like(times)
    for mask in itertools.product([False, True], repeat=6):
        seen = STRINGS.masked_fill(torch.tensor(mask), ORACLE.mask_index)
        weight = times ** sum(mask) * (1 - times) ** (6 - sum(mask))
        information += weight * -(P * ORACLE.log_prob(seen)).sum()
    return information


def rate_of(information, times: Tensor) -> Tensor:
    """- dI/dt, by central differences."""
    return (information(times - 1e-5) - information(times + 1e-5)) / 2e-5


def assert_within(estimate: Tensor, stderr: Tensor, truth: Tensor, slack: float) -> None:
    """Within 3.5 standard errors and what the trapezoidal rule leaves."""
    assert ((estimate - truth).abs() < 3.5 * stderr + slack).all(), ((estimate - truth) / stderr).tolist()


def test_masked_curve_is_that_of_the_distribution() -> None:
    curve = mutual_information(ORACLE, X0[:400], graph=Absorbing(4), num_samples=2)
    assert curve.times.tolist() == [i / 32 for i in range(33)]
    truth = masked_information(curve.times)
    assert truth[0].item() == pytest.approx(-(P * P.log()).sum().item(), rel=1e-12)
    assert_within(curve.information, curve.information_stderr, truth, 0.01)
    assert (curve.information_stderr[:-1] < 0.15).all()
    assert curve.information[-1] == 0
    assert_within(curve.integrand, curve.integrand_stderr, rate_of(masked_information, curve.times), 1e-4)
    assert (curve.integrand_stderr < 0.2).all()
    assert curve.variable == "lambda"
    assert curve.num_forwards == 400 * 33 * 2


def test_information_is_the_integral_of_its_fall() -> None:
    times = torch.tensor([0.1, 0.25, 0.5, 0.9])
    curve = mutual_information(ORACLE, X0[:50], graph=Absorbing(4), num_samples=2, times=times)
    assert curve.times.tolist() == pytest.approx([0, 0.1, 0.25, 0.5, 0.9])
    f, t = curve.integrand, curve.times
    lost = (curve.information[:-1] - curve.information[1:]).tolist()
    assert lost == pytest.approx(((f[1:] + f[:-1]) / 2 * t.diff()).tolist(), rel=1e-6)
    assert curve.information[-1] == 0


def test_stderr_holds_the_choice_of_sequences_and_of_masks() -> None:
    x0 = X0.view(40, 40, 6)
    curves = [
        mutual_information(ORACLE, part, graph=Absorbing(4), num_samples=2, times=torch.tensor([0.3, 0.6, 1.0]), seed=i)
        for i, part in enumerate(x0)
    ]
    for name in ("information", "integrand"):
        spread = torch.stack([getattr(curve, name) for curve in curves]).std(0)[:-1]
        stderr = torch.stack([getattr(curve, name + "_stderr") for curve in curves]).square().mean(0).sqrt()[:-1]
        assert ((spread / stderr - 1).abs() < 0.4).all()


@pytest.mark.parametrize("schedule", [LogLinear(), Cosine(), Geometric(0.01, 8)], ids=repr)
def test_absorbing_scores_give_the_same_information(schedule) -> None:
    curve = mutual_information(AbsorbingScores(ORACLE), X0[:400], graph=Absorbing(4), schedule=schedule, num_samples=2)

    def truth(t: Tensor) -> Tensor:
        return masked_information(1 - schedule.alpha(t))

    assert_within(curve.information, curve.information_stderr, truth(curve.times) - truth(curve.times[-1:]), 0.04)
    inner = slice(1, -1)
    rate = rate_of(truth, curve.times[inner])
    assert_within(curve.integrand[inner], curve.integrand_stderr[inner], rate, 0.01)
    assert curve.variable == "t"
    f = curve.integrand[:3].tolist()
    assert f[0] == pytest.approx(2 * f[1] - f[2])


def test_uniform_scores_give_the_information_of_the_uniform_graph() -> None:
    oracle, schedule = mixture(4, 3), LogLinear(0.05)
    strings = torch.tensor(list(itertools.product(range(3), repeat=4)))
    p = torch.exp(-oracle.nll(strings))

    def truth(t: Tensor) -> Tensor:
        found = []
        for sigma in schedule.total_noise(t).tolist():
            column = Uniform(3).transition(strings, torch.tensor(sigma, dtype=torch.float64))
            noised = torch.stack([column[:, i, strings[:, i]] for i in range(4)]).prod(0)  # p(xt | x0)
            marginal = p @ noised
            found.append((p @ (torch.special.xlogy(noised, noised) - noised * marginal.log()).sum(1)).item())
        return torch.tensor(found, dtype=torch.float64)

    curve = mutual_information(
        UniformScores(oracle), oracle.sample(2000, 4), graph=Uniform(3), schedule=schedule, num_samples=4
    )
    exact = truth(curve.times)
    # towards 0 the integrand grows like log(1/t), which the line through its first two points does not
    assert_within(curve.information[1:], curve.information_stderr[1:], exact[1:] - exact[-1], 0.03)
    assert_within(curve.information[:1], curve.information_stderr[:1], exact[:1] - exact[-1], 0.15)
    inner = slice(1, -1)
    rate = rate_of(truth, curve.times[inner])
    assert_within(curve.integrand[inner], curve.integrand_stderr[inner], rate, 0)


def test_the_batch_size_changes_nothing_and_seeds_and_names_do() -> None:
    sizes = []

    def model(xt: Tensor) -> Tensor:
        sizes.append(len(xt))
        return ORACLE(xt)

    def curve(**options) -> list[float]:
        options = {"num_samples": 3, "times": torch.tensor([0.5, 1.0]), "seed": 5, **options}
        return mutual_information(model, STRINGS[:4], graph=Absorbing(4), **options).integrand.tolist()

    expected = curve()
    sizes.clear()
    assert curve(batch_size=5) == pytest.approx(expected, rel=1e-12)
    assert max(sizes) == 5
    assert curve(seed=6) != expected
    assert curve(sample_ids=torch.arange(1, 5)) != expected


def test_a_curve_goes_to_json_and_back() -> None:
    curve = mutual_information(ORACLE, X0[:3], graph=Absorbing(4), num_samples=1)
    record = json.loads(json.dumps(curve.to_dict(), allow_nan=False))
    assert set(record) == set(vars(curve))
    assert record["information"] == curve.information.tolist()
    assert record["variable"] == "lambda"


SMALL = InformationCurve(*(torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64) for _ in range(5)), "lambda", 6)


@pytest.mark.parametrize(("name", "start"), [("curve.png", b"\x89PNG"), ("curve.svg", b"<?xml"), ("curve", b"\x89PNG")])
def test_a_plot_is_a_whole_file(tmp_path: Path, name: str, start: bytes) -> None:
    SMALL.plot(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes().startswith(start)
    SMALL.plot(str(tmp_path / name))


def test_a_plot_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="xyz"):
        SMALL.plot(tmp_path / "curve.xyz")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="plotting needs matplotlib"):
        SMALL.plot(tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"graph": Uniform(4)}, TypeError, r"^graph: .*Absorbing where no schedule.*Uniform"),
        ({"graph": "absorb", "schedule": LogLinear()}, TypeError, r"^graph: .*'absorb'"),
        ({"schedule": "cosine"}, TypeError, r"^schedule: .*'cosine'"),
        ({"num_samples": 0}, ValueError, r"^num_samples: .*at least 1, got 0"),
        ({"x0": STRINGS[:1]}, ValueError, r"^x0: .*at least 2 sequences.*got 1"),
        ({"x0": [[0, 1]]}, TypeError, r"^x0: .*list"),
        ({"x0": STRINGS[:4] + 3}, ValueError, r"^x0: .*no mask"),
        ({"times": [0.5, 1.0]}, TypeError, r"^times: .*list"),
        ({"times": torch.tensor([0, 1])}, TypeError, r"^times: .*int64"),
        ({"times": torch.tensor([0.5])}, ValueError, r"^times: .*T >= 2, got \(1,\)"),
        ({"times": torch.tensor([0.0, 1.0])}, ValueError, r"^times: .*rising.*\(0, 1\], got \[0.0, 1.0\]"),
        ({"times": torch.tensor([1.0, 0.5])}, ValueError, r"^times: .*rising"),
        ({"times": torch.tensor([0.5, 1.5])}, ValueError, r"^times: .*rising"),
        ({"times": torch.tensor([0.5, math.nan])}, ValueError, r"^times: .*rising"),
        ({"schedule": LogLinear(0), "model": AbsorbingScores(ORACLE)}, ValueError, r"^times: .*finite noise.*1.0"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"model": ORACLE, "x0": STRINGS[:4], "graph": Absorbing(4), "num_samples": 1, **change}
    with pytest.raises(error, match=message):
        mutual_information(**arguments)
