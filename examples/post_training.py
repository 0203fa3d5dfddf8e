"""DPO and GRPO on a language whose reward can be checked: what the estimator of the likelihood is worth.

A small masked-diffusion model learns strings of brackets, many of them spoiled. Then it is trained to continue a prompt
so that all brackets match, from pairs of answers (DPO) and from its own answers (GRPO), with likelihoods as fastdiff
estimates them and as published, several seeds each. Writes runs/post_training/: results.json and post_training.png.
"""

import io
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from fastdiff import (
    NLLEstimate,
    dce_loss,
    dpo_loss,
    grpo_loss,
    log_likelihood_ratio,
    mask_exactly,
    one_pass_nll,
    sample,
    sample_mask_counts,
    time_free_nll,
)
from fastdiff.model import DiffusionTransformer, ModelConfig, write_atomically

plt.switch_backend("Agg")  # files, no windows

OUT = Path("runs/post_training")
QUICK = os.environ.get("FASTDIFF_DEMO_QUICK") == "1"  # a few steps of everything, to see that it runs
MASK = 2  # after ( and )
PROMPT, LENGTH = 8, 32
GROUP = 8  # answers to a prompt
SEEDS = 2 if QUICK else 4
console = Console(width=100)


class Method(NamedTuple):
    """An objective, an estimator of the likelihood, and network passes for each."""

    objective: str
    estimator: str
    passes: int


OURS = "stratified (default)"
RIVALS = {"DPO": ("uniform (VRPO)", "systematic (LLaDA)"), "GRPO": ("complementary (ESPO)", "one pass (d1)")}
METHODS = [
    method
    for objective, rivals in RIVALS.items()
    for method in (Method(objective, OURS, 8), *(Method(objective, *pair) for pair in product(rivals, (8, 16))))
]
Curve = list[tuple[int, int, float]]  # steps done, network passes of all likelihoods, reward


def string(draw: random.Random, spoiled: float) -> list[int]:
    """Brackets that match; then each is replaced by either with probability `spoiled`."""
    tokens, depth = [], 0
    for left in range(LENGTH, 0, -1):
        opens = depth == 0 or (depth < left and draw.random() < 0.5)
        depth += 1 if opens else -1
        tokens.append(0 if opens else 1)
    return [draw.randrange(2) if draw.random() < spoiled else token for token in tokens]


def strings(n: int, *, seed: int, spoiled: float = 0.0) -> Tensor:
    draw = random.Random(seed)
    return torch.tensor([string(draw, spoiled) for _ in range(n)])


def rewards(x: Tensor) -> Tensor:
    """1 where all brackets match, else 0: [n, LENGTH] -> [n]."""
    depth = (1 - 2 * x).cumsum(1)
    return ((depth >= 0).all(1) & (depth[:, -1] == 0)).float()


def target(x: Tensor) -> Tensor:
    """The answers' tokens."""
    return (torch.arange(LENGTH) >= PROMPT).expand(len(x), -1)


