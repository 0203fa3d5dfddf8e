"""The experiments of Jeon et al. (2025), "Information-Theoretic Discrete Diffusion", at small scale.

Each command writes runs/experiments/<command>.json and .png, and prints the paper's numbers beside ours. The paper
measured LLaDA, a network of 8 billion parameters; ours have half a million or less, so look at ratios, not at sizes.
"""

import io
import json
import math
import re
import time
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import typer
from demo import OUT as DEMO
from demo import QUICK, Conditionals, console, train_text
from dna import dna_strings, markov_nll, markov_strings, markov_transition
from matplotlib.figure import Figure
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from fastdiff import Absorbing, dce_loss, exact_nll, mask_exactly, sample_mask_counts, time_free_nll
from fastdiff.data import NUM_BYTES, Text, decode, load_documents
from fastdiff.data import Table as Strings
from fastdiff.estimators import conditional_nll, log_likelihood_ratio, mutual_information, time_integral_nll
from fastdiff.files import write_atomically
from fastdiff.model import DiffusionTransformer, ModelConfig

OUT = Path("runs/experiments")
MASK = 4  # after the letters ACGT
BATCH = 32  # rows in a pass of the text network; more of them leave the cache
TIME_INTEGRAL, HARMONIC = "time integral", "harmonic"
COUPLED, DECOUPLED = "coupled harmonic", "decoupled harmonic"
PAPER_VARIANCE = {  # its Table 1a: LLaDA on HellaSwag
    TIME_INTEGRAL: {128: 70.97, 256: 30.19, 512: 13.38},
    HARMONIC: {128: 11.57, 256: 6.02, 512: 2.92},
}
PAPER_RATIO = {  # its Table 1b: LLaDA
    DECOUPLED: {5: 62469, 10: 29107, 15: 20696, 20: 16515},
    COUPLED: {5: 8897, 10: 4487, 15: 3060, 20: 2335},
}

Row = dict[int, dict[str, float]]  # of an estimator: by number of passes, what `spread` gives

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.command()
def dna() -> None:
    """True and estimated NLL of 128 DNA strings of length 8. About 2 CPU minutes."""
    start = time.perf_counter()
    strings, p = dna_strings()
    torch.manual_seed(0)
    model = fit(
        Conditionals(), Strings(strings, num_tokens=4, probs=p), torch.ones(8).bool(), steps=4000, batch=512, lr=2e-3
    )
    true, exact = -p.log(), exact_nll(model, strings, mask_index=MASK).nll
    estimate = time_free_nll(model, strings, mask_index=MASK, num_samples=64)
    low, high = estimate.interval()
    results = {
        "exact_against_true": agreement(exact, true),
        "estimate_against_true": agreement(estimate.nll, true),
        "estimate_against_exact": agreement(estimate.nll, exact),
        "intervals_that_hold_exact": ((low <= exact) & (exact <= high)).double().mean().item(),
        "true": true.tolist(),
        "exact": exact.tolist(),
        "estimate": estimate.to_dict(),
    }

    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    scatter(axes, true, estimate.nll, high - estimate.nll, "64 passes, 95% interval")
    axes.scatter(true, exact, s=10, color="black", zorder=3, label="every subset")
    axes.set(title="128 DNA strings", xlabel="true NLL (nats)", ylabel="model's NLL (nats)")
    axes.legend(loc="upper left")
    rows = {
        "every subset against the truth": show_agreement(results["exact_against_true"]),
        "64 passes against the truth": show_agreement(results["estimate_against_true"]),
        "64 passes against every subset": show_agreement(results["estimate_against_exact"]),
        "95% intervals that hold every subset's": f"{results['intervals_that_hold_exact']:.0%}",
        "paper": "a figure: true and estimated NLL match (no number)",
        "smaller than the paper's": "a network of three layers, not RADD's transformer",
    }
    finish("dna", results, figure, start, simple_table("DNA strings", rows))


