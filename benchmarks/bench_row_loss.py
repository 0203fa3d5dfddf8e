"""Row losses, forward and backward: 1024 rows (8192 on a GPU), V = 50257, half of the tokens masked, reduction "sum".

The floor reads the scored rows once and writes the gradient once, into fresh memory or into warm. On a GPU, beside
other libraries' kernels, 32768 rows too, where the floor counts both at the rate at which the machine copies.
"""

import ctypes
import os
from functools import partial

import libraries
import peers
import pytest
import torch
from measure import DEVICE, both_ways

from fastdiff import csm_loss, d3pm_loss, dce_loss, dse_loss, loo_loss, mixture_loss
from fastdiff.schedules import LogLinear

SHAPE, NUM_STATES = (8, 1024 if DEVICE.type == "cuda" else 128), 50257
COMPILED = os.environ.get("FASTDIFF_BENCH_COMPILED", "1") != "0"


def noised(shape, num_states, dtype, share):
    """A batch, made where it is measured, with this share of its tokens masked."""
    g = torch.Generator(DEVICE).manual_seed(0)
    on_device = dict(generator=g, device=DEVICE)
    z = torch.randn(*shape, num_states, dtype=dtype, **on_device)
    x0 = torch.randint(0, num_states - 1, shape, **on_device)
    masked = torch.rand(shape, **on_device) < share
    moved = torch.where(masked, torch.randint(0, num_states, shape, **on_device), x0)
    sigma = torch.rand(shape[0], **on_device) + 0.1
    return dict(
        z=z.requires_grad_(),
        x0=x0,
        xt=torch.where(masked, num_states - 1, x0),
        moved=moved,
        mixed=torch.where(torch.rand(shape, **on_device) < 0.2, moved, torch.where(masked, num_states - 1, x0)),
        sigma=sigma,
        rate=1 / torch.expm1(sigma),
        scored=int(masked.sum()),
        dtype=str(dtype).removeprefix("torch."),
    )


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def batch(request):
    return noised(SHAPE, NUM_STATES, request.param, 0.5)


def calls_of(b, loss, formulas):
    """Forward and backward by fastdiff (a fused scalar, and per token), the published formulas, and those compiled."""
    losses = {
        "fastdiff": lambda: loss(reduction="sum"),
        "fastdiff, none": lambda: loss(reduction="none").sum(),
        **formulas,
    }
    if COMPILED:
        losses |= {f"{who}, compiled": torch.compile(formula) for who, formula in formulas.items()}
    return {who: partial(both_ways, loss, b["z"]) for who, loss in losses.items()}


@torch.no_grad()
def forward(loss):
    loss(reduction="sum")


def floor(b, rows, rates, read="read", write=None):
    """Seconds to read the rows once and to write a whole gradient, at the rates of those names."""
    row = b["z"].element_size() * b["z"].shape[-1]
    written = row * b["x0"].numel() / getattr(rates, write) if write else 0
    return (row * rows / getattr(rates, read) + written) / 1e9


@pytest.fixture
def warm_memory():
    """Freed memory stays with the process: gradients come back to pages that were written before (glibc)."""
    mallopt, trim_threshold, mmap_max = ctypes.CDLL(None).mallopt, -1, -4
    mallopt(mmap_max, 0)
    mallopt(trim_threshold, 2**31 - 1)
    yield
    mallopt(mmap_max, 65536)
    mallopt(trim_threshold, 128 << 10)


def dce(b):
    z, x0, xt, rate = b["z"], b["x0"], b["xt"], b["rate"]
    formulas = {
        "MDLM": lambda: peers.mdlm_subs(z, rate, xt, x0),
        "RADD": lambda: peers.radd_lambda(z, rate, xt, x0),
        "LLaDA": lambda: peers.llada_ce(z, rate, xt, x0),
    }
    return partial(dce_loss, z, x0, xt=xt, weight=rate), formulas, b["scored"]


def dse_absorb(b):
    z, sigma, xt, x0 = b["z"], b["sigma"], b["xt"], b["x0"]
    return partial(dse_loss, z, sigma, xt, x0), {"SEDD": lambda: peers.sedd_absorb(z, sigma, xt, x0)}, b["scored"]


def dse_uniform(b):
    z, sigma, xt, x0 = b["z"], b["sigma"], b["moved"], b["x0"]
    formulas = {"SEDD": lambda: peers.sedd_uniform(z, sigma, xt, x0)}
    return partial(dse_loss, z, sigma, xt, x0, graph="uniform"), formulas, x0.numel()


def dse_uniform_logits(b):
    z, sigma, rate, xt, x0 = b["z"], b["sigma"], b["rate"], b["moved"], b["x0"]
    formulas = {"Duo": lambda: peers.duo_nelbo(z, sigma, rate, xt, x0)}
    options = dict(graph="uniform", parametrization="logits", dsigma=rate)
    return partial(dse_loss, z, sigma, xt, x0, **options), formulas, x0.numel()


