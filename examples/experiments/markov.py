"""Conditional likelihoods whose truth is known: 16 letters of an order-4 Markov chain given the 16 before them."""

import torch

from fastdiff.data import Table as Strings
from fastdiff.estimators import conditional_nll
from fastdiff.model import DiffusionTransformer, ModelConfig

from ..dna import markov_nll, markov_strings, markov_transition
from .report import Setup, Table, reporting
from .toys import MASK, agreement, fit, picture, shown

MINUTES = 3
HALF, PASSES = 16, 64


def run(setup: Setup) -> None:
    """Exact and estimated NLL of 16 letters of an order-4 Markov chain given the 16 before."""
    with reporting("markov", setup) as report:
        transition = markov_transition()
        strings = markov_strings(transition, 2000 if setup.quick else 200_000, 2 * HALF, seed=1)
        held_out = markov_strings(transition, 8 if setup.quick else 128, 2 * HALF, seed=2)
        target = torch.arange(2 * HALF) >= HALF
        torch.manual_seed(0)
        network = DiffusionTransformer(ModelConfig(MASK + 1, max_length=2 * HALF, dim=64, depth=2, heads=4))
        source, steps = Strings(strings, num_tokens=MASK), 4 if setup.quick else 6000
        model = fit(network, source, target, steps=steps, batch=64, lr=3e-3)
        exact = markov_nll(transition, held_out, HALF)
        prompt, response = held_out.split(HALF, 1)
        estimate = conditional_nll(model, prompt, response, mask_index=MASK, num_samples=PASSES)
        numbers = agreement(estimate.nll, exact)
        report.numbers = {"agreement": numbers, "exact": exact.tolist(), "estimate": estimate.to_dict()}
        notes = [
            f"Mean NLL: exact {exact.mean():.3f} nats, estimated {estimate.nll.mean():.3f}; the standard error of one "
            f"estimate, of masks alone, is {estimate.stderr.mean():.3f} on average.",
            "The paper shows a figure, of true and estimated NLL that match, and no number.",
        ]
        head = ["NLL of a response, nats", "correlation", "mean error", "largest error"]
        rows = [[f"{PASSES} passes against the truth", *shown(numbers)]]
        report.tables = [Table("Order-4 Markov chain", head, rows, notes)]
        report.figure = picture(exact, estimate, "16 letters given 16, order-4 Markov chain")