def pretrained() -> DiffusionTransformer:
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(MASK + 1, max_length=LENGTH, dim=64, depth=2, heads=4))
    steps, batch = 3 if QUICK else 1000, 64
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for step, x0 in enumerate(strings(steps * batch, seed=0, spoiled=0.05).split(batch)):
        counts, weight = sample_mask_counts(batch, LENGTH - PROMPT, seed=0, step=step)
        xt, _ = mask_exactly(x0, counts, mask_index=MASK, maskable=target(x0), seed=0, step=step)
        dce_loss(model(xt), x0, xt=xt, weight=weight, reduction="mean", num_items=batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def answers(model: DiffusionTransformer, prompts: Tensor, *, seed: int) -> Tensor:
    """One to each prompt, a token a pass in random order."""
    steps = 4 if QUICK else LENGTH - PROMPT
    options = dict(length=LENGTH, steps=steps, sampler="random", mask_index=MASK)
    return sample(model, num_samples=len(prompts), prompt=prompts, seed=seed, **options)


def reward_of(model: DiffusionTransformer) -> float:
    """Mean reward of answers to prompts that no training sees."""
    prompts = strings(8 if QUICK else 256, seed=1)[:, :PROMPT]
    return rewards(answers(model, prompts, seed=1)).mean().item()


def pairs(model: DiffusionTransformer) -> tuple[Tensor, Tensor]:
    """Of each prompt to which the model has right and wrong answers, one of each: [n, LENGTH] twice."""
    prompts = strings(16 if QUICK else 256, seed=2)[:, :PROMPT].repeat_interleave(GROUP, 0)
    x = answers(model, prompts, seed=2)
    if QUICK:
        x[::GROUP] = strings(16, seed=2)
    right = rewards(x).view(-1, GROUP)
    both = right.amax(1) > right.amin(1)
    x = x.view(-1, GROUP, LENGTH)[both]
    row = torch.arange(len(x))
    return x[row, right[both].argmax(1)], x[row, right[both].argmin(1)]


def dpo(model: DiffusionTransformer, reference: DiffusionTransformer, method: Method, seed: int) -> Iterator[int]:
    """Steps of DPO; each yields the network passes it took."""
    proposal, batch = method.estimator.split()[0], 4 if QUICK else 16
    better, worse = pairs(reference)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0)
    draw = torch.Generator().manual_seed(seed)
    for step in range(2 if QUICK else 48):
        rows = torch.randperm(len(better), generator=draw)[:batch]
        margin = log_likelihood_ratio(
            model,
            better[rows],
            worse[rows],
            mask_index=MASK,
            num_samples=method.passes,
            proposal=proposal,
            target=target(better[rows]),
            seed=1000 * seed + step,
            differentiable=True,
            reference=reference,
        )
        dpo_loss(margin, beta=0.1).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield int(margin.num_forwards.sum())


def grpo(model: DiffusionTransformer, reference: DiffusionTransformer, method: Method, seed: int) -> Iterator[int]:
    """Steps of GRPO, each with fresh answers and two updates; each yields the network passes of likelihoods."""
    options = dict(mask_index=MASK, num_samples=method.passes)
    estimate: Callable[..., NLLEstimate] = partial(time_free_nll, proposal=method.estimator.split()[0], **options)
    if method.estimator.startswith("one pass"):
        estimate = partial(one_pass_nll, prompt_masking=0.15, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0)
    for step in range(2 if QUICK else 24):
        name = 1000 * seed + step
        prompts = strings(4, seed=10**6 + name)[:, :PROMPT].repeat_interleave(GROUP, 0)
        x = answers(model, prompts, seed=name)
        gain = rewards(x).view(-1, GROUP)
        gain = ((gain - gain.mean(1, keepdim=True)) / (gain.std(1, keepdim=True) + 1e-4)).flatten()
        masks = (2 * name, 2 * name + 1)
        before = [estimate(model, x, target=target(x), seed=mask) for mask in masks]
        for mask, old in zip(masks, before, strict=True):
            now = estimate(model, x, target=target(x), seed=mask, differentiable=True)
            grpo_loss(-now.nll, -old.nll, gain, num_tokens=now.num_tokens).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        yield 4 * int(now.num_forwards.sum())


def run(weights: dict[str, Tensor], method: Method, seed: int) -> Curve:
    torch.set_num_threads(1)
    model, reference = (DiffusionTransformer(ModelConfig(MASK + 1, max_length=LENGTH, dim=64, depth=2, heads=4)) for _ in range(2))
    for network in (model, reference):
        network.load_state_dict(weights)
    train = {"DPO": dpo, "GRPO": grpo}[method.objective]
    curve, spent, every = [(0, 0, reward_of(model))], 0, {"DPO": 8, "GRPO": 4}[method.objective]
    for step, passes in enumerate(train(model, reference, method, seed), 1):
        spent += passes
        if QUICK or step % every == 0:
            curve.append((step, spent, reward_of(model)))
    return curve