def csm_absorb(b):
    z, sigma, xt, x0 = b["z"], b["sigma"], b["xt"], b["x0"]
    formulas = {"definition": lambda: peers.squared_ratios(z, sigma, xt, x0, False)}
    return partial(csm_loss, z, sigma, xt, x0), formulas, b["scored"]


def csm_uniform(b):
    z, sigma, xt, x0 = b["z"], b["sigma"], b["moved"], b["x0"]
    formulas = {"definition": lambda: peers.squared_ratios(z, sigma, xt, x0, True)}
    return partial(csm_loss, z, sigma, xt, x0, graph="uniform"), formulas, x0.numel()


def loo(b):
    z, sigma, xt, x0 = b["z"], b["sigma"], b["moved"], b["x0"]
    formulas = {"DiffusionGemma in TRL": lambda: peers.diffusion_gemma(z, sigma, xt, x0)}
    return partial(loo_loss, z, sigma, xt, x0), formulas, x0.numel()


def d3pm_uniform(b):
    z, xt, x0, step = b["z"], b["moved"], b["x0"], 1 + torch.arange(len(b["x0"]), device=DEVICE) % 7
    sigma, sigma_s = (LogLinear().total_noise((i + 1) / 8) for i in (step.float(), step.float() - 1))
    formulas = {"D3PM": lambda: peers.d3pm_uniform(z, sigma, sigma_s, xt, x0)}
    return partial(d3pm_loss, z, step + 1, xt, x0, num_steps=8, graph="uniform"), formulas, x0.numel()


def mixture(b):
    z, sigma, xt, x0, share = b["z"], b["sigma"], b["mixed"], b["x0"], torch.full_like(b["sigma"], 0.2)
    formulas = {"GIDD": lambda: peers.gidd(z, sigma, share, xt, x0)}
    return partial(mixture_loss, z, sigma, share, xt, x0), formulas, x0.numel()


LOSSES = [dce, dse_absorb, dse_uniform, dse_uniform_logits, csm_absorb, csm_uniform, loo, d3pm_uniform, mixture]
CASES = pytest.mark.parametrize("case", LOSSES, ids=lambda c: c.__name__)

ON_THE_CPU = pytest.mark.skipif(DEVICE.type == "cuda", reason="about the CPU's memory")
ON_A_GPU = pytest.mark.skipif(DEVICE.type == "cpu", reason="33 GB")


@CASES
def test_forward_and_backward(case, batch, compare):
    loss, formulas, rows = case(batch)
    name = f"{case.__name__}, forward + backward, {batch['dtype']}"
    compare(name, calls_of(batch, loss, formulas), partial(floor, batch, rows, write="fresh_fill"))


@ON_THE_CPU
@CASES
def test_forward_and_backward_in_warm_memory(case, batch, compare, warm_memory):
    loss, _, rows = case(batch)
    calls = {"fastdiff": calls_of(batch, loss, {})["fastdiff"]}
    name = f"{case.__name__}, forward + backward, {batch['dtype']}, warm"
    compare(name, calls, partial(floor, batch, rows, write="copy"))


@CASES
def test_forward(case, batch, compare):
    loss, _, rows = case(batch)
    calls = {"fastdiff": partial(forward, loss)}
    if case is dce:
        calls["fastdiff, statistics"] = partial(forward, partial(loss, return_stats=True))
    compare(f"{case.__name__}, forward, {batch['dtype']}", calls, partial(floor, batch, rows))


@ON_THE_CPU
@CASES
def test_forward_from_cache(case, batch, compare):
    """What arithmetic alone allows: the rows stay in the last-level cache, and a floor is still that of memory."""
    part = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    part["z"] = part["z"].detach()
    loss, _, _ = case(part)
    scored = int((part["xt"] != part["x0"]).sum()) if case in (dce, dse_absorb, csm_absorb) else SHAPE[1]
    name = f"{case.__name__}, forward, {batch['dtype']}, {SHAPE[1]} rows in cache"
    compare(name, {"fastdiff": partial(forward, loss)}, partial(floor, part, scored))


@ON_A_GPU
@pytest.mark.parametrize(("num_states", "share"), [(50257, 0.5), (126464, 0.5), (126464, 1.0)])
@CASES
def test_many_rows(case, num_states, share, compare):
    b = noised((32, 1024), num_states, torch.bfloat16, share)
    loss, _, rows = case(b)
    calls = {"fastdiff": calls_of(b, loss, {})["fastdiff"]}
    if case is dce:
        z, labels = b["z"].detach().clone().flatten(0, 1), b["x0"].where(b["xt"] != b["x0"], -100).flatten()
        for who, call in libraries.cross_entropies(z.requires_grad_(), labels).items():
            calls[who] = partial(both_ways, call, z)
    name = f"{case.__name__}, forward + backward, bfloat16, 32768 x {num_states}, {share:.0%} masked"
    compare(name, calls, partial(floor, b, rows, read="copy", write="copy"))
