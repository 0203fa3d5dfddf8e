"""How text loses its information to noise: I-MDCE of conditionals, I-MDSE of scores, and what they add up to.

The rate at which noise takes information is a denoising loss, and what it takes in all is the likelihood. Both are
measured here by themselves, on the same held-out windows; they agree for every window, not on the mean alone.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

from fastdiff import Absorbing, Uniform, dse_nll, time_free_nll
from fastdiff.estimators import InformationCurve, NLLEstimate, mutual_information
from fastdiff.evaluating import Model
from fastdiff.schedules import Schedule

from .methods import ABSORBING, METHODS, SCHEDULE, SCORES, UNIFORM
from .networks import letter_text, subject, trained, unseen
from .report import Setup, Table, console, reporting

MINUTES = 3
PAIR = 2  # windows whose curve is taken at once, the fewest that have one


class Relation(NamedTuple):
    """A curve and the likelihood that is its integral, by estimators that share nothing but the model."""

    curve: Callable[..., InformationCurve]
    nll: Callable[..., NLLEstimate]


class Measured(NamedTuple):
    """Of G pairs of windows, in nats per window: float64."""

    times: Tensor  # [T + 1]
    rate: Tensor  # [G, T + 1]
    left: Tensor  # [G, T + 1]
    nll: Tensor  # [G]


def run(setup: Setup) -> None:
    """I-MDCE and I-MDSE curves of trained networks, and their integrals against the likelihood."""
    named = relations(setup)
    x0 = unseen(setup, subject(setup), 4 if setup.quick else 64)
    with reporting("information", setup) as report:
        measured = {name: measure(name, relation, x0, setup.quick) for name, relation in named.items()}
        report.numbers = {"curves": {name: numbers(found) for name, found in measured.items()}, "windows": len(x0)}
        report.tables = [table(measured, x0)]
        report.figure = picture(measured)


def relations(setup: Setup) -> dict[str, Relation]:
    """Those of the model that --model names, or of three networks of the letters."""
    model = subject(setup)
    if model.front or model.block_length:
        raise SystemExit("model: expected one without blocks and without tokens in front of every sequence")
    found = {}
    if model.conditionals is not None:
        of = METHODS["radd"].title if setup.model is None else setup.model
        found[f"I-MDCE, {of}"] = of_conditionals(model.conditionals, model.graph, model.exclude_mask)
    if model.score is not None:
        noise = model.graph, model.schedule, model.parametrization
        found[f"I-MDSE, {setup.model}"] = of_scores(model.score, *noise)
    if setup.model is None:
        for name, graph in {"sedd-absorb": ABSORBING, "sedd-uniform": UNIFORM}.items():
            network, _ = trained(name, setup, letter_text(setup))
            found[f"I-MDSE, {METHODS[name].title}"] = of_scores(network, graph, SCHEDULE, SCORES[graph.name])
    return found


def of_conditionals(model: Model, graph: Absorbing, exclude_mask: bool) -> Relation:
    return Relation(
        partial(mutual_information, model, graph=graph, exclude_mask=exclude_mask),
        partial(time_free_nll, model, mask_index=graph.mask_index, exclude_mask=exclude_mask),
    )


def of_scores(
    model: Callable[[Tensor, Tensor], Tensor], graph: Absorbing | Uniform, schedule: Schedule, parametrization: str
) -> Relation:
    """The likelihood is that over times 0 to 1, as SEDD prints it: it too leaves out what is still known at time 1."""
    options = dict(graph=graph, schedule=schedule, parametrization=parametrization)
    return Relation(partial(mutual_information, model, **options), partial(dse_nll, model, eps=0.0, **options))


def measure(name: str, relation: Relation, x0: Tensor, quick: bool) -> Measured:
    """Pair by pair, so that all errors come from how pairs differ."""
    number, samples, passes = (4, 1, 4) if quick else (48, 2, 64)
    times = torch.sin(torch.linspace(0, math.pi / 2, number + 1, dtype=torch.float64)[1:]) ** 2  # dense at both ends
    pairs = torch.arange(len(x0)).split(PAIR)
    curves = [
        relation.curve(x0[pair], times=times, num_samples=samples, sample_ids=pair, seed=0, batch_size=32)
        for pair in track(pairs, name, console=console, disable=not console.is_terminal)
    ]
    nll = relation.nll(x0, num_samples=passes, seed=1, batch_size=32).nll
    rate, left = (torch.stack(columns) for columns in zip(*((c.integrand, c.information) for c in curves), strict=True))
    return Measured(curves[0].times, rate, left, nll.view(-1, PAIR).mean(1))


def mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Over pairs [G, ...], and its standard error."""
    return values.mean(0), values.std(0) / math.sqrt(len(values))


def numbers(found: Measured) -> dict[str, list[float]]:
    columns = {"rate": mean(found.rate), "left": mean(found.left)}
    parts = {"times": found.times, "integral_of_pairs": found.left[:, 0], "nll_of_pairs": found.nll}
    for name, (value, stderr) in columns.items():
        parts |= {name: value, f"{name}_stderr": stderr}
    return {name: part.tolist() for name, part in parts.items()}


def table(measured: dict[str, Measured], x0: Tensor) -> Table:
    rows = []
    for name, found in measured.items():
        (integral, integral_error), (nll, nll_error) = mean(found.left[:, 0]), mean(found.nll)
        difference, error = mean(found.left[:, 0] - found.nll)
        correlation = torch.corrcoef(torch.stack([found.left[:, 0], found.nll]))[0, 1]
        cells = [
            f"{integral:.2f} ± {integral_error:.2f}",
            f"{nll:.2f} ± {nll_error:.2f}",
            f"{difference:+.2f} ± {error:.2f}",
            f"{difference / error:+.1f}",
            f"{correlation:.3f}",
            f"{nll / x0.shape[1] / math.log(2):.3f}",
        ]
        rows.append([name, *cells])
    head = [
        "nats per window",
        "integral of the curve",
        "likelihood",
        "difference",
        "z",
        "correlation",
        "bits per token",
    ]
    notes = [
        f"{len(x0)} windows of {x0.shape[1]} tokens. ± is a standard error over pairs of windows; the difference is "
        "taken pair by pair, so that what windows differ in cancels.",
        "Likelihoods: time_free_nll for conditionals, dse_nll over times 0 to 1 for scores. The paper proves the "
        "relations, and prints no number for text.",
    ]
    return Table("Information lost to noise, and the likelihood", head, rows, notes)


def picture(measured: dict[str, Measured]) -> Figure:
    """Rates, what is left, with 95% bands, and both estimates of every pair of windows."""
    figure, (rates, left, pairs) = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    for name, found in measured.items():
        for axes, values in ((rates, found.rate), (left, found.left)):
            value, error = mean(values[:, 1:] if axes is rates else values)  # rates of scores at 0 are extrapolated
            times = found.times[-len(value) :]
            axes.plot(times, value, label=name)
            axes.fill_between(times, value - 1.96 * error, value + 1.96 * error, alpha=0.3, linewidth=0)
        pairs.scatter(found.nll, found.left[:, 0], s=12, label=name)
    pairs.axline((found.nll[0].item(),) * 2, slope=1, color="0.7", zorder=0)
    time = "lambda of conditionals, t of scores"
    rates.set(xlabel=time, ylabel="information lost per unit of time (nats)")
    left.set(xlabel=time, ylabel="information left (nats)")
    pairs.set(xlabel="likelihood, -log p (nats), of a pair of windows", ylabel="integral of its curve (nats)")
    left.legend(fontsize="small")
    return figure
