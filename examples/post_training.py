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
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from multiprocessing import get_context
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
from fastdiff.files import write_atomically
from fastdiff.model import DiffusionTransformer, ModelConfig

plt.switch_backend("Agg")  # files, no windows
torch.set_num_threads(1)  # runs go side by side

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
    Method(objective, estimator, passes)
    for objective, rivals in RIVALS.items()
    for estimator, passes in product((OURS, *rivals), (8, 16))
]
METHODS = METHODS[1::5] if QUICK else METHODS
CONFIG = ModelConfig(MASK + 1, max_length=LENGTH, dim=64, depth=2, heads=4)
Curve = list[tuple[int, int, float]]  # steps done, network passes of all likelihoods, reward
Weights = dict[str, Tensor]
Pairs = tuple[Tensor, Tensor]  # the better answers and the worse, each with its prompt
Steps = Iterator[tuple[Tensor, int]]  # of each step the loss, and the network passes of its likelihoods


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
    model = DiffusionTransformer(CONFIG)
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


def pairs(model: DiffusionTransformer) -> Pairs:
    """Of each prompt to which the model has right and wrong answers, one of each: [n, LENGTH] twice."""
    prompts = strings(16 if QUICK else 128, seed=2)[:, :PROMPT].repeat_interleave(GROUP, 0)
    x = answers(model, prompts, seed=2)
    if QUICK:
        x[::GROUP] = strings(16, seed=2)
    right = rewards(x).view(-1, GROUP)
    both = right.amax(1) > right.amin(1)
    x = x.view(-1, GROUP, LENGTH)[both]
    row = torch.arange(len(x))
    return x[row, right[both].argmax(1)], x[row, right[both].argmin(1)]


def preference_loss(
    model: DiffusionTransformer,
    reference: DiffusionTransformer,
    method: Method,
    better: Tensor,
    worse: Tensor,
    seed: int,
) -> tuple[Tensor, int]:
    """DPO's loss, and the network passes it took."""
    margin = log_likelihood_ratio(
        model,
        better,
        worse,
        mask_index=MASK,
        num_samples=method.passes,
        proposal=method.estimator.split()[0],
        target=target(better),
        seed=seed,
        differentiable=True,
        reference=reference,
    )
    return dpo_loss(margin, beta=0.1).loss, int(margin.num_forwards.sum())


def likelihoods(
    model: DiffusionTransformer, method: Method, x: Tensor, seed: int, *, differentiable: bool = False
) -> NLLEstimate:
    options = dict(
        mask_index=MASK, num_samples=method.passes, target=target(x), seed=seed, differentiable=differentiable
    )
    if method.estimator == "one pass (d1)":
        return one_pass_nll(model, x, prompt_masking=0.15, **options)
    return time_free_nll(model, x, proposal=method.estimator.split()[0], **options)


def drawn(model: DiffusionTransformer, seed: int) -> tuple[Tensor, Tensor]:
    """Answers to a few fresh prompts, and by how much each is better than the others to its prompt."""
    prompts = strings(2, seed=10**6 + seed)[:, :PROMPT].repeat_interleave(GROUP, 0)
    x = answers(model, prompts, seed=seed)
    reward = rewards(x).view(-1, GROUP)
    return x, ((reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)).flatten()


def dpo(model: DiffusionTransformer, reference: DiffusionTransformer, method: Method, seed: int, data: Pairs) -> Steps:
    """Each step takes 8 pairs."""
    draw = torch.Generator().manual_seed(seed)
    for step in range(2 if QUICK else 32):
        rows = torch.randperm(len(data[0]), generator=draw)[:8]
        yield preference_loss(model, reference, method, data[0][rows], data[1][rows], 1000 * seed + step)


def grpo(model: DiffusionTransformer, reference: DiffusionTransformer, method: Method, seed: int, data: Pairs) -> Steps:
    """Each two steps take 16 fresh answers, on other masks in the second."""
    for batch in range(1 if QUICK else 16):
        name = 1000 * seed + batch
        x, gain = drawn(model, name)
        masks = 2 * name, 2 * name + 1
        for mask, old in [(mask, likelihoods(model, method, x, mask)) for mask in masks]:
            now = likelihoods(model, method, x, mask, differentiable=True)
            loss = grpo_loss(-now.nll, -old.nll, gain, num_tokens=now.num_tokens).loss
            yield loss, int(old.num_forwards.sum() + now.num_forwards.sum())


def network(weights: Weights) -> DiffusionTransformer:
    model = DiffusionTransformer(CONFIG)
    model.load_state_dict(weights)
    return model


