"""Every loss of every codebase: its value and gradient are the published ones, evaluated in float64."""

import importlib
from pathlib import Path

import pytest
import torch
from cases import assert_near
from standins import problem

CODEBASES = sorted(p.stem for p in (Path(__file__).parents[2] / "benchmarks/standins").glob("[!_]*.py"))


def loss_and_grad(loss_of, z):
    leaf = z.detach().requires_grad_()
    loss = loss_of(leaf)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("codebase", CODEBASES)
def test_losses_are_the_published_ones(codebase):
    for shape in ((3, 17, 33), (2, 5, 1031)):
        p = problem(*shape)
        z = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for name, (published, ours) in importlib.import_module(f"standins.{codebase}").cases(p).items():
            expected, expected_grad = loss_and_grad(published, z)
            loss, grad = loss_and_grad(ours, z)
            torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-9, atol=1e-12, msg=name)
            torch.testing.assert_close(grad, expected_grad, rtol=1e-7, atol=1e-12, msg=name)
            for dtype in (torch.float32, torch.bfloat16):
                rounded = z.to(dtype)
                expected, expected_grad = loss_and_grad(published, rounded.double())
                loss, grad = loss_and_grad(ours, rounded)
                assert_near(loss.float(), expected.float(), torch.float32, name)
                assert_near(grad, expected_grad.to(dtype), dtype, name)
