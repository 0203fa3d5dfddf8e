"""Zero-shot: one model on texts that it was not trained on, by the unit in which it was trained."""

import math

import matplotlib.pyplot as plt
import torch

from fastdiff.loading import Loaded

from .networks import subject, unseen
from .report import Setup, Table, reporting
from .texts import english, other_english, windows

MINUTES = 1


def run(setup: Setup) -> None:
    """Bits per token of text like that of training, of other English, and of the first with its words shuffled."""
    model, (n, passes) = subject(setup), (4, 4) if setup.quick else (64, 32)
    like_training = unseen(setup, model, n)
    texts = {
        "text like that of training": like_training,
        "the same, its words shuffled": shuffled(english(setup.text, setup.out), model, n),
        "Python's help on itself": windows(other_english(), model.tokenizer, model.length, n),
    }
    with reporting("zero_shot", setup) as report:
        rows, numbers = [], {}
        for name, x0 in texts.items():
            estimate = model.estimate(x0[:, :0], x0, torch.arange(len(x0)), num_samples=passes)
            bits = estimate.nll / x0.shape[1] / math.log(2)
            half = 1.96 * bits.std().item() / math.sqrt(len(bits))
            masking = estimate.pooled().bits_per_token_stderr.item()
            numbers[name] = {"bits": bits.tolist(), "mean": bits.mean().item(), "half": half, "masking": masking}
            perplexity = 2 ** bits.mean().item()
            rows.append([name, f"{bits.mean():.3f} ± {half:.3f}", f"{masking:.4f}", f"{perplexity:.2f}"])
        report.numbers = {"texts": numbers}
        notes = [
            f"± is half of the 95% interval over {n} windows of {like_training.shape[1]} tokens.",
            "Published models on the benchmarks of their papers: `fastdiff table`, which prints the papers' numbers "
            "too.",
        ]
        head = ["text", "bits per token", "standard error of masks", "perplexity"]
        report.tables = [Table("One model, three texts", head, rows, notes)]
        report.figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
        axes.boxplot([numbers[name]["bits"] for name in numbers], tick_labels=list(numbers))
        axes.set(ylabel="bits per token of a window")


def shuffled(text: str, model: Loaded, n: int) -> torch.Tensor:
    """Windows of a text whose words are in a random order."""
    words = text.split()
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0))
    return windows(" ".join(words[i] for i in order.tolist()), model.tokenizer, model.length, n)
