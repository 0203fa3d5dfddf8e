"""Row losses of numbers that are not finite, huge or tiny."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import (
    large_scores,
    largest_drift,
    largest_logits,
    loss_of,
    problem,
    tiny_loss,
)
from exact import EXTENDED, dse_uniform_logits

from fastdiff import dce_loss, dse_loss


@pytest.mark.parametrize("row", ["nan", "all -inf", "x0 -inf", "+inf", "others -inf", "huge"])
def test_non_finite_rows_as_cross_entropy(row):
    z = torch.randn(3, 9)
    x0 = torch.tensor([4, 4, 4])
    edits = {
        "nan": lambda r: r.__setitem__(2, torch.nan),
        "all -inf": lambda r: r.fill_(-torch.inf),
        "x0 -inf": lambda r: r.__setitem__(4, -torch.inf),
        "+inf": lambda r: r.__setitem__(2, torch.inf),
        "others -inf": lambda r: (r.fill_(-torch.inf), r.__setitem__(4, 1.0)),
        "huge": lambda r: r.mul_(1e30),
    }
    edits[row](z[1])
    z.requires_grad_()
    expected = F.cross_entropy(z, x0, reduction="none")
    got = dce_loss(z, x0, exclude_mask=False)
    torch.testing.assert_close(got, expected, equal_nan=True)
    grads = [torch.autograd.grad(loss[[0, 2]].sum() + loss[1], z)[0] for loss in (got, expected)]
    torch.testing.assert_close(*grads, equal_nan=True)


def test_non_finite_scores_as_the_reference():
    for value in (torch.nan, -torch.inf, torch.inf, 88.0, 1e30):
        for column in (0, 3):
            p = problem((2, 4), 9)
            p["z"][0, :, column] = value
            for name in ("absorb", "uniform"):
                got, expected = (loss_of(name, p, backend=b) for b in ("cpu", "reference"))
                torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_scores_that_leave_the_type_without_their_weight(graph, dtype, backend):
    z, options, expected, slope = large_scores(graph, dtype)
    loss = dse_loss(z.requires_grad_(), backend=backend, **options)
    torch.testing.assert_close(loss, expected.to(dtype), rtol=1e-5, atol=0)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(grad[:, 2:], slope.to(dtype)[:, None].expand(3, 998), rtol=1e-4, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_as_large_as_the_type(dtype, backend):
    z, x0 = largest_logits(dtype)
    loss = dce_loss(z.requires_grad_(), x0, weight=0.25, exclude_mask=False, backend=backend)
    expected = 0.25 * torch.tensor([math.log(9), 0, 2 * torch.finfo(dtype).max + math.log(8)], dtype=torch.float64)
    torch.testing.assert_close(loss, expected.float())
    (grad,) = torch.autograd.grad(loss.sum(), z)
    here = F.one_hot(x0, 9)
    p = torch.stack([torch.full((9,), 1 / 9), here[1], (1 - here[2]) / 8])
    torch.testing.assert_close(grad, (0.25 * (p - here)).to(dtype))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_conditionals_far_from_x0_in_the_uniform_graph(backend):
    """In float64, where next to nothing is noised and x0 is next to impossible."""
    z, sigma, xt, x0 = (
        torch.zeros(1, 27, dtype=torch.float64),
        torch.tensor([1e-8]),
        torch.tensor([3]),
        torch.tensor([5]),
    )
    z[0, 5] = -20
    loss = dse_loss(z.requires_grad_(), sigma, xt, x0, graph="uniform", parametrization="logits", backend=backend)
    (grad,) = torch.autograd.grad(loss.sum(), z)
    rows = (x.detach().double().numpy().astype(EXTENDED) for x in (z, sigma))
    expected = dse_uniform_logits(*rows, xt.numpy(), x0.numpy())
    torch.testing.assert_close(loss.detach(), torch.from_numpy(expected.loss.astype(float)), rtol=1e-13, atol=0)
    torch.testing.assert_close(grad, torch.from_numpy(expected.grad.astype(float)), rtol=1e-13, atol=0)


def test_loss_scaling_keeps_small_float16_gradients():
    """As GradScaler does it: without the scale nearly half of these gradients would be 0 in float16."""
    p = problem((4, 64), 1000, torch.float16, spread=1.0)
    lost = []
    for backend in ("cpu", "reference"):
        z = p["z"].clone().requires_grad_()
        (loss_of("dce", p | dict(z=z), reduction="mean", num_items=1e4, backend=backend) * 2.0**16).backward()
        lost.append((z.grad[p["xt"] == 999] == 0).double().mean())
    assert abs(lost[0] - lost[1]) < 1e-3


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_digits_of_a_tiny_loss(backend):
    loss, expected = tiny_loss(backend)
    assert loss.item() == pytest.approx(expected, rel=1e-6, abs=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_weights_and_logits_as_large_as_float32(backend):
    grad, expected = largest_drift(backend)
    assert torch.equal(grad, expected)
