"""Bad input to the row losses."""

import pytest
import torch
from cases import (
    loss_of,
    problem,
)

from fastdiff import dce_loss, dse_loss

BAD = [
    (dict(x0=torch.full((2, 3), 9)), ValueError, r"x0: expected ids in \[0, 9\), got 9"),
    (dict(x0=torch.full((2, 3), -1)), ValueError, "x0: expected ids"),
    (dict(x0=torch.full((2, 3), 8), xt=torch.full((2, 3), 8)), ValueError, "x0: expected a token"),
    (dict(x0=torch.zeros(2, 4, dtype=torch.long)), ValueError, r"x0: expected shape \(2, 3\), got \(2, 4\)"),
    (dict(x0=torch.zeros(2, 3)), TypeError, "x0: expected int64"),
    (dict(x0=[1, 2]), TypeError, "x0: expected a torch.Tensor, got list"),
    (dict(z=torch.zeros(2, 3, 9, dtype=torch.long)), TypeError, "expected float32"),
    (dict(z=torch.zeros(9)), ValueError, r"expected shape \[..., V\]"),
    (dict(xt=torch.full((2, 3), 5)), ValueError, "xt: expected x0 or the mask"),
    (dict(xt=torch.zeros(3, 3, dtype=torch.long)), ValueError, "xt: expected shape"),
    (dict(mask_index=9), ValueError, "mask_index: expected an id"),
    (dict(reduction="average"), ValueError, "reduction: expected one of 'none', 'sum', 'mean', got 'average'"),
    (dict(num_items=3), ValueError, "num_items: needs reduction='mean'"),
    (dict(backend="tpu"), ValueError, "backend: expected one of"),
    (dict(x0=torch.zeros(2, 3, dtype=torch.long, device="meta")), ValueError, "x0: expected a tensor on cpu, got meta"),
]
BAD_DCE = [
    (dict(weight=torch.ones(3)), ValueError, "weight: expected a number or a shape that is a prefix"),
    (dict(weight=torch.ones(2, 3, requires_grad=True)), ValueError, "weight: has no gradient"),
    (dict(weight="1"), TypeError, "weight: expected a number"),
    (dict(mask=torch.ones(2, 3)), TypeError, "mask: expected a bool tensor"),
    (dict(mask=torch.ones(2, 3, dtype=torch.bool), xt=torch.full((2, 3), 8)), ValueError, "got both"),
]
BAD_DSE = [
    (dict(sigma=0.0), ValueError, "sigma: expected numbers > 0"),
    (dict(sigma=-1.0), ValueError, "sigma: expected finite numbers >= 0"),
    (dict(sigma=float("nan")), ValueError, "sigma: expected finite"),
    (dict(sigma=float("inf")), ValueError, "sigma: expected finite"),
    (dict(sigma=torch.ones(2, requires_grad=True)), ValueError, "sigma: has no gradient"),
    (dict(dsigma=torch.ones(4)), ValueError, "dsigma: expected a number or a shape"),
    (dict(graph="star"), ValueError, "graph: expected one of"),
    (dict(parametrization="score"), ValueError, "parametrization: expected one of"),
    (dict(graph="uniform", parametrization="logits", sigma=0.0), ValueError, "sigma: expected numbers > 0"),
    (dict(graph="uniform", xt=torch.full((2, 3), 9)), ValueError, r"xt: expected ids in \[0, 9\)"),
    (dict(x0=torch.full((2, 3), -100)), ValueError, "x0: expected ids"),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD + BAD_DCE)
def test_bad_input_to_dce(change, error, message, backend):
    arguments = dict(z=torch.zeros(2, 3, 9), x0=torch.zeros(2, 3, dtype=torch.long), backend=backend) | change
    with pytest.raises(error, match=message):
        dce_loss(arguments.pop("z"), arguments.pop("x0"), **arguments)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("change", "error", "message"), BAD + BAD_DSE)
def test_bad_input_to_dse(change, error, message, backend):
    xt = torch.full((2, 3), 8)
    arguments = dict(z=torch.zeros(2, 3, 9), sigma=0.5, xt=xt, x0=torch.zeros(2, 3, dtype=torch.long), backend=backend)
    arguments |= change
    z, sigma, xt, x0 = (arguments.pop(k) for k in ("z", "sigma", "xt", "x0"))
    with pytest.raises(error, match=message):
        dse_loss(z, sigma, xt, x0, **arguments)


BAD_NEW = [
    ("csm_uniform", dict(parametrization="logits"), ValueError, "parametrization: expected one of"),
    ("csm_absorb", dict(graph="star"), ValueError, "graph: expected one of"),
    ("csm_absorb", dict(sigma=0.0), ValueError, "sigma: expected numbers > 0"),
    ("loo", dict(sigma=0.0), ValueError, "sigma: expected numbers > 0"),
    ("loo", dict(moved=torch.full((2, 3), 9)), ValueError, r"xt: expected ids in \[0, 9\)"),
    ("loo", dict(mask=torch.ones(2, 3)), TypeError, "mask: expected a bool tensor"),
    ("d3pm_uniform", dict(step=0), ValueError, r"step: expected steps in \[1, 4\], got 0"),
    ("d3pm_uniform", dict(step=torch.tensor([1, 5])), ValueError, r"step: expected steps in \[1, 4\], got 5"),
    ("d3pm_uniform", dict(step=1.5), TypeError, "step: expected an int"),
    ("d3pm_uniform", dict(step=torch.ones(2)), TypeError, "step: expected int64 or int32 steps"),
    ("d3pm_uniform", dict(num_steps=0), ValueError, "num_steps: expected at least 1"),
    ("d3pm_uniform", dict(auxiliary=-1.0), ValueError, "auxiliary: expected a number >= 0"),
    ("d3pm_uniform", dict(graph="star"), ValueError, "graph: expected one of"),
    ("mixture", dict(share=1.5), ValueError, r"share: expected numbers in \[0, 1\]"),
    ("mixture", dict(share=torch.ones(3)), ValueError, "share: expected a number or a shape"),
    ("mixture", dict(x0=torch.full((2, 3), 8)), ValueError, "x0: expected a token"),
    ("mixture", dict(sigma=-1.0), ValueError, "sigma: expected finite numbers >= 0"),
    ("mixture", dict(mask_index=9), ValueError, "mask_index: expected an id"),
]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("name", "change", "error", "message"), BAD_NEW)
def test_bad_input_to_the_other_losses(name, change, error, message, backend):
    p = problem((2, 3), 9)
    tensors = {k: v for k, v in change.items() if k in p and k != "mask_index"}
    options = {k: v for k, v in change.items() if k not in tensors}
    with pytest.raises(error, match=message):
        loss_of(name, p | tensors, backend=backend, **options)
