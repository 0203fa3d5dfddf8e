"""The last layer and the loss, reduction "sum": 2048 rows x 768 x 50257 (on a GPU 8192 x 4096 x 126464), half scored.

The floor multiplies the scored rows, once forward and twice backward, at the rate of the machine's matmul. For
log-probabilities and entropies, whose upstream gradients are not known forward, fastdiff multiplies them once more.
"""

import os
from functools import partial

import libraries
import peers
import pytest
import torch
import torch.nn.functional as F
from measure import DEVICE, both_ways

from fastdiff import dce_loss, linear_dce_loss, linear_dse_loss, linear_token_logps, token_logps

GPU = DEVICE.type == "cuda"
SHAPE, WIDTH, NUM_STATES = ((8, 1024), 4096, 126464) if GPU else ((8, 256), 768, 50257)
COMPILED = os.environ.get("FASTDIFF_BENCH_COMPILED", "1") != "0"
CHUNKED = os.environ.get("FASTDIFF_BENCH_CHUNKED", "0") != "0"  # torch's own chunking: minutes a call on a CPU
ROUNDS = 7 if GPU else 3  # of seconds each
TYPES = [torch.bfloat16] if GPU else [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=TYPES, ids=str)
def batch(request):
    g = torch.Generator(DEVICE).manual_seed(0)
    on_device = dict(generator=g, device=DEVICE)
    x0 = torch.randint(0, NUM_STATES - 1, SHAPE, **on_device)
    masked = torch.rand(SHAPE, **on_device) < 0.5
    sigma = torch.rand(SHAPE[0], **on_device) + 0.1
    hidden = torch.randn(*SHAPE, WIDTH, **on_device, dtype=request.param)
    lm_head = torch.randn(NUM_STATES, WIDTH, **on_device, dtype=request.param)
    return dict(
        x0=x0,
        xt=torch.where(masked, NUM_STATES - 1, x0),
        sigma=sigma,
        rate=1 / torch.expm1(sigma),
        masked=masked,
        labels=torch.where(masked, x0, -100),
        scored=int(masked.sum()),
        hidden=hidden.requires_grad_(),
        lm_head=lm_head.mul_(WIDTH**-0.5).requires_grad_(),
    )


def dce(b):
    """Cross-entropy as LLaDA has it, over all ids; the losses of torch's own fused function have no weight."""
    h, w, x0, rate, masked = b["hidden"], b["lm_head"], b["x0"], b["rate"], b["masked"]
    each = rate[:, None].expand_as(x0)[masked]
    fused = partial(F.linear_cross_entropy, h.flatten(0, 1), w, b["labels"].flatten(), reduction="sum")
    formulas = {
        "every row": lambda: peers.llada_ce(h @ w.t(), rate, b["xt"], x0),
        "scored rows by hand": lambda: (F.cross_entropy(h[masked] @ w.t(), x0[masked], reduction="none") * each).sum(),
        "torch linear_cross_entropy": fused,
        "by hand, dce_loss": lambda: dce_loss(
            h[masked] @ w.t(), x0[masked], weight=each, exclude_mask=False, reduction="sum"
        ),
    }
    if GPU:
        formulas |= libraries.linear_cross_entropies(h.flatten(0, 1), w, b["labels"].flatten())
    if CHUNKED:
        for policy in ("accurate", "balanced", "compact"):
            options = torch.nn.LinearCrossEntropyOptions(acc_policy=policy)
            formulas[f"the same, chunked, {policy}"] = partial(fused, options=options)
    loss = partial(linear_dce_loss, h, w, x0, xt=b["xt"], weight=rate, exclude_mask=False)
    return loss, formulas, ("every row", "scored rows by hand")


def dse_absorb(b):
    h, w, sigma, xt, x0 = b["hidden"], b["lm_head"], b["sigma"], b["xt"], b["x0"]
    formulas = {"every row": lambda: peers.sedd_absorb(h @ w.t(), sigma, xt, x0)}
    return partial(linear_dse_loss, h, w, sigma, xt, x0), formulas, ("every row",)


def floor(b, products, rates):
    rate = rates.matmul_bf16 if b["hidden"].dtype == torch.bfloat16 else rates.matmul
    return products * 2 * b["scored"] * WIDTH * NUM_STATES / rate / 1e9


CASES = pytest.mark.parametrize("case", [dce, dse_absorb], ids=lambda c: c.__name__)


@CASES
def test_forward_and_backward(case, batch, compare):
    loss, formulas, compiled = case(batch)
    calls = {"fastdiff": partial(loss, reduction="sum"), "fastdiff, none": lambda: loss().sum(), **formulas}
    if COMPILED:
        calls |= {f"{who}, compiled": torch.compile(formulas[who]) for who in compiled}
    calls = {who: partial(both_ways, call, batch["hidden"], batch["lm_head"]) for who, call in calls.items()}
    name = f"linear {case.__name__}, forward + backward, {str(batch['hidden'].dtype).removeprefix('torch.')}"
    compare(name, calls, partial(floor, batch, 3), ROUNDS)


def logps(b):
    """A policy's gradient: log-probabilities of drawn tokens times advantages, and a bonus for entropy."""
    h, w, x0, masked, temperature = b["hidden"], b["lm_head"], b["x0"], b["masked"], 0.8
    advantage = b["rate"][:, None].expand_as(x0)

    def surrogate(logps, entropy, advantage):
        return -(advantage * logps).sum() - 0.01 * entropy.sum()

    def usual(rows, x0, advantage, kept=1):
        log_p = torch.log_softmax((rows @ w.t()).float() / temperature, -1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        return surrogate(log_p.gather(-1, x0[..., None]).squeeze(-1), entropy * kept, advantage * kept)

    options = dict(temperature=temperature, return_entropy=True, exclude_mask=False)
    return {
        "fastdiff": lambda: surrogate(*linear_token_logps(h, w, x0, mask=masked, **options), advantage),
        "every row": lambda: usual(h, x0, advantage, masked),
        "scored rows by hand": lambda: usual(h[masked], x0[masked], advantage[masked]),
        "by hand, token_logps": lambda: surrogate(
            *token_logps(h[masked] @ w.t(), x0[masked], **options), advantage[masked]
        ),
    }


def test_log_probabilities(batch, compare):
    calls = {who: partial(both_ways, call, batch["hidden"], batch["lm_head"]) for who, call in logps(batch).items()}
    name = f"linear logps and entropy, forward + backward, {str(batch['hidden'].dtype).removeprefix('torch.')}"
    compare(name, calls, partial(floor, batch, 3), ROUNDS)


@CASES
def test_forward(case, batch, compare):
    loss, formulas, _ = case(batch)
    calls = {"fastdiff": partial(loss, reduction="sum"), **formulas}
    calls = {who: torch.no_grad()(call) for who, call in calls.items()}
    name = f"linear {case.__name__}, forward, {str(batch['hidden'].dtype).removeprefix('torch.')}"
    compare(name, calls, partial(floor, batch, 1), ROUNDS)
