"""The linear losses with Triton's row kernels, which write the gradient in the place of the logits."""

import pytest
import torch
from cases import LOSSES, assert_near, linear_problem, loss_and_grads

import fastdiff.ops.linear_loss as op

LEAVES = ("hidden", "lm_head", "bias")


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
