"""Coverage of 95% intervals over batches of strings, each sequence's own and `moderated()`.

`python benchmarks/moderated.py --passes 64`; half a minute on one core.
"""

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("tests", "examples")]
from oracles import markov_chain, mixture, order_markov, skewed_chain  # noqa: E402

from fastdiff import time_free_nll  # noqa: E402

CASES = {
    "Markov chain, L = 32": (markov_chain(8), 32),
    "mixture of 4, L = 24": (mixture(24, 6, components=4), 24),
    "mixture of 4, L = 48": (mixture(48, 6, components=4), 48),
    "mixture of 4, L = 96": (mixture(96, 6, components=4), 96),
    "mixture of 6, L = 64": (mixture(64, 9, components=6, seed=12), 64),
    "chain of order 2, L = 36": (order_markov(2, seed=11), 36),
    "chain that seldom changes, L = 30": (skewed_chain(), 30),
}


def held(oracle, x, passes, repeats):
    """The shares of intervals that hold the truth, own and moderated."""
    truth, shares = oracle.nll(x), torch.zeros(2, dtype=torch.float64)
    for seed in range(repeats):
        own = time_free_nll(oracle, x, mask_index=oracle.mask_index, num_samples=passes, seed=seed)
        for i, estimate in enumerate((own, own.moderated())):
            low, high = estimate.interval()
            shares[i] += ((low <= truth) & (truth <= high)).double().mean() / repeats
    return shares.tolist()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=64)
    parser.add_argument("--strings", type=int, default=32, help="in a batch")
    parser.add_argument("--repeats", type=int, default=12, help="estimates of each string")
    options = parser.parse_args()
    table = Table(title=f"Coverage of 95% intervals at {options.passes} passes, {options.strings} strings")
    for column in ("", "own", "moderated"):
        table.add_column(column, justify="right")
    for name, (oracle, length) in CASES.items():
        x = oracle.sample(options.strings, length, seed=77)
        table.add_row(name, *(f"{share:.1%}" for share in held(oracle, x, options.passes, options.repeats)))
    Console().print(table)


if __name__ == "__main__":
    main()
