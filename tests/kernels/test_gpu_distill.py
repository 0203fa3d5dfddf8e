"""Distillation by the kernels of GPUs against the reference: values, gradients, layouts, in place, random cases."""

import pytest
import torch
from cases import assert_near
from distill_cases import KINDS, check_distill, linear_problem, loss_and_grads, loss_of, problem
from hypothesis import given
from hypothesis import strategies as st
from random_cases import CASES, fuzz

import fastdiff.ops.chunks as op

TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_reference(kind, dtype, backend, device):
    for num_states, reduction in ((27, "sum"), (1031, "none"), (2500, "mean")):
        p = problem(kind, (2, 2), num_states, dtype, spread=2.0, device=device)
        got, expected = (
            loss_and_grads(p, "z", reduction=reduction, temperature=1.5, backend=b) for b in (backend, "reference")
        )
        assert_near(got[0], expected[0], torch.float32, f"loss at V = {num_states}")
        assert_near(got[1], expected[1], dtype, f"gradient at V = {num_states}", slack=2)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_as_they_lie(kind, backend, device):
    """Starting anywhere, apart from each other, or one for all; the teacher's otherwise than the student's."""
    p = problem(kind, (2, 3), 300, torch.bfloat16, device=device) | dict(mask=None)
    expected = loss_and_grads(p, "z", backend="reference")
    for name, offset in (("z", 3), ("teacher", 5)):
        if name == "teacher" and kind.endswith("ids"):
            continue
        wide = torch.full((2, 3, 407), torch.nan, dtype=torch.bfloat16, device=device)
        wide[..., offset : offset + 300] = p[name]
        given = p | {name: wide[..., offset : offset + 300]}
        z = given["z"].requires_grad_()
        loss = loss_of(given, backend=backend)
        upstream = torch.linspace(-1, 2, 6, device=device).view(2, 3)
        assert_near(loss.detach(), expected[0], torch.float32, name)
        assert_near(torch.autograd.grad(loss, z, upstream)[0], expected[1], torch.bfloat16, name)
    one = given | dict(z=p["z"][:1].expand(2, 3, 300))
    assert_near(loss_of(one, backend=backend), loss_of(one, backend="reference"), torch.float32, kind)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_linear(kind, reduction, backend, device, monkeypatch):
    """With the gradient in the place of the logits, a few rows at a time."""
    monkeypatch.setitem(op.TILE_BYTES, device.type, 3 * 4 * 1031)
    leaves = ("hidden", "lm_head", "bias")
    for dtype, capacity in ((torch.float32, 7), (torch.bfloat16, None)):
        p = linear_problem(kind, (2, 3), 1031, dtype, device=device)
        got = loss_and_grads(p, *leaves, reduction=reduction, capacity=capacity, backend=backend)
        expected = loss_and_grads(p, *leaves, reduction=reduction, backend="reference")
        wide = torch.float32 if dtype == torch.float32 else dtype  # as the logits are rounded
        assert_near(got[0].to(wide), expected[0].to(wide), wide, kind, slack=4)
        for a, b in zip(got[1:], expected[1:], strict=True):
            assert_near(a, b, dtype, kind, slack=8)


def test_what_is_not_finite(backend, device):
    z, teacher = torch.zeros(5, 40, device=device), torch.zeros(5, 40, device=device)
    z[0, 3], teacher[1, 3] = -torch.inf, -torch.inf
    z[2, 3] = teacher[2, 3] = -torch.inf
    z[3, 3], teacher[4, 3] = torch.inf, torch.nan
    for kl, infinite in (("forward", 0), ("reverse", 1)):
        loss = loss_of(dict(z=z, teacher=teacher, exclude_mask=False), kl=kl, backend=backend)
        expected = torch.full((5,), torch.log(torch.tensor(40 / 39)), device=device)
        expected[infinite], expected[2], expected[3:] = torch.inf, 0, torch.nan
        torch.testing.assert_close(loss, expected, equal_nan=True, atol=1e-7, rtol=1e-5)


def test_opcheck(backend, device):
    for kind in ("forward", "reverse at ids"):
        p = problem(kind, (2, 3), 9, device=device)
        ids = p["teacher_ids"].sort(-1).values if "teacher_ids" in p else None
        rows = [p["teacher"], ids, p["mask"], p["weight"], None]
        constants = [kind != "forward", 8, 0.5, "mean"]
        z = p["z"].requires_grad_()
        torch.library.opcheck(getattr(torch.ops.fastdiff.row_distill, backend), (z, *rows, *constants, True))


@fuzz(max(CASES // 40, 1))
@given(st.data())
def test_random_cases(backend, device, data):
    check_distill(data.draw, backend, device)
