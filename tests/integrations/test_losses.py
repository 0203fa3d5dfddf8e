"""Every loss of every codebase, over a network's last layer: its value and gradients are the published ones."""

import importlib
from pathlib import Path

import pytest
import torch
import torchrun
from standins import Network, problem

CODEBASES = sorted(p.stem for p in (Path(__file__).parents[2] / "benchmarks/standins").glob("[!_]*.py"))
# The type of parameters, whether the forward pass is under autocast to bfloat16, and the error that is allowed where
# twice the published code's own is less, relative to the largest number of a result.
PRECISIONS = [
    (torch.float64, False, 1e-10),
    (torch.float32, False, 2**-21),
    (torch.bfloat16, False, 2**-7),
    (torch.float32, True, 2**-7),
]


def loss_and_grads(loss_of, network, dtype, autocast=False):
    network.to(dtype).zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(network).sum()
    loss.backward()
    grads = {name: torch.zeros(()) if p.grad is None else p.grad for name, p in network.named_parameters()}
    return {name: result.detach().double() for name, result in dict(loss=loss, **grads).items()}


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("codebase", CODEBASES)
def test_losses_are_the_published_ones(codebase, bias):
    p = problem(*((3, 17, 33) if bias else (2, 5, 1031)))
    for name, (published, ours) in importlib.import_module(f"standins.{codebase}").cases(p).items():
        torch.manual_seed(1)
        network = Network(p, 8, bias=bias, dtype=torch.float64)
        for dtype, autocast, rounding in PRECISIONS:
            network.to(dtype)  # numbers that float64 has, too
            exact = loss_and_grads(published, network, torch.float64)
            theirs, got = (loss_and_grads(loss_of, network, dtype, autocast) for loss_of in (published, ours))
            for part, expected in exact.items():
                error, allowed = ((result[part] - expected).abs().max() for result in (got, theirs))
                allowed = max(2 * allowed, rounding * expected.abs().max())
                assert error <= allowed, f"{name}, {dtype}: error of {part} {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.slow
def test_two_ranks_have_the_gradients_of_one():
    torchrun.launch(Path(__file__).with_name("loss_ranks.py"), 2, "ddp", "fsdp2")
