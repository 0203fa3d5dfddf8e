"""Row losses, forward and backward: 1024 rows, V = 50257, half of the tokens masked, reduction "sum".

The floor reads the scored rows once and writes the gradient once into fresh memory.
"""

import os

import peers
import pytest
import torch

from fastdiff import dce_loss, dse_loss

SHAPE, NUM_STATES = (8, 128), 50257
COMPILED = os.environ.get("FASTDIFF_BENCH_COMPILED", "1") != "0"


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def batch(request):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(*SHAPE, NUM_STATES, generator=g).to(request.param).requires_grad_()
    x0 = torch.randint(0, NUM_STATES - 1, SHAPE, generator=g)
    masked = torch.rand(SHAPE, generator=g) < 0.5
    xt = torch.where(masked, NUM_STATES - 1, x0)
    moved = torch.where(masked, torch.randint(0, NUM_STATES, SHAPE, generator=g), x0)
    sigma = torch.rand(SHAPE[0], generator=g) + 0.1
    return dict(z=z, x0=x0, xt=xt, moved=moved, sigma=sigma, rate=1 / torch.expm1(sigma), scored=masked.sum().item())


def both_ways(z, loss):
    def call():
        z.grad = None
        loss().backward()

    return call


def forward(loss):
    def call():
        with torch.no_grad():
            loss()

    return call


def floor(b, rates, rows, grad=True):
    row = b["z"].element_size() * NUM_STATES
    written = row * b["z"].shape[:-1].numel() / rates.fresh_fill if grad else 0
    return (row * rows / rates.read + written) / 1e9


def against(b, name, ours, theirs, per_token=None):
    """fastdiff, the published formulas, and the same under torch.compile, each both ways."""
    calls = {"fastdiff": ours} | ({"fastdiff, none": per_token} if per_token else {}) | theirs
    if COMPILED:
        calls |= {f"{who}, compiled": torch.compile(formula, fullgraph=False) for who, formula in theirs.items()}
    return {who: both_ways(b["z"], call) for who, call in calls.items()}


def test_dce(batch, rates, compare):
    b = batch
    z, x0, xt, rate = b["z"], b["x0"], b["xt"], b["rate"]
    calls = against(
        b,
        "dce",
        lambda: dce_loss(z, x0, xt=xt, weight=rate, reduction="sum"),
        {
            "MDLM": lambda: peers.mdlm_subs(z, rate, xt, x0),
            "RADD": lambda: peers.radd_lambda(z, rate, xt, x0),
            "LLaDA": lambda: peers.llada_ce(z, rate, xt, x0),
        },
        lambda: dce_loss(z, x0, xt=xt, weight=rate).sum(),
    )
    compare(f"dce, forward + backward, {z.dtype}", calls, floor(b, rates, b["scored"]))
    ours = forward(lambda: dce_loss(z, x0, xt=xt, weight=rate, reduction="sum"))
    compare(f"dce, forward, {z.dtype}", {"fastdiff": ours}, floor(b, rates, b["scored"], grad=False))


def test_dse_absorb(batch, rates, compare):
    b = batch
    z, sigma, xt, x0 = b["z"], b["sigma"], b["xt"], b["x0"]
    calls = against(
        b,
        "absorb",
        lambda: dse_loss(z, sigma, xt, x0, reduction="sum"),
        {"SEDD": lambda: peers.sedd_absorb(z, sigma, xt, x0)},
        lambda: dse_loss(z, sigma, xt, x0).sum(),
    )
    compare(f"dse absorb, forward + backward, {z.dtype}", calls, floor(b, rates, b["scored"]))
    ours = forward(lambda: dse_loss(z, sigma, xt, x0, reduction="sum"))
    compare(f"dse absorb, forward, {z.dtype}", {"fastdiff": ours}, floor(b, rates, b["scored"], grad=False))


def test_dse_uniform(batch, rates, compare):
    b = batch
    z, sigma, xt, x0 = b["z"], b["sigma"], b["moved"], b["x0"]
    calls = against(
        b,
        "uniform",
        lambda: dse_loss(z, sigma, xt, x0, graph="uniform", reduction="sum"),
        {"SEDD": lambda: peers.sedd_uniform(z, sigma, xt, x0)},
        lambda: dse_loss(z, sigma, xt, x0, graph="uniform").sum(),
    )
    compare(f"dse uniform, forward + backward, {z.dtype}", calls, floor(b, rates, x0.numel()))
    ours = forward(lambda: dse_loss(z, sigma, xt, x0, graph="uniform", reduction="sum"))
    compare(f"dse uniform, forward, {z.dtype}", {"fastdiff": ours}, floor(b, rates, x0.numel(), grad=False))
