"""Variances of estimators over repeats: how they are measured, and how they stand beside a paper's."""

from collections.abc import Callable, Sequence
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor

from fastdiff.loading import Loaded

from .report import Table, console

Estimator = Callable[[int], Tensor]  # passes -> [repeats, texts], in nats
Rows = dict[str, dict[int, dict[str, float]]]  # by estimator and by number of passes, what `spread` gives
Published = dict[str, dict[int, float]]  # variances, likewise


def of_masks(model: Loaded, x0: Tensor, repeats: int) -> tuple[Tensor, dict[str, Any]]:
    """Sequences [repeats * n, L], behind what the model has in front of all, and options of their likelihood."""
    if model.name_of("time-free") != "time-free":
        raise SystemExit("model: expected one of masks, without blocks, for the estimators are of its likelihood")
    front = torch.tensor(model.front, dtype=torch.int64).expand(len(x0), -1)
    x0 = torch.cat([front, x0], 1).repeat(repeats, 1)
    target = torch.arange(x0.shape[1]).expand(x0.shape) >= len(model.front)
    options = dict(mask_index=model.graph.mask_index, exclude_mask=model.exclude_mask, target=target)
    return x0, options | dict(batch_size=32)  # of more rows in a pass, activations leave the cache


def measure(estimators: dict[str, Estimator], passes: Sequence[int]) -> Rows:
    """The spread of every estimator at every number of passes."""
    cells = [(name, n) for name in estimators for n in passes]
    rows: Rows = {name: {} for name in estimators}
    with torch.autocast("cpu", torch.bfloat16):
        for name, n in track(cells, "estimating", console=console, disable=not console.is_terminal):
            rows[name][n] = spread(estimators[name](n))
    return rows


def spread(values: Tensor) -> dict[str, float]:
    """Variance of [repeats, texts] over repeats, averaged over texts, its standard error, and the mean."""
    square, variance = (values - values.mean(0)) ** 2, values.var(0)
    error = square.var(0) / len(values)
    return {
        "variance": variance.mean().item(),
        "stderr": error.sum().sqrt().item() / len(error),
        "mean": values.mean().item(),
    }


def table(title: str, what: str, rows: Rows, paper: Published, setting: str) -> Table:
    """A line for each number of passes; below, the variances of the paper's two estimators as a ratio."""
    first, second = paper
    passes = list(rows[first])
    lines = [
        [str(n), *(cell(**row[n]) for row in rows.values()), *(str(row.get(n, "")) for row in paper.values())]
        for n in passes
    ]
    ours = [rows[first][n]["variance"] / rows[second][n]["variance"] for n in passes]
    published = [paper[first][n] / paper[second][n] for n in paper[first]]
    notes = [
        f"{setting} ± is a standard error.",
        f"Variance of {first} / variance of {second}: ours {min(ours):.2g} to {max(ours):.2g}, "
        f"the paper's {min(published):.2g} to {max(published):.2g}.",
    ]
    return Table(title, [what, *rows, *(f"paper, {name}" for name in paper)], lines, notes)


def cell(variance: float, stderr: float, mean: float) -> str:
    number = f"{variance:,.0f}" if variance >= 100 else f"{variance:.3g}"
    return f"{number} ± {stderr / variance:.0%}"


def picture(title: str, what: str, rows: Rows) -> Figure:
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    for name, row in rows.items():
        variances, errors = ([cell[what] for cell in row.values()] for what in ("variance", "stderr"))
        axes.errorbar(list(row), variances, yerr=errors, marker="o", capsize=3, label=name)
    axes.set(xscale="log", yscale="log", xlabel=what, ylabel="variance ± standard error (nats²)")
    axes.set_title(title, fontsize="medium")
    axes.set_xticks(list(row), [str(n) for n in row], minor=False)
    axes.minorticks_off()
    axes.legend()
    return figure
