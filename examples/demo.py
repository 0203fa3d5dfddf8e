"""From nothing to a likelihood with an error bar: train on real text, and on a toy whose truth is known.

Writes runs/demo/: the text model with its metrics, likelihood.png and results.json.
"""

import json
import os
import shutil
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from dna import LETTERS, Conditionals, dna_strings
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastdiff import dce_loss, exact_nll, mask_exactly, sample, sample_mask_counts, time_free_nll
from fastdiff.data import NUM_BYTES, Text, decode, encode, load_documents
from fastdiff.data import Table as Strings
from fastdiff.files import write_atomically
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.training import TrainConfig, train

plt.switch_backend("Agg")  # files, no windows

OUT = Path("runs/demo")
QUICK = os.environ.get("FASTDIFF_DEMO_QUICK") == "1"  # a few steps of everything, to see that it runs
PROPOSALS = ("harmonic", "systematic", "stratified")
PASSES = 8 if QUICK else 64
console = Console(width=100)


def train_text() -> tuple[DiffusionTransformer, Text]:
    """A byte-level masked-diffusion model of the standard library's text."""
    source = Text(load_documents("stdlib"), length=128)
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(NUM_BYTES + 1, max_length=128, dim=128, depth=2, heads=4))
    steps = 3 if QUICK else 3000
    config = TrainConfig("dce-k", steps=steps, batch_size=8, lr=3e-3, warmup=50, eval_every=0, save_every=1000)
    return train(config, model, source, out=OUT / "text", sections={"data": {"path": "stdlib"}}), source


def score_text(model: DiffusionTransformer, source: Text) -> dict[str, tuple[float, float]]:
    """Bits per byte of held-out text and its standard error, at the same number of network passes each."""
    x0, result = source.validation(4 if QUICK else 32), {}
    for proposal in PROPOSALS:
        estimate = time_free_nll(model, x0, mask_index=NUM_BYTES, num_samples=PASSES, proposal=proposal).pooled()
        result[proposal] = (estimate.bits_per_token.item(), estimate.bits_per_token_stderr.item())
    return result


def train_dna() -> tuple[torch.Tensor, torch.Tensor]:
    """True and estimated NLL in nats of all 128 strings, under a network trained on draws of them."""
    strings, p = dna_strings()
    source, mask_index, batch, steps = Strings(strings, num_tokens=4, probs=p), len(LETTERS), 512, 3 if QUICK else 4000
    torch.manual_seed(0)
    model = Conditionals()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for step in track(range(steps), "DNA", console=console, transient=True, disable=not console.is_terminal):
        x0 = source.sequences(step * batch, (step + 1) * batch)
        counts, weight = sample_mask_counts(batch, 8, seed=0, step=step)
        xt, _ = mask_exactly(x0, counts, mask_index=mask_index, seed=0, step=step)
        dce_loss(model(xt), x0, xt=xt, weight=weight, reduction="mean", num_items=batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return -torch.log(p), exact_nll(model, strings, mask_index=mask_index).nll


def draw(text: dict[str, tuple[float, float]], true: torch.Tensor, estimated: torch.Tensor, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    bits, errors = zip(*(text[proposal] for proposal in PROPOSALS), strict=True)
    left.errorbar(PROPOSALS, bits, yerr=[1.96 * e for e in errors], fmt="o", capsize=6)
    left.set(title=f"Held-out text, {PASSES} passes a sequence", ylabel="bits per byte, 95% interval", xlim=(-0.5, 2.5))
    ends = [true.min(), true.max()]
    right.plot(ends, ends, color="0.7")
    right.scatter(true, estimated, s=12)
    right.set(title="128 DNA strings, every subset", xlabel="true NLL (nats)", ylabel="model's NLL (nats)")
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=150)
    os.replace(part, path)


def main() -> None:
    start = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    console.print("[bold]1/3[/] Training a small model on the text of Python's standard library")
    model, source = train_text()
    text = score_text(model, source)
    console.print("[bold]2/3[/] Training on 128 DNA strings whose probabilities are known")
    true, estimated = train_dna()
    console.print("[bold]3/3[/] Sampling from the text model\n")
    prompt = "def __init__(self, "
    sampled = decode(sample(model, length=128, steps=64, prompt=encode(prompt), temperature=0.7)[0])
    console.print(sampled, markup=False, highlight=False)
    draw(text, true, estimated, OUT / "likelihood.png")

    error = (estimated - true).abs()
    table = Table(title="\nWhat was measured, ± standard error", title_justify="left")
    for column in ("what", "value"):
        table.add_column(column)
    for proposal, (bits, stderr) in text.items():
        table.add_row(f"held-out bits per byte, {proposal}, {PASSES} passes", f"{bits:.4f} ± {stderr:.4f}")
    for other in ("systematic", "harmonic"):
        ratio = (text[other][1] / text["stratified"][1]) ** 2
        table.add_row(f"passes that {other} needs for the error of stratified", f"{ratio:.1f}x")
    table.add_row("DNA: largest error of 128 NLLs", f"{error.max():.3f} nats of {true.min():.2f} to {true.max():.2f}")
    table.add_row("DNA: mean error", f"{error.mean():.3f} nats")
    table.add_row("time", f"{time.perf_counter() - start:.0f} s on {torch.get_num_threads()} threads")
    console.print(table)
    console.print(f"Picture: {OUT}/likelihood.png\nNumbers: {OUT}/results.json\nModel and metrics: {OUT}/text")
    results = {"bits_per_byte": text, "passes": PASSES, "dna_largest_error": error.max().item(), "sample": sampled}
    write_atomically(OUT / "results.json", json.dumps(results, indent=1).encode())


if __name__ == "__main__":
    main()
