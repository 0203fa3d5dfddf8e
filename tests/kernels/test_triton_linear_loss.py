"""The linear losses with Triton's row kernels, which write the gradient in the place of the logits."""

import pytest
import torch
from cases import LOSSES, assert_near, linear_problem, loss_and_grads, loss_of

import fastdiff.kernels.linear_loss as kernels
import fastdiff.ops.linear_loss as op

LEAVES = ("hidden", "lm_head", "bias")
LOW = {"cpu": torch.float16, "cuda": torch.bfloat16}  # the interpreter multiplies the bits of bfloat16 as integers


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_agrees_with_the_reference(name, reduction, device, monkeypatch):
    monkeypatch.setitem(op.TILE_BYTES, device.type, 3 * 4 * 1031)
    for num_states in (2, 1031):
        p = linear_problem((3, 3), num_states, device=device)
        for capacity in (None, 9):
            got = loss_and_grads(name, p, *LEAVES, reduction=reduction, capacity=capacity, backend="triton")
            expected = loss_and_grads(name, p, *LEAVES, reduction=reduction, backend="reference")
            for a, b in zip(got, expected, strict=True):
                assert_near(a, b, torch.float32, name, slack=4)


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_in_the_place_of_its_row(name, device):
    """In 16 bits, where rounding would show a number that was read after it had been written."""
    for dtype in (torch.bfloat16, torch.float16):
        p = linear_problem((2, 3), 5003, dtype, device=device)
        got = loss_and_grads(name, p, *LEAVES, reduction="sum", backend="triton")
        expected = loss_and_grads(name, p, *LEAVES, reduction="sum", backend="reference")
        for a, b in zip(got, expected, strict=True):
            assert_near(a, b, dtype, name, slack=8)


@pytest.mark.parametrize("name", ["dce", "dce_z", "absorb", "absorb_scaled", "uniform", "uniform_scaled"])
def test_parts_of_a_row(name, device):
    """What one rank of several sees: its losses and gradients are those of the compiled CPU kernels."""
    functor = {"dce": "dce", "absorb": "dse_absorb", "uniform": "dse_uniform"}[name.partition("_")[0]]
    x0 = torch.tensor([0, 6, -1, -1, -1, 3])
    xt = torch.tensor([0, 2, -1, -2, 4, -2]) if functor == "dse_uniform" else None
    for num_states in (7, 1031):
        z = torch.randn(6, num_states, generator=torch.Generator().manual_seed(0))
        z[2] = -torch.inf  # a part without weight
        sigma = None if functor == "dce" else torch.linspace(0.1, 2, 6, dtype=torch.float64)
        weight = torch.linspace(0.5, 1, 6, dtype=torch.float64)
        constants = [functor, 5, functor != "dse_uniform", -100, name.endswith("scaled"), 0.1 * name.endswith("z")]
        results = []
        for backend, where in (("triton", device), ("cpu", "cpu")):
            tensors = [None if t is None else t.to(where) for t in (z.clone(), x0, xt, None, sigma, weight)]
            row_loss_ = getattr(torch.ops.fastdiff.row_loss_, backend)
            before = row_loss_(*tensors, *constants, 3 * num_states, False)
            losses = row_loss_(*tensors, *constants, 3 * num_states, True)
            torch.testing.assert_close(losses, before, equal_nan=True)
            results.append((losses.cpu(), tensors[0].cpu()))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("options", [{}, dict(capacity=9), dict(softcap=2.0)], ids=str)
@pytest.mark.parametrize("name", ["dce", "dce_all", "dce_z", "absorb", "absorb_logits", "absorb_scaled"])
def test_evaluation_without_logits(name, options, device, monkeypatch):
    """Forward only, in 16 bits: tiles of logits are float32 and never rounded, so that the loss is more exact."""
    monkeypatch.setattr(op, "row_losses_", None)
    monkeypatch.setattr(kernels, "TILE", kernels.TILE | dict(ROWS=16, IDS=32, WIDTH=16))
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    for num_states, width, dtype in ((2, 16, torch.float16), (100, 24, LOW[device.type])):
        for bias in (True, False):
            p = linear_problem((3, 3), num_states, dtype, width=width, bias=bias, device=device)
            got, expected = (
                loss_of(name, p, backend=backend, **options | (dict(capacity=None) if backend == "reference" else {}))
                for backend in ("triton", "reference")
            )
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_evaluation_without_a_scored_row(device):
    p = linear_problem((2, 3), 50, torch.float16, device=device)
    p["xt"] = p["x0"]
    for capacity in (None, 3):
        assert not loss_of("dce", p, backend="triton", capacity=capacity).any()