@app.command()
def markov() -> None:
    """Exact and estimated NLL of 16 letters of an order-4 Markov chain given the 16 before. About 5 CPU minutes."""
    start = time.perf_counter()
    transition, half = markov_transition(), 16
    strings = markov_strings(transition, 2000 if QUICK else 200_000, 2 * half, seed=1)
    held_out = markov_strings(transition, 8 if QUICK else 128, 2 * half, seed=2)
    torch.manual_seed(0)
    network = DiffusionTransformer(ModelConfig(MASK + 1, max_length=2 * half, dim=64, depth=2, heads=4))
    model = fit(network, Strings(strings, num_tokens=4), torch.arange(2 * half) >= half, steps=6000, batch=64, lr=3e-3)
    exact = markov_nll(transition, held_out, half)
    estimate = conditional_nll(model, held_out[:, :half], held_out[:, half:], mask_index=MASK, num_samples=64)
    results = agreement(estimate.nll, exact) | {"exact": exact.tolist(), "estimate": estimate.to_dict()}

    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    scatter(axes, exact, estimate.nll, estimate.interval()[1] - estimate.nll, "64 passes, 95% interval")
    axes.set(title="16 letters given 16, order-4 Markov chain", xlabel="exact NLL (nats)", ylabel="model's NLL (nats)")
    axes.legend(loc="upper left")
    rows = {
        "64 passes against the exact NLL": show_agreement(results),
        "mean NLL, exact": f"{exact.mean():.3f} nats",
        "mean NLL, 64 passes": f"{estimate.nll.mean():.3f} nats, each ± {estimate.stderr.mean():.3f} (stderr)",
        "paper": "a figure: true and estimated NLL match (no number)",
        "smaller than the paper's": "a network of 0.1 million parameters, trained for minutes; 16 letters given 16",
    }
    finish("markov", results, figure, start, simple_table("Order-4 Markov chain", rows))


@app.command()
def variance() -> None:
    """Variance of four likelihood estimators on text, by network passes. About 12 CPU minutes."""
    start = time.perf_counter()
    model, source = text_network()
    passes, texts, repeats = ((16, 32), 2, 3) if QUICK else ((16, 32, 64, 128, 256, 512), 8, 8)
    estimators = {
        TIME_INTEGRAL: partial(time_integral_nll, times="iid"),
        HARMONIC: partial(time_free_nll, proposal="harmonic"),
        "systematic (LLaDA's)": partial(time_free_nll, proposal="systematic"),
        "stratified (default)": time_free_nll,
    }
    x0 = source.validation(texts).repeat(repeats, 1)  # each row has masks of its own
    measured: dict[str, Row] = {name: {} for name in estimators}
    for name, estimator in estimators.items():
        for n in passes:
            nll = estimator(model, x0, mask_index=NUM_BYTES, num_samples=n, batch_size=BATCH).nll
            measured[name][n] = spread(nll.view(repeats, texts))

    results = {"ours": measured, "paper": PAPER_VARIANCE, "texts": texts, "repeats": repeats}
    title = f"Variance of the NLL in nats², {texts} windows of 128 bytes, {repeats} repeats of each"
    setting = "Ours is a network of 0.5 million parameters on 128 bytes; the paper's, LLaDA's 8 billion on HellaSwag."
    figure = draw_spreads(measured, title, "network passes")
    finish("variance", results, figure, start, spread_table(title, measured, PAPER_VARIANCE, setting))


