"""Bad input to losses of hidden states, and their defaults."""

import inspect

import pytest
import torch

from fastdiff import dce_loss, dse_loss, linear_dce_loss, linear_dse_loss
from fastdiff.losses.row_losses import dce_rows, dse_rows

BAD = {
    "lm_head of another width": (dict(lm_head=torch.zeros(9, 5)), ValueError, r"lm_head: expected shape \[V, D=4\]"),
    "lm_head of three dimensions": (dict(lm_head=torch.zeros(1, 9, 4)), ValueError, "lm_head: expected shape"),
    "lm_head of another type": (dict(lm_head=torch.zeros(9, 4).half()), TypeError, "lm_head: expected torch.float32"),
    "lm_head on another device": (dict(lm_head=torch.zeros(9, 4, device="meta")), ValueError, "lm_head: .* on cpu"),
    "bias of another length": (dict(bias=torch.zeros(8)), ValueError, r"bias: expected shape \[V=9\]"),
    "bias of another type": (dict(bias=torch.zeros(9).double()), TypeError, "bias: expected torch.float32"),
    "no bias": (dict(bias=3.0), TypeError, "bias: expected a torch.Tensor"),
    "integers": (dict(hidden=torch.zeros(2, 3, 4).long()), TypeError, "hidden: expected float32"),
    "one dimension": (dict(hidden=torch.zeros(4)), ValueError, r"hidden: expected shape \[..., D\]"),
    "other tokens": (dict(x0=torch.zeros(2, 4).long()), ValueError, r"x0: expected shape \(2, 3\)"),
    "a negative softcap": (dict(softcap=-1.0), ValueError, "softcap: expected a finite number >= 0"),
    "a negative capacity": (dict(capacity=-1), ValueError, "capacity: expected a number of rows"),
    "an id that does not exist": (dict(x0=torch.full((2, 3), 9)), ValueError, r"x0: .*\[0, 9\), got 9 at \[0, 0\]"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    wrong, error, message = BAD[case]
    given = dict(hidden=torch.zeros(2, 3, 4), lm_head=torch.zeros(9, 4), x0=torch.zeros(2, 3).long()) | wrong
    with pytest.raises(error, match=message):
        linear_dce_loss(**given)
    if "x0" not in wrong:
        with pytest.raises(error, match=message):
            linear_dse_loss(sigma=1.0, xt=torch.full((2, 3), 8), **given)


@pytest.mark.parametrize(
    ("rows", "losses"), [(dce_rows, (dce_loss, linear_dce_loss)), (dse_rows, (dse_loss, linear_dse_loss))]
)
def test_defaults_are_the_same_wherever_they_stand(rows, losses):
    for loss in losses:
        given = inspect.signature(loss).parameters
        for name, parameter in inspect.signature(rows).parameters.items():
            assert name == "z" or given[name].default == parameter.default, f"{loss.__name__}: {name}"
