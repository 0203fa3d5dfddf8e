"""Variance and coverage of `block_nll` against that of `time_free_nll`, on distributions whose likelihood is known.

`python benchmarks/block_estimators.py --passes 64 --repeats 200`; some five minutes on two cores.
"""

import argparse

from estimators import EXACT, cases
from oracles import Blocks
from rich.console import Console
from rich.table import Table

from fastdiff import block_nll, time_free_nll

BLOCKS = (32, 16, 8)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--passes", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=200)
    options = parser.parse_args()
    table = Table(
        title=f"Variance (nats^2) at {options.passes} passes; of the default the coverage of 95% intervals too"
    )
    for column in ("", "whole", *(f"{what}{b}" for b in BLOCKS for what in ("blocks of ", "systematic, "))):
        table.add_column(column, justify="right")
    for name, oracle, strings in cases():
        x = strings[:1].expand(options.repeats, -1)
        truth, shown = oracle.nll(x), []
        for block_length in (None, *BLOCKS):
            if block_length is not None and block_length >= x.shape[1]:
                shown += [""] * 2
                continue
            for proposal in ("stratified",) if block_length is None else ("stratified", "systematic"):
                names = dict(mask_index=oracle.mask_index, num_samples=options.passes, proposal=proposal)
                if block_length is None:
                    found = time_free_nll(oracle, x, **names)
                else:
                    found = block_nll(Blocks(oracle, block_length), x, block_length=block_length, **names)
                low, high = found.interval()
                held = ((low - 1e-9 <= truth) & (truth <= high + 1e-9)).double().mean().item()
                variance = found.nll.var().item()
                cell = "exact" if variance < EXACT else f"{variance:.3g}"
                shown.append(f"{cell} ({held:.0%})" if proposal == "stratified" and cell != "exact" else cell)
        table.add_row(name, *shown)
    Console(width=170).print(table)


if __name__ == "__main__":
    main()
