"""Likelihoods of 128 strings whose probabilities are known: the DNA toy, over every subset of masks and over few."""

import torch

from fastdiff import exact_nll, time_free_nll
from fastdiff.data import Table as Strings

from ..dna import Conditionals, dna_strings
from .report import Setup, Table, reporting
from .toys import MASK, agreement, fit, picture, shown

MINUTES = 2
PASSES = 64


def run(setup: Setup) -> None:
    """True and estimated NLL of 128 DNA strings of 8 letters."""
    with reporting("dna", setup) as report:
        strings, p = dna_strings()
        source, everywhere = Strings(strings, num_tokens=MASK, probs=p), torch.ones(8, dtype=torch.bool)
        torch.manual_seed(0)
        model = fit(Conditionals(), source, everywhere, steps=4 if setup.quick else 4000, batch=512, lr=2e-3)
        true, exact = -p.log(), exact_nll(model, strings, mask_index=MASK).nll
        estimate = time_free_nll(model, strings, mask_index=MASK, num_samples=PASSES)
        low, high = estimate.interval()
        held = ((low <= exact) & (exact <= high)).double().mean().item()
        compared = {
            "every subset against the truth": agreement(exact, true),
            f"{PASSES} passes against the truth": agreement(estimate.nll, true),
            f"{PASSES} passes against every subset": agreement(estimate.nll, exact),
        }
        report.numbers = {"agreement": compared, "intervals_that_hold_exact": held, "true": true.tolist()}
        report.numbers |= {"exact": exact.tolist(), "estimate": estimate.to_dict()}
        notes = [
            f"95% intervals that hold the value over every subset: {held:.0%}.",
            "A network of three layers, not a transformer. The paper shows a figure, of true and estimated NLL that "
            "match, and no number.",
        ]
        head = ["NLL of a string, nats", "correlation", "mean error", "largest error"]
        rows = [[name, *shown(numbers)] for name, numbers in compared.items()]
        report.tables = [Table("128 DNA strings", head, rows, notes)]
        report.figure = picture(true, estimate, "128 DNA strings", exact)
