"""The generalised KL of flow_matching where the shared test does not look."""

import pytest
import torch
from standins import flow_matching as standin

from fastdiff.integrations import flow_matching

V = 19
PATH = standin.MixtureDiscreteProbPath(standin.PolynomialConvexScheduler(2.0))


def made(shape=(3, 8), share=0.5, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, V, generator=g, dtype=dtype).requires_grad_()
    x_1, drawn = (torch.randint(0, V, shape, generator=g) for _ in range(2))
    x_t = torch.where(torch.rand(shape, generator=g) < share, drawn, x_1)
    return logits, x_1, x_t, torch.rand(shape[0], generator=g)


def agree(arguments, reduction, path=PATH):
    results = []
    for module in (flow_matching, standin):
        loss = module.MixturePathGeneralizedKL(path, reduction)(*arguments)
        upstream = torch.linspace(-1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)
        results.append((loss.detach(), torch.autograd.grad(loss, arguments[0], upstream)[0]))
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-14)
    return results[0][0]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 4), (5,)])
def test_reductions_and_shapes(reduction, shape):
    loss = agree(made(shape), reduction)
    assert loss.shape == (shape if reduction == "none" else ())
    agree(made(shape), reduction, standin.MixtureDiscreteProbPath(standin.PolynomialConvexScheduler(1.0)))


@pytest.mark.parametrize("moved", [False, True])
def test_all_tokens_still_or_all_moved(moved):
    logits, x_1, _, t = made()
    agree((logits, x_1, (x_1 + moved) % V, t), "none")


def test_a_sure_posterior_does_not_cancel():
    """1 - p(x_1) = 18 e^-25 in float32, where p(x_1) rounds to 1."""
    logits, x_1, _, _ = made(dtype=torch.float32)
    logits = torch.zeros_like(logits).scatter(-1, x_1[..., None], 25.0)
    arguments = (x_1, x_1, torch.full((3,), 0.5))
    exact = standin.MixturePathGeneralizedKL(PATH)(logits.double(), *arguments)
    got = flow_matching.MixturePathGeneralizedKL(PATH)(logits, *arguments)
    assert exact > 0
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)


def test_one_call_reaches_what_was_made_and_imported_before(applied):
    loss_fn, arguments = standin.MixturePathGeneralizedKL(path=PATH), made(dtype=torch.bfloat16)
    logits, x_1, x_t, t = arguments
    exact = standin.MixturePathGeneralizedKL(PATH)(logits.double(), *arguments[1:])
    undo = applied(standin, flow_matching.apply_to_flow_matching)
    loss = loss_fn(logits=logits, x_1=x_1, x_t=x_t, t=t).mean()
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    assert isinstance(loss_fn, standin.MixturePathGeneralizedKL)  # by which the examples choose how near t comes to 1
    undo()
    assert not torch.isclose(loss_fn(*arguments).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compiles_whole(dtype, applied):
    applied(standin, flow_matching.apply_to_flow_matching)
    arguments, loss_fn = made(dtype=dtype), standin.MixturePathGeneralizedKL(PATH)
    results = []
    for function in (loss_fn, torch.compile(loss_fn, fullgraph=True, backend="aot_eager")):
        loss = function(*arguments)
        results.append((loss, *torch.autograd.grad(loss, arguments[0])))
    torch.testing.assert_close(*results)


def test_double_backward_is_an_error():
    arguments = made()
    (grad,) = torch.autograd.grad(
        flow_matching.MixturePathGeneralizedKL(PATH)(*arguments), arguments[0], create_graph=True
    )
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_errors_name_the_argument():
    logits, x_1, x_t, t = made()
    with pytest.raises(ValueError, match="reduction"):
        flow_matching.MixturePathGeneralizedKL(PATH, "no")(logits, x_1, x_t, t)
    with pytest.raises(ValueError, match="x0"):
        flow_matching.MixturePathGeneralizedKL(PATH)(logits, x_1 + V, x_t, t)
    with pytest.raises(TypeError, match="logits"):
        flow_matching.MixturePathGeneralizedKL(PATH)(x_1, x_1, x_t, t)
