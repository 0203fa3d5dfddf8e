"""Likelihoods and their gradients as policy gradients take them: bias and variance of each estimator at equal passes.

`python benchmarks/policy_estimators.py FILE.json`; some five minutes on one core. The gradient on an oracle is that by
an addition to the logits of every position, [L, V]; on the network, which is trained first, that by all parameters.
"""

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

sys.path[:0] = [str(Path(__file__).parent.parent / folder) for folder in ("tests", "examples")]
from oracles import dna_toy, markov_chain, mixture  # noqa: E402

from fastdiff import one_pass_nll, time_free_nll, upper_bound_nll  # noqa: E402
from fastdiff.data import NUM_BYTES, Text, load_documents  # noqa: E402
from fastdiff.model import DiffusionTransformer, ModelConfig  # noqa: E402
from fastdiff.training import TrainConfig, train  # noqa: E402

PASSES, NETWORK_LENGTH = (8, 16, 64), 128
UNBIASED = ("stratified", "systematic", "complementary", "uniform")
RIVALS = ("systematic", "complementary")
ESTIMATORS = {proposal: partial(time_free_nll, proposal=proposal) for proposal in UNBIASED}
ESTIMATORS |= {"one pass": one_pass_nll, "upper bound": upper_bound_nll}  # there is no prompt to mask
QUANTITIES = ("value", "gradient")
EXACT = 1e-20  # variance of what differs by rounding alone


def oracle_cases():
    """Names, oracles and strings [1, L]."""
    chain = markov_chain(8)
    for length in (32, 64):
        yield f"Markov chain, L = {length}", chain, chain.sample(1, length, seed=length)
    for length in (24, 48):
        oracle = mixture(length, 6, components=4)
        yield f"mixture of 4, L = {length}", oracle, oracle.sample(1, length, seed=length)
    oracle, strings = dna_toy()
    yield "DNA toy, L = 8", oracle, strings[:1]


def on_oracle(oracle, x, repeats):
    """A function of an estimator and its passes: values [repeats, 1] and gradients [repeats, L V].

    A token before the string, no target, is the number of the repeat, which has an addition to the logits of its own.
    """
    numbers = torch.arange(repeats).unsqueeze(1)
    x0 = torch.cat([numbers, x.expand(repeats, -1)], 1)
    target = torch.ones_like(x0, dtype=torch.bool).index_fill(1, torch.tensor(0), False)

    def run(estimator, passes):
        added = torch.zeros(repeats, x.shape[1], oracle.mask_index + 1, dtype=torch.float64, requires_grad=True)

        def model(xt):
            logits = oracle(xt[:, 1:]) + added[xt[:, 0]]
            return torch.cat([logits[:, :1], logits], 1)

        options = dict(mask_index=oracle.mask_index, target=target, num_samples=passes, differentiable=True)
        nll = estimator(model, x0, **options).nll
        return nll.detach().unsqueeze(1), torch.autograd.grad(nll.sum(), added)[0].flatten(1)

    return run


def on_network(model, x, repeats):
    """As `on_oracle`, by all parameters; gradients in float32, for there are many."""

    def run(estimator, passes):
        values, gradients = [], []
        for seed in range(repeats):
            options = dict(mask_index=NUM_BYTES, num_samples=passes, seed=seed, differentiable=True)
            nll = estimator(model, x, **options).nll
            values.append(nll.detach())
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(nll.sum(), model.parameters())]))
        return torch.stack(values), torch.stack(gradients)

    return run


def trained_network():
    """At the size of the demo's, after 600 steps on the standard library's text; and two windows it has not seen."""
    torch.manual_seed(0)
    source = Text(load_documents("stdlib"), length=NETWORK_LENGTH)
    model = DiffusionTransformer(ModelConfig(NUM_BYTES + 1, max_length=NETWORK_LENGTH, dim=128, depth=2, heads=4))
    config = TrainConfig("dce-k", steps=600, batch_size=16, lr=3e-3, warmup=50, eval_every=0)
    return train(config, model, source).eval().requires_grad_(), source.validation(2)


def measure(run, passes, value):
    """Variance E|x - E x|^2, bias and size |E x| of values and gradients, by estimator.

    Bias is against the truth, or the mean of the unbiased estimator that varies least; 0 where that is within four
    standard errors of it.
    """
    samples = {name: run(estimator, passes) for name, estimator in ESTIMATORS.items()}
    found = {name: {} for name in samples}
    for which, quantity in enumerate(QUANTITIES):
        mean = {name: both[which].mean(0).double() for name, both in samples.items()}
        variance = {name: both[which].var(0).sum().item() for name, both in samples.items()}
        best = min(UNBIASED, key=variance.get)
        repeats = len(samples[best][which])
        truth, spread = (mean[best], variance[best]) if value is None or quantity == "gradient" else (value, 0.0)
        for name in samples:
            off = mean[name] - truth
            bias = off.norm().item() * (math.copysign(1, off.item()) if quantity == "value" else 1)
            seen = bias**2 > 16 * (variance[name] + spread) / repeats + EXACT
            found[name][quantity] = {
                "variance": variance[name],
                "bias": bias if seen else 0.0,
                "size": truth.norm().item(),
            }
    return found


def shown(cell):
    """Variance, and the bias of what has one."""
    variance = f"{cell['variance']:.3g}" if cell["variance"] > EXACT else "0"
    return variance + (f" (bias {cell['bias']:.3g})" if cell["bias"] else "")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--repeats", type=int, default=100, help="on an oracle; the network takes a fifth of them")
    options = parser.parse_args()
    cases = [(name, on_oracle(o, x, options.repeats), o.nll(x)) for name, o, x in oracle_cases()]
    model, windows = trained_network()
    few = options.repeats // 5
    cases += [(f"network, window {i}", on_network(model, x, few), None) for i, x in enumerate(windows.split(1), 1)]
    rows, means = [], []
    for passes in PASSES:
        tables = {
            quantity: Table(title=f"Variance and bias of the {quantity} at {passes} passes") for quantity in QUANTITIES
        }
        for table in tables.values():
            for column in ("", "size", *ESTIMATORS):
                table.add_column(column, justify="right")
        logs = {(quantity, rival): [] for quantity in QUANTITIES for rival in RIVALS}
        for name, run, value in cases:
            found = measure(run, passes, value)
            rows.append({"case": name, "passes": passes, **found})
            for quantity, table in tables.items():
                cells = {who: by_quantity[quantity] for who, by_quantity in found.items()}
                table.add_row(name, f"{cells['stratified']['size']:.3g}", *map(shown, cells.values()))
                ours = cells["stratified"]["variance"]
                for rival in RIVALS if ours > EXACT else ():
                    logs[quantity, rival].append(math.log(cells[rival]["variance"] / ours))
        for quantity, table in tables.items():
            Console(width=160).print(table)
            ratios = {rival: math.exp(sum(logs[quantity, rival]) / len(logs[quantity, rival])) for rival in RIVALS}
            means.append({"passes": passes, "quantity": quantity, **ratios})
            print("geometric means to stratified:", ", ".join(f"{who} {ratio:.1f}" for who, ratio in ratios.items()))
    record = {"repeats": options.repeats, "torch": torch.__version__, "rows": rows, "geometric_means": means}
    options.file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
