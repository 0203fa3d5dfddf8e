"""Networks of strings of ACGT whose true likelihoods are known, and how near theirs come."""

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from rich.progress import track
from torch import Tensor, nn

from fastdiff import NLLEstimate, dce_loss, mask_exactly, sample_mask_counts
from fastdiff.data import Table as Strings

from ..dna import LETTERS
from .report import console

MASK = len(LETTERS)


def fit(model: nn.Module, source: Strings, target: Tensor, *, steps: int, batch: int, lr: float) -> nn.Module:
    """Trains the conditionals of the target positions [L]: only they are masked, m of them, m uniform."""
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    for step in track(range(steps), "strings", console=console, disable=not console.is_terminal):
        x0 = source.sequences(step * batch, (step + 1) * batch)
        counts, weight = sample_mask_counts(batch, int(target.sum()), seed=0, step=step)
        maskable = target.expand(batch, -1)
        xt, _ = mask_exactly(x0, counts, mask_index=MASK, maskable=maskable, seed=0, step=step)
        dce_loss(model(xt), x0, xt=xt, weight=weight, reduction="mean", num_items=batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def agreement(estimated: Tensor, true: Tensor) -> dict[str, float]:
    error = (estimated - true).abs()
    correlation = torch.corrcoef(torch.stack([estimated, true]))[0, 1]
    return {"correlation": correlation.item(), "mean error": error.mean().item(), "largest error": error.max().item()}


def shown(numbers: dict[str, float]) -> list[str]:
    """The cells of an agreement."""
    return [f"{numbers['correlation']:.4f}", f"{numbers['mean error']:.3f}", f"{numbers['largest error']:.3f}"]


def picture(true: Tensor, estimate: NLLEstimate, title: str, exact: Tensor | None = None) -> Figure:
    """Estimates against the truth, and over every subset where that was affordable."""
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    axes.axline((true.mean().item(),) * 2, slope=1, color="0.7")
    half, passes = estimate.interval()[1] - estimate.nll, int(estimate.num_forwards.max())
    drawn = dict(fmt="o", markersize=3, linewidth=0.8, color="tab:red", label=f"{passes} passes, 95% interval")
    axes.errorbar(true, estimate.nll, yerr=half, **drawn)
    if exact is not None:
        axes.scatter(true, exact, s=10, color="black", zorder=3, label="every subset")
    axes.set(title=title, xlabel="true NLL (nats)", ylabel="model's NLL (nats)")
    axes.legend(loc="upper left")
    return figure
