"""Calls every kernel, each in a range of its name, for tools that watch a program:

compute-sanitizer python benchmarks/each_kernel.py small
ncu --nvtx --nvtx-include "regex:fastdiff.*/" python benchmarks/each_kernel.py large
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from measure import DEVICE

from fastdiff import (
    backends,
    corrupt,
    csm_loss,
    d3pm_loss,
    dce_loss,
    distill_loss,
    dse_loss,
    harmonic_mask,
    linear_dce_loss,
    loo_loss,
    mask_exactly,
    mask_tokens,
    mixture_loss,
    reverse_probs,
    reverse_step,
    sample_tokens,
    scored_rows,
    token_logps,
)
from fastdiff.noise.graphs import Uniform

SIZES = {"small": ((2, 19), (61, 1031, 20011)), "large": ((8, 512), (50257, 126464))}  # tokens, vocabularies


def calls(shape: tuple[int, int], num_states: int, dtype: torch.dtype, backend: str) -> dict[str, Callable[[], object]]:
    """By name; a loss is called with its gradient, both those that the forward pass writes and those of backward."""
    g = torch.Generator(DEVICE).manual_seed(0)
    made = dict(generator=g, device=DEVICE)
    z = torch.randn(*shape, num_states, dtype=dtype, **made).requires_grad_()
    x0, mask_index = torch.randint(0, num_states - 1, shape, **made), num_states - 1
    xt = x0.where(torch.rand(shape, **made) < 0.5, mask_index)
    sigma, counts = torch.rand(shape[0], **made) + 0.1, torch.full(shape[:1], shape[1] // 2, device=DEVICE)
    teacher = torch.randn(*shape, num_states, dtype=dtype, **made)
    log_p, ids = teacher[..., :-1].float().log_softmax(-1).topk(16)
    hidden, lm_head = (torch.randn(*size, 64, dtype=dtype, **made) for size in (shape, (num_states,)))

    def gradients(loss: Callable[..., torch.Tensor]) -> None:
        (2 * loss(reduction="sum") + loss(reduction="none").sum()).backward()

    uniform = dict(graph="uniform", backend=backend)
    losses = {
        "dce": partial(dce_loss, z, x0, xt=xt, backend=backend),
        "dse absorb": partial(dse_loss, z, sigma, xt, x0, backend=backend),
        "dse uniform": partial(dse_loss, z, sigma, xt, x0, **uniform),
        "dse uniform from logits": partial(dse_loss, z, sigma, xt, x0, parametrization="logits", **uniform),
        "csm absorb": partial(csm_loss, z, sigma, xt, x0, backend=backend),
        "csm uniform": partial(csm_loss, z, sigma, xt, x0, **uniform),
        "loo": partial(loo_loss, z, sigma, xt, x0, backend=backend),
        "d3pm uniform": partial(d3pm_loss, z, 3, xt, x0, num_steps=8, auxiliary=0.1, **uniform),
        "mixture": partial(mixture_loss, z, sigma, 0.1, xt, x0, backend=backend),
        "distill": partial(distill_loss, z, teacher, xt=xt, backend=backend),
        "distill, reverse": partial(distill_loss, z, teacher, xt=xt, kl="reverse", backend=backend),
        "distill, ids": partial(distill_loss, z, log_p, teacher_ids=ids, xt=xt, backend=backend),
    }
    logits, draw = z.detach(), partial(sample_tokens, z.detach(), xt, seed=0, backend=backend)
    logps = partial(token_logps, z, x0, return_entropy=True, backend=backend)
    step = dict(sigma_next=0.9, seed=0, backend=backend)
    return {name: partial(gradients, loss) for name, loss in losses.items()} | {
        "logps and entropy": lambda: sum(map(torch.sum, logps())).backward(),
        "statistics": lambda: dce_loss(logits, x0, xt=xt, return_stats=True, backend=backend),
        "mask tokens": lambda: mask_tokens(x0, 0.5, mask_index=mask_index, seed=0, backend=backend),
        "mask exactly": lambda: mask_exactly(x0, counts, mask_index=mask_index, seed=0, backend=backend),
        "harmonic mask": lambda: harmonic_mask(x0, mask_index=mask_index, seed=0, backend=backend),
        "corrupt": lambda: corrupt(x0, sigma, Uniform(num_states), seed=0, backend=backend),
        "scored rows": lambda: scored_rows(xt != x0, x0.numel(), backend=backend),
        "sample": draw,
        "sample, statistics": partial(draw, return_stats=True),
        "sample, greedy": partial(draw, temperature=0),
        "sample, top_k and top_p": partial(draw, top_k=20, top_p=0.9),
        "reverse step": lambda: reverse_step(logits, xt, 1.0, **step),
        "reverse step, uniform": lambda: reverse_step(logits, xt, 1.0, graph="uniform", **step),
        "reverse probs": lambda: reverse_probs(logits, xt, 1.0, sigma_next=0.9, backend=backend),
        "linear dce, forward": lambda: linear_dce_loss(hidden, lm_head, x0, xt=xt, backend=backend),
    }


def cases(size: str) -> Iterator[tuple[str, Callable[[], object]]]:
    shape, vocabularies = SIZES[size]
    for backend in (r.name for r in backends.report() if r.available and r.name != "reference"):
        if (backend == "cpu") != (DEVICE.type == "cpu"):
            continue
        for num_states in vocabularies:
            for dtype in (torch.bfloat16, torch.float32):
                for name, call in calls(shape, num_states, dtype, backend).items():
                    yield f"fastdiff {backend}: {name}, V = {num_states}, {dtype}", call


def main() -> None:
    for name, call in cases(sys.argv[1]):
        with torch.cuda.nvtx.range(name) if DEVICE.type == "cuda" else nullcontext():
            call()
        print(name, flush=True)


if __name__ == "__main__":
    main()
