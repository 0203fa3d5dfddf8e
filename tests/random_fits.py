"""Random fits of an estimator's controls: the kernel's, and their gradients, against the formulas'."""

import torch
from hypothesis import strategies as st

from fastdiff.estimators import chains, potential


def check_fits(draw):
    sequences, number, looks, length = (draw(st.integers(1, most)) for most in (3, 20, 3, 24))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    mask = torch.rand(sequences, number, looks, length) < torch.rand(sequences, number, looks, 1)
    mask.scatter_(3, torch.randint(length, (sequences, number, looks, 1)), True)  # a look is at one or more
    weight = torch.rand(sequences, number, looks, 1).double() * mask
    told = (potential.terms(mask) * torch.randn(length, len(potential._TERMS))).sum(-1)
    noise, scale = draw(st.floats(0, 1)), draw(st.sampled_from([0.0, 1.0, 1e100]))
    loss = scale * (torch.randn(length) + told + noise * torch.randn(mask.shape)).double()
    loss.requires_grad_()
    folds = [torch.arange(number)[first::8] for first in range(min(8, number))]
    found, expected = potential.fused_fits(loss, mask, weight, len(folds)), chains._fits(loss, mask, weight, folds)
    upstream = [torch.randn_like(part) for part in expected]
    of_found, of_expected = (torch.autograd.grad(parts, loss, upstream)[0] for parts in (found, expected))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-7 * scale)
    torch.testing.assert_close(of_found, of_expected, rtol=1e-6, atol=1e-8)
