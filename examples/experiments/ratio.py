"""How much an estimate of a likelihood ratio varies with shared masks and without, beside the paper's table 1b."""

import torch
from torch import Tensor

from fastdiff import time_free_nll
from fastdiff.estimators import log_likelihood_ratio

from .networks import subject, unseen
from .report import Setup, reporting
from .spreads import Published, measure, of_masks, picture, table

MINUTES = 4
SPAN = 8  # tokens in the middle in which the two of a pair differ
COUPLED, DECOUPLED = "coupled harmonic", "decoupled harmonic"
PAPER: Published = {
    DECOUPLED: {5: 62469, 10: 29107, 15: 20696, 20: 16515},
    COUPLED: {5: 8897, 10: 4487, 15: 3060, 20: 2335},
}


def run(setup: Setup) -> None:
    """Variance of log p(x) - log p(y), y being x with some tokens replaced, by samples."""
    samples, texts, repeats = ((5, 10), 2, 2) if setup.quick else ((5, 10, 15, 20), 8, 32)
    model = subject(setup)
    windows = unseen(setup, model, texts)
    x, options = of_masks(model, windows, repeats)
    y, _ = of_masks(model, replaced(windows), repeats)

    def decoupled(n: int) -> Tensor:
        options_of = dict(num_samples=n, proposal="harmonic", **options)
        of_x, of_y = (
            time_free_nll(model.conditionals, z, seed=seed, **options_of).nll for seed, z in enumerate((x, y))
        )
        return (of_y - of_x).view(repeats, -1)

    def coupled(n: int, proposal: str = "stratified", restrict: bool = False) -> Tensor:
        draws = dict(num_samples=n, proposal=proposal, restrict=restrict)
        return log_likelihood_ratio(model.conditionals, x, y, **draws, **options).log_ratio.view(repeats, -1)

    with reporting("ratio", setup) as report:
        measured = measure(
            {
                DECOUPLED: decoupled,
                COUPLED: lambda n: coupled(n, "harmonic"),
                "coupled stratified (default)": coupled,
                "the same with restrict": lambda n: coupled(n, restrict=True),
            },
            samples,
        )
        title = f"Variance of log p(x) - log p(y) in nats²: {len(windows)} pairs, {repeats} repeats of each"
        setting = f"Our pairs are of {windows.shape[1]} tokens and differ in {SPAN}; the paper's, of LLaDA, are others."
        report.numbers = {"ours": measured, "paper": PAPER, "texts": len(windows), "repeats": repeats}
        report.tables = [table(title, "samples", measured, PAPER, setting)]
        report.figure = picture(title, "samples, each a pass for x and one for y", measured)


def replaced(windows: Tensor) -> Tensor:
    """The same [n, L], with the tokens in the middle those of the next window."""
    middle = torch.arange(windows.shape[1]) - windows.shape[1] // 2
    return windows.where((middle < 0) | (middle >= SPAN), windows.roll(-1, 0))
