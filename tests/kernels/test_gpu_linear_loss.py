"""The linear losses with the GPU backends' row kernels, which write the gradient in the place of the logits."""

import pytest
import torch
from cases import LOSSES, assert_near, linear_problem, loss_and_grads, loss_of

import fastdiff.ops.chunks as op

LEAVES = ("hidden", "lm_head", "bias")


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("name", LOSSES)
def test_agrees_with_the_reference(name, reduction, backend, device, monkeypatch):
    monkeypatch.setitem(op.TILE_BYTES, device.type, 3 * 4 * 1031)
    for num_states, capacity in ((2, None), (1031, None), (1031, 9)):
        p = linear_problem((3, 3), num_states, device=device)
        got = loss_and_grads(name, p, *LEAVES, reduction=reduction, capacity=capacity, backend=backend)
        expected = loss_and_grads(name, p, *LEAVES, reduction=reduction, backend="reference")
        for a, b in zip(got, expected, strict=True):
            assert_near(a, b, torch.float32, name, slack=4)


@pytest.mark.parametrize("name", LOSSES)
def test_a_gradient_in_the_place_of_its_row(name, backend, device):
    """In 16 bits, where rounding would show a number that was read after it had been written."""
    dtype = (torch.bfloat16, torch.float16)[LOSSES.index(name) % 2]
    p = linear_problem((2, 3), 5003, dtype, device=device)
    got = loss_and_grads(name, p, *LEAVES, reduction="sum", backend=backend)
    expected = loss_and_grads(name, p, *LEAVES, reduction="sum", backend="reference")
    for a, b in zip(got, expected, strict=True):
        assert_near(a, b, dtype, name, slack=8)


@pytest.mark.parametrize("wants_grad", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("options", [{}, dict(capacity=9), dict(softcap=2.0)], ids=str)
def test_statistics(options, wants_grad, backend, device, monkeypatch):
    monkeypatch.setitem(op.TILE_BYTES, device.type, 3 * 4 * 1031)
    for num_states, dtype in ((2, torch.float32), (1031, torch.float32), (1031, torch.float16)):
        p = linear_problem((3, 3), num_states, dtype, device=device)
        leaves = [p[leaf].requires_grad_(wants_grad) for leaf in LEAVES]
        given = dict(options, reduction="sum", backend=backend)
        plain = loss_of("dce_z", p, **given)
        loss, stats = loss_of("dce_z", p, return_stats=True, **given)
        _, expected = loss_of("dce_z", p, return_stats=True, backend="reference", softcap=options.get("softcap", 0.0))
        rounded = 2 * torch.finfo(dtype).eps  # as the logits are
        torch.testing.assert_close(loss, plain, rtol=rounded, atol=0)
        torch.testing.assert_close(stats, expected, rtol=rounded, atol=4 * rounded)
        if wants_grad:
            grads = zip(*(torch.autograd.grad(x, leaves) for x in (loss, plain)), strict=True)
            assert all(torch.equal(a, b) for a, b in grads)


@pytest.mark.parametrize(
    "name", ["dce", "dce_z", "dce_entropy", "absorb", "absorb_scaled", "uniform", "uniform_scaled"]
)
def test_parts_of_a_row(name, backend, device):
    """What one rank of several sees: its losses and gradients are those of the compiled CPU kernels."""
    pull = torch.linspace(1, -1, 6, dtype=torch.float64) if name == "dce_entropy" else None
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
        for b, where in ((backend, device), ("cpu", "cpu")):
            tensors = [None if t is None else t.to(where) for t in (z.clone(), x0, xt, None, sigma, weight, pull, None)]
            row_loss_ = getattr(torch.ops.fastdiff.row_loss_, b)
            before, _ = row_loss_(*tensors, *constants, 3 * num_states, False, False)
            losses, stats = row_loss_(*tensors, *constants, 3 * num_states, True, functor == "dce")
            torch.testing.assert_close(losses, before, rtol=1.3e-6, atol=1e-5, equal_nan=True)  # float32 terms
            results.append((losses.cpu(), tensors[0].cpu(), stats[:2].cpu()))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
