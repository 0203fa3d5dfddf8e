"""Derivatives that the kernels do not give are errors, never zeros; the first gradient may be taken with a graph."""

import pytest
import torch
import torch.autograd.functional as AF
from cases import assert_near, linear_problem, loss_of, problem
from torch.autograd import forward_ad
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from fastdiff import dce_loss, linear_dce_loss, linear_sample_tokens, reverse_probs, sample_tokens

REDUCTIONS = {
    "none": dict(),
    "sum": dict(reduction="sum"),
    "mean": dict(reduction="mean"),
    "num_items": dict(reduction="mean", num_items=7),
}


def scalar(leaf, dtype=torch.float32, name="dce", **options):
    """A loss as a function of one of its inputs, through what stands for a network, and that input."""
    p = problem((2, 3), 7, dtype) if leaf == "z" else linear_problem((2, 3), 7, dtype)
    return lambda x: loss_of(name, p | {leaf: x * 2}, **options).sum(), p[leaf]


def penalty(f, x):
    loss = f(x)
    (grad,) = torch.autograd.grad(loss, x, create_graph=True)
    return loss + grad.square().sum()


SECOND = {
    "grad": lambda f, x: torch.autograd.grad(penalty(f, x), x),
    "backward": lambda f, x: penalty(f, x).backward(),
    "checkpoint": lambda f, x: torch.autograd.grad(penalty(lambda x: checkpoint(f, x, use_reentrant=False), x), x),
    "hessian": AF.hessian,
    "hvp": lambda f, x: AF.hvp(f, x, x.detach()),
    "vhp": lambda f, x: AF.vhp(f, x, x.detach()),
    "jvp": lambda f, x: AF.jvp(f, x, x.detach()),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("leaf", ["z", "hidden", "lm_head", "bias"])
def test_double_backward_is_an_error(leaf, reduction):
    for dtype in (torch.float32, torch.float16):
        f, x = scalar(leaf, dtype, **REDUCTIONS[reduction])
        for second in SECOND.values():
            with pytest.raises(RuntimeError, match="does not give double backward"):
                second(f, x.clone().requires_grad_())


@pytest.mark.parametrize("leaf", ["z", "lm_head"])
def test_transforms_of_functorch(leaf):
    """Only those that differentiate nothing work; PyTorch refuses the others for any operator of torch.library."""
    f, x = scalar(leaf, reduction="sum")
    for transform in (torch.func.grad, torch.func.hessian):
        with pytest.raises(RuntimeError):
            transform(f)(x)
    losses = torch.func.vmap(f)(torch.stack([x, x + 1]))
    torch.testing.assert_close(losses, torch.stack([f(x), f(x + 1)]))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("leaf", ["z", "hidden", "lm_head", "bias"])
def test_first_gradients_with_a_graph(leaf, reduction):
    """They are those without; a second backward, changes in place and the plain parts of a sum are unharmed."""
    f, x = scalar(leaf, **REDUCTIONS[reduction])
    x.requires_grad_()
    (expected,) = torch.autograd.grad(f(x), x)
    loss = f(x)
    loss /= 4  # in place, as for accumulation
    for _ in range(2):
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        torch.testing.assert_close(grad * 4, expected)
        grad.detach().mul_(3)
    (loss + x.square().sum()).backward()
    torch.testing.assert_close(x.grad, expected / 4 + 2 * x)


def test_logits_are_not_kept():
    p = problem((2, 3), 7)
    logits = p["z"].requires_grad_() * 2
    memory = StorageWeakRef(logits.untyped_storage())
    loss = loss_of("dce", p | dict(z=logits), reduction="sum")
    del logits
    assert memory.expired()
    loss.backward()


def by_dual_numbers(f, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, tangent))).tangent


def by_functorch(f, x, tangent):
    return torch.func.jvp(f, (x,), (tangent,))[1]


@pytest.mark.parametrize("name", ["dce", "uniform"])
@pytest.mark.parametrize("leaf", ["z", "hidden", "lm_head", "bias"])
def test_forward_mode_is_an_error_and_of_the_reference_right(leaf, name):
    for options in REDUCTIONS.values():
        f, x = scalar(leaf, torch.float64, name, **options)
        tangent = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape)
        expected = AF.vjp(f, x)[1].mul(tangent).sum()
        exact = scalar(leaf, torch.float64, name, backend="reference", **options)[0]
        with pytest.raises(RuntimeError, match="does not give forward-mode derivatives"):
            torch.func.jacfwd(f)(x)
        for forward in (by_dual_numbers, by_functorch):
            with pytest.raises(RuntimeError, match="does not give forward-mode derivatives"):
                forward(f, x, tangent)
            assert_near(forward(exact, x, tangent), expected, torch.float64, leaf)


@pytest.mark.parametrize("graph", ["absorb", "uniform"])
def test_reverse_probabilities(graph):
    p = problem((2, 3), 7, torch.float64)
    z, xt = p["z"].requires_grad_(), p["xt"]

    def law(z, backend=None):
        return reverse_probs(z, xt, 0.7, sigma_next=0.3, graph=graph, backend=backend)[..., 0].double().sum()

    with pytest.raises(RuntimeError, match="does not give a gradient"):
        law(z).backward()
    with pytest.raises(RuntimeError, match="does not give forward-mode derivatives"):
        torch.func.jvp(law, (z.detach(),), (torch.ones_like(z),))
    (grad,) = torch.autograd.grad(law(z, "reference"), z)
    step = torch.zeros_like(z).index_fill_(-1, torch.tensor([0]), 0.01)
    slope = (law(z + step) - law(z - step)) / 2
    assert slope > 1e-3
    torch.testing.assert_close((grad * step).sum(), slope, rtol=1e-2, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_statistics_have_no_gradient(backend):
    p, q = problem((2, 3), 7), linear_problem((2, 3), 7)
    options = dict(return_stats=True, backend=backend)
    hidden, lm_head = q["hidden"].requires_grad_(), q["lm_head"]
    for _, stats in (
        sample_tokens(p["z"].requires_grad_(), p["xt"], **options),
        linear_sample_tokens(hidden, lm_head, q["xt"], **options),
        dce_loss(p["z"], p["x0"], **options),
        linear_dce_loss(hidden, lm_head, q["x0"], **options),
    ):
        assert not any(x.requires_grad for x in stats)
