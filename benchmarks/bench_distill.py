"""Distillation, forward and backward: 1024 rows (8192 on a GPU), V = 50257, half of the tokens masked, reduction "sum".

The floor reads the scored rows of student and teacher once and writes the gradient once into fresh memory. Beside it
`F.kl_div` of two log-softmaxes without the mask's id, over all rows and over the masked ones alone.
"""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, both_ways

from fastdiff import distill_loss, linear_distill_loss

SHAPE, NUM_STATES, WIDTH, MANY = (8, 1024 if DEVICE.type == "cuda" else 128), 50257, 768, 64


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def batch(request):
    g = torch.Generator(DEVICE).manual_seed(0)
    on_device = dict(generator=g, device=DEVICE)
    z, teacher = (torch.randn(*SHAPE, NUM_STATES, dtype=request.param, **on_device) for _ in range(2))
    masked = torch.rand(SHAPE, **on_device) < 0.5
    return dict(z=z.requires_grad_(), teacher=teacher, mask=masked)


def kl_div(z, teacher, kl):
    """PyTorch's own, in float32."""
    log_q, log_p = (x[..., :-1].float().log_softmax(-1) for x in (z, teacher))
    first, second = (log_q, log_p) if kl == "forward" else (log_p, log_q)
    return F.kl_div(first, second, reduction="none", log_target=True).sum(-1)


def floor(b, rates, rows=2):
    """Seconds to read so many rows of a scored token, and to write a whole gradient."""
    row = b["z"].element_size() * NUM_STATES
    read, written = rows * row * int(b["mask"].sum()), row * b["mask"].numel()
    return (read / rates.read + written / rates.fresh_fill) / 1e9


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_forward_and_backward(kl, batch, compare):
    z, teacher, mask = batch["z"], batch["teacher"], batch["mask"]
    calls = {
        "fastdiff": lambda: distill_loss(z, teacher, mask=mask, kl=kl, reduction="sum"),
        "fastdiff, none": lambda: distill_loss(z, teacher, mask=mask, kl=kl).sum(),
        "F.kl_div": lambda: (kl_div(z, teacher, kl) * mask).sum(),
        "F.kl_div, masked rows": lambda: kl_div(z[mask], teacher[mask], kl).sum(),
    }
    name = f"{kl}, forward + backward, {str(z.dtype).removeprefix('torch.')}"
    compare(name, {who: partial(both_ways, call, z) for who, call in calls.items()}, partial(floor, batch))


def test_some_ids(batch, compare):
    """Of the teacher log-probabilities at its most likely ids, which are read for nothing."""
    z, mask = batch["z"], batch["mask"]
    log_p, ids = batch["teacher"][..., :-1].float().log_softmax(-1).topk(MANY)
    call = partial(distill_loss, z, log_p, teacher_ids=ids, mask=mask, reduction="sum")
    name = f"forward at {MANY} ids, forward + backward, {str(z.dtype).removeprefix('torch.')}"
    compare(name, {"fastdiff": partial(both_ways, call, z)}, partial(floor, batch, rows=1))


def test_linear(batch, compare):
    """From hidden states, without the logits; beside it the products and `distill_loss`."""
    dtype, mask = batch["z"].dtype, batch["mask"]
    made = dict(dtype=dtype, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(1))
    hidden, teacher = (torch.randn(*SHAPE, WIDTH, **made) for _ in range(2))
    lm_head, teacher_lm_head = (torch.randn(NUM_STATES, WIDTH, **made) / WIDTH**0.5 for _ in range(2))
    leaves = hidden.requires_grad_(), lm_head.requires_grad_()

    def whole():
        with torch.no_grad():
            logits = teacher @ teacher_lm_head.T
        return distill_loss(hidden @ lm_head.T, logits, mask=mask, reduction="sum")

    calls = {
        "fastdiff": lambda: linear_distill_loss(*leaves, teacher, teacher_lm_head, mask=mask, reduction="sum"),
        "fastdiff, all logits": whole,
    }
    name = f"linear, forward + backward, {str(dtype).removeprefix('torch.')}"
    compare(name, {who: partial(both_ways, call, *leaves) for who, call in calls.items()}, rounds=5)
