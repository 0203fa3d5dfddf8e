"""A training step's last layer and loss, from hidden states: each codebase's own, rows picked by hand, and fastdiff's.

[2, 256] tokens, half of them masked, x 256 x 126464; on a GPU [8, 1024] x 4096 x 126464. The floor multiplies the
scored rows, once forward and twice backward, reads the weights for two of these products and writes their gradient.
"""

import importlib
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, both_ways
from standins import Network, problem

GPU = DEVICE.type == "cuda"
SHAPE, WIDTH, DTYPE = ((8, 1024), 4096, torch.bfloat16) if GPU else ((2, 256), 256, torch.float32)
NUM_STATES = 126464
ROUNDS = 7 if GPU else 3  # of seconds each
CODEBASES = sorted(p.stem for p in (Path(__file__).parent / "standins").glob("[!_]*.py"))


@pytest.fixture(autouse=True)
def _on_the_device():
    with torch.device(DEVICE):
        yield


def score_entropy(z, x0):
    """As SEDD has it for masked rows, but for what does not depend on z."""
    return (z[:, :-1].exp().sum(-1) - z.gather(-1, x0[:, None]).squeeze(-1)).mean()


@pytest.mark.parametrize("codebase", CODEBASES)
def test_last_layer_and_loss(compare, codebase):
    p = problem(*SHAPE, NUM_STATES, noise=0.5)
    network = Network(p, WIDTH, dtype=DTYPE)
    hidden, weight = leaves = network.hidden, network.lm_head.weight
    name, (published, ours) = next(iter(importlib.import_module(f"standins.{codebase}").cases(p).items()))
    both_ways(lambda: ours(network).sum(), *leaves)
    scored = hidden.grad.any(-1)
    x0, formula = p.x0.repeat(1, 2)[scored], score_entropy if codebase == "sedd" else F.cross_entropy

    def floor(machine):
        products = 6 * len(x0) * WIDTH * NUM_STATES / (machine.matmul_bf16 if GPU else machine.matmul)
        return (products + weight.nbytes * (2 / machine.read + 1 / machine.fresh_fill)) / 1e9

    calls = {"fastdiff": lambda: ours(network).sum(), "published": lambda: published(network).sum()}
    if len(x0) < p.x0.numel():
        calls["rows by hand"] = lambda: formula(F.linear(hidden[scored], weight), x0)
    calls = {who: partial(both_ways, call, *leaves) for who, call in calls.items()}
    compare(f"{codebase}: {name}", calls, floor, ROUNDS)
