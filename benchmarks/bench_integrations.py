"""A training step's loss and its gradient, from logits: each codebase's own against fastdiff's."""

import importlib
from pathlib import Path

import pytest
import torch
from measure import DEVICE
from standins import problem

BATCH, LENGTH, NUM_STATES = (16, 512, 50257) if DEVICE.type == "cuda" else (4, 128, 50257)
CODEBASES = sorted(p.stem for p in (Path(__file__).parent / "standins").glob("[!_]*.py"))
CASES = [
    (codebase, name)
    for codebase in CODEBASES
    for name in importlib.import_module(f"standins.{codebase}").cases(problem(1, 4, 9))
]


@pytest.fixture(autouse=True)
def _on_the_device():
    with torch.device(DEVICE):
        yield


@pytest.mark.parametrize(("codebase", "name"), CASES)
def test_loss_and_gradient(compare, codebase, name):
    p = problem(BATCH, LENGTH, NUM_STATES)
    published, ours = importlib.import_module(f"standins.{codebase}").cases(p)[name]
    z = torch.randn(BATCH, LENGTH, NUM_STATES).requires_grad_()

    def step(loss_of):
        z.grad = None
        loss_of(z).backward()

    def floor(machine):
        return z.numel() * z.element_size() * (1 / machine.read + 1 / machine.fresh_fill) / 1e9

    calls = {"fastdiff": lambda: step(ours), "published": lambda: step(published)}
    compare(f"{codebase}: {name}", calls, floor)
