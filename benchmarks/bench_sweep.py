"""Time and memory of a loss and its gradient against the share of masked tokens and against the vocabulary, bfloat16.

From logits, and with the last layer: 1024 rows, width 768 (on a GPU 8192 rows, width 4096). `report.py` draws them.
"""

from functools import partial

import peers
import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, both_ways

from fastdiff import dce_loss, linear_dce_loss

SHAPE, WIDTH = ((8, 1024), 4096) if DEVICE.type == "cuda" else ((8, 128), 768)
COMMON_V, COMMON_SHARE = 50257, 0.5
CASES = [(COMMON_V, share) for share in (0.05, 0.25, 0.5, 0.75, 1.0)]
CASES += [(v, COMMON_SHARE) for v in (1000, 8000, 32000, 126464)]


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def batch(request):
    num_states, share = request.param
    g = torch.Generator(DEVICE).manual_seed(0)
    x0 = torch.randint(0, num_states - 1, SHAPE, generator=g, device=DEVICE)
    order = torch.randperm(x0.numel(), generator=g, device=DEVICE).view(SHAPE)
    xt = torch.where(order < share * x0.numel(), num_states - 1, x0)
    return dict(x0=x0, xt=xt, rate=torch.rand(len(x0), generator=g, device=DEVICE) + 0.5, num_states=num_states)


def leaf(*shape):
    g = torch.Generator(DEVICE).manual_seed(1)
    return torch.randn(*shape, generator=g, device=DEVICE, dtype=torch.bfloat16).requires_grad_()


def run(compare, what, batch, losses, leaves):
    masked = (batch["xt"] != batch["x0"]).double().mean().item()
    calls = {who: partial(both_ways, loss, *leaves) for who, loss in losses.items()}
    compare(f"{what}, V = {batch['num_states']}, {masked:.0%} masked", calls, rounds=5)


def test_from_logits(batch, compare):
    z, (x0, xt, rate) = leaf(*SHAPE, batch["num_states"]), (batch[k] for k in ("x0", "xt", "rate"))
    losses = {
        "fastdiff": lambda: dce_loss(z, x0, xt=xt, weight=rate, reduction="sum"),
        "masked rows, as LLaDA": lambda: peers.llada_ce(z, rate, xt, x0),
        "every row, as MDLM": lambda: peers.mdlm_subs(z, rate, xt, x0),
    }
    run(compare, "logits", batch, losses, [z])


def test_last_layer(batch, compare):
    hidden, lm_head = leaf(*SHAPE, WIDTH), leaf(batch["num_states"], WIDTH)
    x0, xt, rate = (batch[k] for k in ("x0", "xt", "rate"))
    masked = xt != x0
    weight = rate[:, None].expand_as(x0)

    def every_row():
        each = F.cross_entropy((hidden @ lm_head.t()).flatten(0, 1), x0.flatten(), reduction="none")
        return (each * (weight * masked).flatten()).sum()

    def by_hand():
        each = F.cross_entropy(hidden[masked] @ lm_head.t(), x0[masked], reduction="none")
        return (each * weight[masked]).sum()

    losses = {
        "fastdiff": lambda: linear_dce_loss(
            hidden, lm_head, x0, xt=xt, weight=rate, exclude_mask=False, reduction="sum"
        ),
        "masked rows": by_hand,
        "every row": every_row,
    }
    run(compare, "last layer", batch, losses, [hidden, lm_head])
