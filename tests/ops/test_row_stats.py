"""Statistics and z-loss of cross-entropy, from the same read as the loss."""

import math

import pytest
import torch

from fastdiff import dce_loss


def batch(dtype, num_states=507, shape=(3, 5)):
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(*shape, num_states, generator=g, dtype=torch.float64)).to(dtype)
    x0 = torch.where(torch.rand(shape, generator=g) < 0.5, logits.argmax(-1), torch.randint(0, num_states, shape))
    return logits, x0, torch.rand(shape, generator=g) < 0.7


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_statistics(dtype, reduction):
    for num_states in (2, 27, 5003):
        logits, x0, mask = batch(dtype, num_states)
        options = dict(mask=mask, exclude_mask=False, reduction=reduction)
        loss, stats = dce_loss(logits.requires_grad_(), x0, return_stats=True, **options)
        assert torch.equal(loss, dce_loss(logits, x0, **options))
        wide = logits.detach().double()
        p = torch.softmax(wide, -1)
        logsumexp, at_x0 = torch.logsumexp(wide, -1), wide.gather(-1, x0[..., None]).squeeze(-1)
        expected = logsumexp, -torch.special.xlogy(p, p).sum(-1), logits.argmax(-1) == x0, logsumexp - at_x0
        for got, want in zip(stats, expected, strict=True):
            assert not got.requires_grad
            torch.testing.assert_close(got, torch.where(mask, want, 0).to(got.dtype), rtol=1e-5, atol=1e-5)


def test_backends_agree_where_the_mask_is_excluded():
    logits, x0, mask = batch(torch.float32, 60)
    x0 = x0.clamp(max=58)
    logits[..., 59] = 50
    results = [dce_loss(logits, x0, mask=mask, return_stats=True, backend=b)[1] for b in ("cpu", "reference")]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_what_a_nearly_certain_token_lacks_is_not_rounded_away(dtype, backend):
    logits = torch.full((1, 1, 9), 4096.0, dtype=dtype)
    logits[..., 3] += 32
    logits[..., 4:] -= 64
    x0, options = torch.tensor([[3]]), dict(exclude_mask=False, weight=3.0, z_loss=1e-4, backend=backend)
    _, stats = dce_loss(logits, x0, return_stats=True, **options)
    expected = torch.tensor(3 * math.exp(-32), dtype=stats.nll.dtype)
    torch.testing.assert_close(stats.nll[0, 0], expected, rtol=1e-2, atol=0)  # of 1 in float64


def test_of_equal_numbers_the_first_is_the_argmax():
    x0 = torch.arange(5)[None]
    for backend in ("cpu", "reference"):
        _, stats = dce_loss(torch.zeros(1, 5, 5), x0, exclude_mask=False, return_stats=True, backend=backend)
        assert stats.correct.tolist() == [[True, False, False, False, False]]


def test_rows_with_infinities():
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 1:] = -torch.inf  # certain: no entropy
    logits[0, 1, 2] = torch.nan
    _, stats = dce_loss(logits, torch.zeros(1, 3, dtype=torch.long), exclude_mask=False, return_stats=True)
    torch.testing.assert_close(stats.entropy, torch.tensor([[0, torch.nan, math.log(4)]]), equal_nan=True)
    torch.testing.assert_close(stats.logsumexp, torch.tensor([[0, torch.nan, math.log(4)]]), equal_nan=True)
    assert stats.correct.tolist() == [[True, False, True]]


def test_statistics_compile():
    logits, x0, mask = batch(torch.float32)

    def accuracy(logits):
        loss, stats = dce_loss(logits * 1, x0, mask=mask, exclude_mask=False, reduction="sum", return_stats=True)
        return loss + stats.entropy.sum(), stats.correct.sum(), stats.nll

    torch._dynamo.reset()
    compiled = torch.compile(accuracy, fullgraph=True, backend="aot_eager")(logits.requires_grad_())
    for got, expected in zip(compiled, accuracy(logits), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_z_loss(reduction):
    logits, x0, mask = batch(torch.float64)
    weight = torch.rand(3, dtype=torch.float64)
    options = dict(mask=mask, exclude_mask=False, weight=weight)
    z = logits.requires_grad_()
    got = dce_loss(z, x0, z_loss=0.3, reduction=reduction, **options)
    penalty = (torch.logsumexp(z, -1) ** 2 * mask * weight[:, None] * 0.3).sum()
    expected = dce_loss(z, x0, **options).sum() + penalty
    torch.testing.assert_close(got.sum(), expected)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), z), torch.autograd.grad(expected, z))
