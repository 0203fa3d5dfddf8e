"""DPO and GRPO on a language whose reward can be checked: what the likelihood's estimator is worth, by network passes.

A small masked-diffusion model learns strings of two kinds of brackets, many of them spoiled. Then it is to continue a
prompt so that all brackets match. Writes runs/post_training/: results.json and post_training.png; prints a table.
"""

import io
import json
import os
import random
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastdiff import (
    dce_loss,
    dpo_loss,
    grpo_loss,
    log_likelihood_ratio,
    mask_exactly,
    sample,
    sample_mask_counts,
    time_free_nll,
)
from fastdiff.model import DiffusionTransformer, ModelConfig, write_atomically

plt.switch_backend("Agg")  # files, no windows

OUT = Path("runs/post_training")
QUICK = os.environ.get("FASTDIFF_DEMO_QUICK") == "1"  # a few steps of everything, to see that it runs
BRACKETS, MASK = "()[]", 4
PROMPT, LENGTH = 8, 32
TARGET = torch.arange(LENGTH) >= PROMPT
GROUP = 8  # answers to a prompt
SEEDS = 2 if QUICK else 4
STEPS = 2 if QUICK else 20
console = Console(width=100)


def string(draw: random.Random, spoiled: float) -> list[int]:
    """Matching brackets; then each is replaced by any with probability `spoiled`."""
    tokens, stack = [], []
    for left in range(LENGTH, 0, -1):
        if not stack or (len(stack) < left and draw.random() < 0.5):
            stack.append(draw.randrange(2))
            tokens.append(2 * stack[-1])
        else:
            tokens.append(2 * stack.pop() + 1)
    return [draw.randrange(4) if draw.random() < spoiled else token for token in tokens]


def strings(n: int, *, seed: int, spoiled: float = 0.0) -> Tensor:
    draw = random.Random(seed)
    return torch.tensor([string(draw, spoiled) for _ in range(n)])


def matches(tokens: list[int]) -> bool:
    stack = []
    for token in tokens:
        if token % 2 == 0:
            stack.append(token)
        elif not stack or stack.pop() != token - 1:
            return False
    return not stack


def rewards(x: Tensor) -> Tensor:
    """1 where all brackets match, else 0: [n, LENGTH] -> [n]."""
    return torch.tensor([float(matches(row)) for row in x.tolist()])


def pretrained() -> DiffusionTransformer:
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(len(BRACKETS) + 1, max_length=LENGTH, dim=64, depth=2, heads=4))
    steps, batch = (3, 64) if QUICK else (2000, 64)
    x0 = strings(steps * batch, seed=0, spoiled=0.02).view(steps, batch, LENGTH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    for step, rows in enumerate(x0):
        counts, weight = sample_mask_counts(batch, LENGTH - PROMPT, seed=0, step=step)
        xt, _ = mask_exactly(rows, counts, mask_index=MASK, maskable=TARGET.expand(batch, -1), seed=0, step=step)
        dce_loss(model(xt), rows, xt=xt, weight=weight, reduction="mean", num_items=batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def answers(model: DiffusionTransformer, prompts: Tensor, *, seed: int) -> Tensor:
    return sample(
        model, num_samples=len(prompts), length=LENGTH, prompt=prompts, sampler="random", mask_index=MASK, seed=seed
    )