@app.command()
def ratio() -> None:
    """Variance of log p(x) - log p(y), y being x with a word replaced, by samples. About 5 CPU minutes."""
    start = time.perf_counter()
    model, source = text_network()
    samples, texts, repeats = ((5, 10), 2, 3) if QUICK else ((5, 10, 15, 20), 8, 32)
    coupled = partial(log_likelihood_ratio, model, mask_index=NUM_BYTES, batch_size=BATCH)
    single = partial(time_free_nll, model, mask_index=NUM_BYTES, proposal="harmonic", batch_size=BATCH)
    estimators = {
        DECOUPLED: lambda x, y, n: single(y, num_samples=n, seed=1).nll - single(x, num_samples=n).nll,
        COUPLED: lambda x, y, n: coupled(x, y, num_samples=n, proposal="harmonic").log_ratio,
        "coupled stratified (default)": lambda x, y, n: coupled(x, y, num_samples=n).log_ratio,
        "the same with restrict": lambda x, y, n: coupled(x, y, num_samples=n, restrict=True).log_ratio,
    }
    x, y = (rows.repeat(repeats, 1) for rows in pairs(source.validation(500), texts))
    measured = {
        name: {n: spread(estimator(x, y, n).view(repeats, texts)) for n in samples}
        for name, estimator in estimators.items()
    }

    results = {"ours": measured, "paper": PAPER_RATIO, "texts": texts, "repeats": repeats}
    title = f"Variance of log p(x) - log p(y) in nats², {texts} pairs of 128 bytes, {repeats} repeats of each"
    setting = "Our pairs differ in one word, where shared masks gain most."
    figure = draw_spreads(measured, title, "samples, each a pass for x and one for y")
    finish("ratio", results, figure, start, spread_table(title, measured, PAPER_RATIO, setting))


@app.command()
def information() -> None:
    """How fast text loses its information as more of it is masked. About 1 CPU minute."""
    start = time.perf_counter()
    model, source = text_network()
    x0, graph = source.validation(4 if QUICK else 128), Absorbing(NUM_BYTES + 1, NUM_BYTES)
    curve = mutual_information(model, x0, graph=graph, num_samples=1 if QUICK else 4)
    OUT.mkdir(parents=True, exist_ok=True)
    curve.plot(OUT / "information.png")
    bits = [value / math.log(2) / x0.shape[1] for value in (curve.information[0], curve.information_stderr[0])]
    rows = {
        "information of the text, the integral": "{:.3f} bits per byte, standard error {:.3f}".format(*bits),
        "paper": "the identity itself: - dI / d lambda = mdce / lambda (no number)",
    }
    report("information", curve.to_dict(), start, simple_table("Mutual information of text and masked text", rows))


