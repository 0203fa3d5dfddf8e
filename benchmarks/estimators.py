"""Variance and coverage of the likelihood estimators on distributions whose likelihood is known, at equal passes.

`python benchmarks/estimators.py FILE.json --passes 64 --repeats 200`; some ten minutes on two cores. With `--others`
distributions of more kinds.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("tests", "examples")]
from oracles import dna_toy, markov_chain, mixture, order_markov, skewed_chain  # noqa: E402

from fastdiff import time_free_nll  # noqa: E402

PROPOSALS = ("harmonic", "uniform", "systematic", "stratified")
EXACT = 1e-20  # variance of what differs by rounding alone


def cases():
    """Names, oracles and strings [n, L]."""
    chain = markov_chain(8)
    for length in (16, 32, 64, 128):
        yield f"Markov chain, L = {length}", chain, chain.sample(2, length, seed=length)
    for length in (24, 48, 96):
        oracle = mixture(length, 6, components=4)
        yield f"mixture of 4, L = {length}", oracle, oracle.sample(2, length, seed=length)
    oracle, strings = dna_toy()
    yield "DNA toy, L = 8", oracle, strings[:2]


def others():
    for seed, length, letters, sharpness in ((11, 40, 6, 1.0), (12, 56, 16, 2.5), (13, 20, 4, 3.0)):
        oracle = markov_chain(letters, seed=seed, sharpness=sharpness)
        yield f"Markov chain, {letters} letters, L = {length}", oracle, oracle.sample(2, length, seed=length + 1)
    for seed, length, components in ((11, 32, 3), (12, 64, 6)):
        oracle = mixture(length, 9, components=components, seed=seed)
        yield f"mixture of {components}, L = {length}", oracle, oracle.sample(2, length, seed=length + 1)
    for order, seed in ((2, 11), (4, 12)):
        oracle = order_markov(order, seed=seed)
        yield f"chain of order {order}, L = 36", oracle, oracle.sample(2, 36, seed=5)
    oracle = skewed_chain()
    yield "chain that seldom changes, L = 30", oracle, oracle.sample(2, 30, seed=3)


def measure(oracle, x, passes, repeats):
    """Variance, and the share of 95% intervals that hold the truth, by proposal.

    Of the default also how often a tolerance is reached, and in how many passes, where it is the half-width of the
    median interval at the given passes and the pilot has a quarter of these.
    """
    found = {}
    for proposal in PROPOSALS:
        estimate = time_free_nll(
            oracle, x.expand(repeats, -1), mask_index=oracle.mask_index, num_samples=passes, proposal=proposal
        )
        truth, (low, high) = oracle.nll(x), estimate.interval()
        held = (low - 1e-9 <= truth) & (truth <= high + 1e-9)
        found[proposal] = {"variance": estimate.nll.var().item(), "coverage": held.double().mean().item()}
    tolerance = ((high - low) / 2).median().item()
    if found["stratified"]["variance"] > EXACT:
        estimate = time_free_nll(
            oracle,
            x.expand(repeats, -1),
            mask_index=oracle.mask_index,
            num_samples=max(16, passes // 4),
            tolerance=tolerance,
            seed=1,
        )
        low, high = estimate.interval()
        found["stratified"]["reached"] = ((high - low) / 2 <= tolerance).double().mean().item()
        found["stratified"]["passes"] = estimate.num_forwards.double().mean().item()
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--passes", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--others", action="store_true")
    options = parser.parse_args()
    table = Table(title=f"Variance (nats^2) at {options.passes} passes, and coverage of the 95% interval")
    ratios_to = ("harmonic / stratified", "systematic / stratified")
    for column in ("", *PROPOSALS, *ratios_to, "coverage", "tolerance reached", "passes for it"):
        table.add_column(column, justify="right")
    rows, logs = [], {"harmonic": [], "systematic": []}
    for name, oracle, strings in others() if options.others else cases():
        for x in strings.unsqueeze(1):
            found = measure(oracle, x, options.passes, options.repeats)
            rows.append({"case": name, **found})
            variance = {proposal: result["variance"] for proposal, result in found.items()}
            exact = variance["stratified"] < EXACT
            ratios = {who: variance[who] / variance["stratified"] for who in logs}
            for who, ratio in ratios.items():
                if not exact:
                    logs[who].append(math.log(ratio))
            shown = ["exact" if v < EXACT else f"{v:.3g}" for v in variance.values()]
            shown += ["" if exact else f"{ratio:.1f}" for ratio in ratios.values()]
            default = found["stratified"]
            shown.append(f"{default['coverage']:.1%}")
            shown += [] if exact else [f"{default['reached']:.1%}", f"{default['passes']:.0f}"]
            table.add_row(name, *shown)
    means = {who: math.exp(sum(values) / len(values)) for who, values in logs.items()}
    Console(width=170).print(table)
    least = {who: math.exp(min(values)) for who, values in logs.items()}
    shown = (f"{who} {mean:.2f} (least {least[who]:.2f})" for who, mean in means.items())
    print("geometric means where it is not exact:", ", ".join(shown))
    record = {"passes": options.passes, "repeats": options.repeats, "torch": torch.__version__, "rows": rows}
    options.file.write_text(json.dumps(record | {"geometric_means": means}, indent=1) + "\n")


if __name__ == "__main__":
    main()
