"""Variance of a batch's gradient under each way to noise it, at an equal number of rows through the network.

`python benchmarks/gradient_variance.py FILE.json`; some ten minutes on one core. The network, on bytes, is trained
first. Sequences and noise are drawn anew for each batch; every way estimates the same loss, or nearly: shares of masks
below 0.001 are left out where a share is drawn, and not a number of masks.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastdiff.data import NUM_BYTES, Text, load_documents
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.noise.noising import mask_exactly, mask_tokens, sample_mask_counts, sample_times
from fastdiff.noise.times import ImportanceTimes
from fastdiff.training import TrainConfig, train
from fastdiff.training.objectives import Noised, diffusion_loss, noise

ROWS, LENGTH = 32, 64
LEARNED = 256  # steps from which a law of times learns before its gradients are measured
DEFAULT = "dce-k"
Way = Callable[[Tensor, int], Noised]  # rows [ROWS, L] and a step -> what the loss sees


def by_share(method: str, x0: Tensor, step: int) -> Noised:
    """Each token masked with a share that `sample_times` draws."""
    t = sample_times(len(x0), method=method, seed=0, step=step)
    return Noised(x0, mask_tokens(x0, t, mask_index=NUM_BYTES, seed=0, step=step).xt, 0 * t, 1 / t)


def by_count(x0: Tensor, step: int) -> Noised:
    """Exactly m tokens masked, m uniform, independent of other rows."""
    lengths = torch.full((len(x0),), LENGTH)
    counts, weight = (x[:, 0] for x in sample_mask_counts(1, lengths, proposal="uniform", seed=0, step=step))
    return Noised(x0, mask_exactly(x0, counts, mask_index=NUM_BYTES, seed=0, step=step).xt, 0 * weight, weight)


def trained(loss: str, x0: Tensor, step: int, **options: object) -> Noised:
    """As `fastdiff train` does it."""
    return noise(x0, loss, NUM_BYTES + 1, seed=0, step=step, **options)


def learned(
    model, source, loss: str, times: int = 1, *, complementary: bool = False, summed: bool = False
) -> tuple[Way, int]:
    """The same by importance. summed: its law follows squares of summed losses, as in improved DDPM."""
    law = ImportanceTimes(eps=0 if loss == "dce-k" else 1e-3)
    way = partial(trained, loss, law=law, complementary=complementary)
    with torch.no_grad():
        for step in range(LEARNED):
            batch = way(rows(source, -1 - step, times), step)
            losses = diffusion_loss(model, batch, loss)
            law.update(batch.times, losses.sum(1, keepdim=True) if summed else losses)
    return way, times


def rows(source, step: int, times: int) -> Tensor:
    """Sequences of a batch, each so many times; those of steps < 0 are others."""
    n, first = ROWS // times, (step + 10**6) * ROWS
    return source.sequences(first, first + n).repeat_interleave(times, 0)


def ways(model, source) -> dict[str, tuple[Way, int]]:
    """By name, how rows are noised, and how often each sequence is among them."""
    importance = partial(learned, model, source)
    return {
        "dce-lambda, independent shares": (partial(by_share, "iid"), 1),
        "dce-lambda, antithetic shares": (partial(by_share, "antithetic"), 1),
        "dce-lambda": (partial(trained, "dce-lambda"), 1),
        "dce-lambda, importance": importance("dce-lambda"),
        "dce-harmonic": (partial(trained, "dce-harmonic"), 1),
        "dce-k, independent counts": (by_count, 1),
        DEFAULT: (partial(trained, "dce-k"), 1),
        "dce-k, importance": importance("dce-k"),
        "dce-k, importance by summed losses": importance("dce-k", summed=True),
        "dce-k, two masks a sequence": (partial(trained, "dce-k"), 2),
        "dce-k, complementary": (partial(trained, "dce-k", complementary=True), 2),
        "dce-k, complementary, importance": importance("dce-k", 2, complementary=True),
    }


def measure(model, source, way: Way, times: int, repeats: int) -> dict[str, float]:
    """Variance of the gradient by all parameters, from pairs of batches; the loss; and their errors."""
    parameters, last, variances, losses = [*model.parameters()], torch.zeros(()), [], []
    for step in range(repeats):
        loss = diffusion_loss(model, way(rows(source, step, times), step), "dce-k").sum() / (ROWS * LENGTH)
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)])
        losses.append(loss.detach().double())
        if step % 2:
            variances.append((gradient - last).double().square().sum() / 2)
        last = gradient
    variance, loss = torch.stack(variances), torch.stack(losses)
    return {
        "gradient": variance.mean().item(),
        "gradient_stderr": (variance.std() / len(variance) ** 0.5).item(),
        "loss": loss.mean().item(),
        "loss_stderr": (loss.std() / len(loss) ** 0.5).item(),
        "loss_deviation": loss.std().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--repeats", type=int, default=1000, help="batches of each way")
    parser.add_argument("--steps", type=int, default=2000, help="that the network is trained for")
    options = parser.parse_args()
    torch.manual_seed(0)
    source = Text(load_documents("stdlib"), length=LENGTH)
    model = DiffusionTransformer(ModelConfig(NUM_BYTES + 1, max_length=LENGTH, dim=64, depth=2, heads=4))
    config = TrainConfig("dce-k", steps=options.steps, batch_size=ROWS, lr=2e-3, eval_every=0)
    model = train(config, model, source).requires_grad_()
    found = {name: measure(model, source, *way, options.repeats) for name, way in ways(model, source).items()}
    table = Table(title=f"A batch of {ROWS} rows of {LENGTH} bytes, {options.repeats} batches")
    for column in ("", "variance of the gradient", "to the default", "loss", "deviation of the loss"):
        table.add_column(column, justify="right")
    default = found[DEFAULT]
    for name, it in found.items():
        ratio = it["gradient"] / default["gradient"]
        errors = [x["gradient_stderr"] / x["gradient"] for x in (it, default)]
        error = 0 if it is default else ratio * (errors[0] ** 2 + errors[1] ** 2) ** 0.5
        table.add_row(
            name,
            f"{it['gradient']:.3f} ± {it['gradient_stderr']:.3f}",
            f"{ratio:.2f} ± {error:.2f}",
            f"{it['loss']:.3f} ± {it['loss_stderr']:.3f}",
            f"{it['loss_deviation']:.3f}",
        )
    Console(width=140).print(table)
    record = {"torch": torch.__version__, "repeats": options.repeats, "steps": options.steps, "ways": found}
    options.file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
