"""Evaluation without logits, which only Triton has."""

import pytest
import torch
from cases import linear_problem, loss_of

import fastdiff.kernels.linear_loss as kernels
import fastdiff.ops.chunks as op

LOW = {"cpu": torch.float16, "cuda": torch.bfloat16}  # the interpreter multiplies the bits of bfloat16 as integers


@pytest.mark.parametrize("options", [{}, dict(capacity=9), dict(softcap=2.0)], ids=str)
@pytest.mark.parametrize("name", ["dce", "dce_all", "dce_z", "absorb", "absorb_logits", "absorb_scaled"])
def test_evaluation_without_logits(name, options, device, monkeypatch):
    """Forward only, in 16 bits: tiles of logits are float32 and never rounded, so that the loss is more exact."""
    monkeypatch.setattr(op, "row_losses_", None)
    monkeypatch.setattr(kernels, "TILE", kernels.TILE | dict(ROWS=16, IDS=32, WIDTH=16))
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    for num_states, width, dtype in ((2, 16, torch.float16), (100, 24, LOW[device.type])):
        for bias in (True, False):
            p = linear_problem((3, 3), num_states, dtype, width=width, bias=bias, device=device)
            got, expected = (
                loss_of(name, p, backend=backend, **options | (dict(capacity=None) if backend == "reference" else {}))
                for backend in ("triton", "reference")
            )
            torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


def test_evaluation_without_a_scored_row(device):
    p = linear_problem((2, 3), 50, torch.float16, device=device)
    p["xt"] = p["x0"]
    for capacity in (None, 3):
        assert not loss_of("dce", p, backend="triton", capacity=capacity).any()


def test_the_excluded_id_is_not_looked_at(device):
    p = linear_problem((2, 3), 50, torch.float16, bias=False, device=device)
    p["lm_head"][49] = torch.nan
    assert loss_of("dce", p, backend="triton").isfinite().all()