def trained(weights: Weights, data: Pairs, method: Method, seed: int) -> Curve:
    """The rewards of one run."""
    model, reference = network(weights), network(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4, weight_decay=0)
    curve, spent = [(0, 0, reward_of(model))], 0
    steps = {"DPO": dpo, "GRPO": grpo}[method.objective](model, reference, method, seed, data)
    for step, (loss, passes) in enumerate(steps, 1):
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        spent += passes
        if QUICK or step % 8 == 0:
            curve.append((step, spent, reward_of(model)))
    return curve


def noise(weights: Weights, data: Pairs, method: Method) -> float:
    """What masks add to the first gradient: its variance over seeds, as a share of its squared length."""
    model, reference, repeats = network(weights), network(weights), 2 if QUICK else 16
    x, gain = drawn(model, 0)
    gradients = []
    for seed in range(repeats):
        if method.objective == "DPO":
            loss, _ = preference_loss(model, reference, method, data[0][:8], data[1][:8], seed)
        else:
            now = likelihoods(model, method, x, seed, differentiable=True)
            loss = grpo_loss(-now.nll, None, gain, num_tokens=now.num_tokens).loss
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    every = torch.stack(gradients).double()
    variance = every.var(0).sum()
    return (variance / (every.mean(0).square().sum() - variance / repeats)).item()


def show(method: Method, curves: list[Curve], noise: float) -> list[str]:
    """A line of the table, ± the standard error over seeds."""
    last = [curve[-1][2] for curve in curves]
    whole = [statistics.mean(reward for *_, reward in curve[1:]) for curve in curves]
    cells = [f"{statistics.mean(r):.3f} ± {statistics.stdev(r) / len(r) ** 0.5:.3f}" for r in (last, whole)]
    return [method.objective, method.estimator, f"{method.passes}", *cells, f"{curves[0][-1][1]:,}", f"{noise:.2f}"]


def draw(measured: dict[Method, list[Curve]]) -> bytes:
    """Mean reward and its standard error over seeds, by network passes (above) and by steps (below)."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7), sharey=True, layout="constrained")
    for column, objective in enumerate(RIVALS):
        for method, curves in measured.items():
            if method.objective != objective:
                continue
            color = f"C{[OURS, *RIVALS[objective]].index(method.estimator)}"
            style = dict(color=color, linestyle="-" if method.passes == 8 else "--", marker="o", markersize=3)
            reward = torch.tensor([[reward for *_, reward in curve] for curve in curves])
            error = reward.std(0) / len(curves) ** 0.5
            steps, passes, _ = zip(*curves[0], strict=True)
            for row, x in enumerate((passes, steps)):
                axes[row, column].errorbar(
                    x, reward.mean(0), error, capsize=2, label=f"{method.estimator}, {method.passes} passes", **style
                )
        axes[0, column].set(title=objective, xlabel="network passes for likelihoods")
        axes[1, column].set(xlabel="steps")
        axes[1, column].legend(fontsize="small")
    for row in axes:
        row[0].set(ylabel="share of answers whose brackets match")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    plt.close(figure)
    return picture.getvalue()


def main() -> None:
    start = time.perf_counter()
    console.print("Pretraining, and answers for pairs")
    model = pretrained()
    weights, data = model.state_dict(), pairs(model)
    runs = [(method, seed) for seed in range(SEEDS) for method in METHODS]
    with ProcessPoolExecutor(1 if QUICK else None, mp_context=get_context("spawn")) as pool:
        noises = dict(zip(METHODS, pool.map(partial(noise, weights, data), METHODS), strict=True))
        curves = pool.map(partial(trained, weights, data), *zip(*runs, strict=True))
        shown = track(curves, "Training", total=len(runs), console=console, disable=not console.is_terminal)
        measured: dict[Method, list[Curve]] = {method: [] for method in METHODS}
        for (method, _), curve in zip(runs, shown, strict=True):
            measured[method].append(curve)

    table = Table(
        title=f"\nReward, ± standard error over {SEEDS} seeds; before, {curve[0][2]:.3f}", title_justify="left"
    )
    for name in ("", "likelihood", "passes", "at the end", "on the way", "passes in all", "noise"):
        table.add_column(name)
    for method in METHODS:
        table.add_row(*show(method, measured[method], noises[method]))
    table.caption = "Noise: variance of the first gradient over masks, as a share of its squared length."
    console.print(table)
    OUT.mkdir(parents=True, exist_ok=True)
    write_atomically(OUT / "post_training.png", draw(measured))
    seconds = time.perf_counter() - start
    results = [m._asdict() | {"curves": measured[m], "noise": noises[m]} for m in METHODS]
    write_atomically(OUT / "results.json", json.dumps({"seconds": seconds, "methods": results}, indent=1).encode())
    console.print(f"{seconds:.0f} s. Picture: {OUT}/post_training.png\nNumbers: {OUT}/results.json")


if __name__ == "__main__":
    main()