def fit(model: nn.Module, source: Strings, target: Tensor, *, steps: int, batch: int, lr: float) -> nn.Module:
    """Train the conditionals of the target positions [L]: only they are masked, m of them, m uniform."""
    steps = 3 if QUICK else steps
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    for step in track(range(steps), "training", console=console, transient=True, disable=not console.is_terminal):
        x0 = source.sequences(step * batch, (step + 1) * batch)
        counts, weight = sample_mask_counts(batch, int(target.sum()), seed=0, step=step)
        maskable = target.expand(batch, -1)
        xt, _ = mask_exactly(x0, counts, mask_index=MASK, maskable=maskable, seed=0, step=step)
        dce_loss(model(xt), x0, xt=xt, weight=weight, reduction="mean", num_items=batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def text_network() -> tuple[DiffusionTransformer, Text]:
    """The network of `make demo`, trained now if that has not run, and its text."""
    folder = DEMO / "text"
    if not (folder / "model.safetensors").exists():
        console.print(f"No network in {folder} yet: training it, about 5 minutes, once.")
        return train_text()
    return DiffusionTransformer.from_pretrained(folder), Text(load_documents("stdlib"), length=128)


def pairs(windows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """n windows with a word of 8 letters, and the same with that word replaced by the next one's: [n, L] each."""
    found = {}
    for x in windows:
        if word := re.search(r"\b[a-z]{8}\b", decode(x)) if x.max() < 128 else None:
            found.setdefault(word.group(), (x, slice(*word.span())))
    x, places = zip(*list(found.values())[:n], strict=True)
    y = [row.clone() for row in x]
    for i, place in enumerate(places):
        y[i - 1][places[i - 1]] = x[i][place]
    return torch.stack(x), torch.stack(y)


def spread(values: Tensor) -> dict[str, float]:
    """Variance of [repeats, texts] over repeats, averaged over texts, its standard error, and the mean."""
    square, variance = (values - values.mean(0)) ** 2, values.var(0)
    error = square.var(0) / len(values)
    return {
        "variance": variance.mean().item(),
        "stderr": error.sum().sqrt().item() / len(error),
        "mean": values.mean().item(),
    }


def agreement(estimated: Tensor, true: Tensor) -> dict[str, float]:
    error = (estimated - true).abs()
    correlation = torch.corrcoef(torch.stack([estimated, true]))[0, 1]
    return {"correlation": correlation.item(), "mean_error": error.mean().item(), "largest_error": error.max().item()}


def show_agreement(numbers: dict[str, Any]) -> str:
    return "correlation {correlation:.4f}, error {mean_error:.3f} nats, at most {largest_error:.3f}".format(**numbers)


def scatter(axes: plt.Axes, true: Tensor, estimated: Tensor, half: Tensor, label: str) -> None:
    axes.axline((true.mean().item(),) * 2, slope=1, color="0.7")
    axes.errorbar(true, estimated, yerr=half, fmt="o", markersize=3, linewidth=0.8, color="tab:red", label=label)


def draw_spreads(measured: dict[str, Row], title: str, xlabel: str) -> Figure:
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, row in measured.items():
        variances, errors = ([cell[what] for cell in row.values()] for what in ("variance", "stderr"))
        axes.errorbar(list(row), variances, yerr=errors, marker="o", capsize=3, label=name)
    axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel="variance ± standard error (nats²)")
    axes.set_title(title, fontsize="medium")
    axes.set_xticks(list(row), [str(n) for n in row], minor=False)
    axes.minorticks_off()
    axes.legend()
    return figure


def simple_table(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for row in rows.items():
        table.add_row(*row)
    return table


def spread_table(title: str, measured: dict[str, Row], paper: dict[str, dict[int, float]], setting: str) -> Table:
    """A line for each number of passes; below, the variances of the paper's two estimators as a ratio."""
    first, second = paper
    table = Table("", *measured, *(f"paper's {name}" for name in paper), title=title, title_justify="left")
    for n in measured[first]:
        table.add_row(
            str(n),
            *(show_variance(**row[n]) for row in measured.values()),
            *(f"{row.get(n, '')}" for row in paper.values()),
        )
    ratios = [measured[first][n]["variance"] / measured[second][n]["variance"] for n in measured[first]]
    published = [paper[first][n] / paper[second][n] for n in paper[first]]
    table.caption_justify = "left"
    table.caption = (
        f"{setting} ± is a standard error.\nVariance of {first} / variance of {second}: "
        f"ours {min(ratios):.2g} to {max(ratios):.2g}, the paper's {min(published):.2g} to {max(published):.2g}"
    )
    return table


def show_variance(variance: float, stderr: float, **others: float) -> str:
    number = f"{variance:,.0f}" if variance >= 100 else f"{variance:.3g}"
    return f"{number} ±{stderr / variance:.0%}"


def finish(name: str, results: dict[str, Any], figure: Figure, start: float, table: Table) -> None:
    """Print the table and write both files, whole or not at all."""
    OUT.mkdir(parents=True, exist_ok=True)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    write_atomically(OUT / f"{name}.png", picture.getvalue())
    report(name, results, start, table)


def report(name: str, results: dict[str, Any], start: float, table: Table) -> None:
    seconds, threads = time.perf_counter() - start, torch.get_num_threads()
    results |= {"seconds": seconds, "threads": threads}
    write_atomically(OUT / f"{name}.json", json.dumps(results, indent=1).encode())
    console.print(table)
    console.print(f"{seconds:.0f} s on {threads} threads. Picture: {OUT}/{name}.png\nNumbers: {OUT}/{name}.json")


if __name__ == "__main__":
    app()
