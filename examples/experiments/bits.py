"""Bits per character: eight methods, one backbone, one budget, beside the paper's table for text8."""

import json
import math
from functools import partial

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from fastdiff.files import write_atomically
from fastdiff.model import DiffusionTransformer

from .methods import METHODS
from .networks import LENGTH, Curve, letter_text, trained
from .report import Setup, Table, console, reporting
from .texts import LetterText
from .workers import side_by_side

MINUTES = 50


def run(setup: Setup) -> None:
    """Bits per character of eight methods on held-out text, and their curves."""
    text, curves, nll = letter_text(setup), {}, {}
    with reporting("bits", setup) as report:
        jobs = [partial(curve_and_likelihoods, name, setup) for name in METHODS]
        for name, (curves[name], nll[name]) in zip(METHODS, side_by_side(jobs), strict=True):
            bits = nll[name] / LENGTH / math.log(2)
            console.print(f"{METHODS[name].title}: {bits.mean():.3f} bits per character")
        found = {name: interval(values) for name, values in nll.items()}
        report.numbers = {"bits": found, "curves": curves, "windows": len(nll["ar"]), "letters": len(text)}
        report.tables = [table(found, curves, text)]
        report.figure = picture(curves, found)


def curve_and_likelihoods(name: str, setup: Setup) -> tuple[Curve, Tensor]:
    text = letter_text(setup)
    model, curve = trained(name, setup, text)
    return curve, likelihoods(name, model, text, setup)


def likelihoods(name: str, model: DiffusionTransformer, text: LetterText, setup: Setup) -> Tensor:
    """In nats, of every held-out window: [n], kept beside the network."""
    windows, passes = (4, 4) if setup.quick else (128, 32)
    kept = setup.out / "networks" / name / "nll.json"
    wanted = {"windows": windows, "passes": passes, "steps": setup.steps, "text": text.fingerprint}
    found = json.loads(kept.read_text()) if kept.exists() else {}
    if found.get("of") != wanted:
        nll = METHODS[name].nll(model, text.validation(windows), passes)
        found = {"of": wanted, "nll": nll.tolist()}
        write_atomically(kept, json.dumps(found).encode())
    return torch.tensor(found["nll"], dtype=torch.float64)


def interval(nll: Tensor) -> dict[str, float]:
    """The mean over windows, and half of its 95% interval, which is of texts and of masks alike; bits per character."""
    bits = nll / LENGTH / math.log(2)
    return {"bits": bits.mean().item(), "half": 1.96 * bits.std().item() / math.sqrt(len(bits))}


def table(found: dict[str, dict[str, float]], curves: dict[str, Curve], text: LetterText) -> Table:
    rows = []
    for name in sorted(found, key=lambda name: found[name]["bits"]):
        method, ours = METHODS[name], found[name]
        paper = "" if method.paper is None else f"{method.paper:.2f}"
        minutes = curves[name]["cpu_seconds"][-1] / 60
        rows.append([method.title, f"{ours['bits']:.3f} ± {ours['half']:.3f}", paper, f"{minutes:.1f}"])
    letters = curves["ar"]["letters"][-1]
    notes = [
        f"± is half of the 95% interval over held-out windows of {LENGTH} letters, of one training each: other "
        "seeds would move it. All but the autoregressive are bounds.",
        f"{letters / 1e6:.1f} million letters seen, of a text of {len(text) / 1e6:.1f} million. The paper's networks "
        "saw text8, for a million steps of 512 windows of 256.",
        *orders(found),
    ]
    return Table("Bits per character", ["method", "here", "paper, text8", "CPU minutes of training"], rows, notes)


def orders(found: dict[str, dict[str, float]]) -> list[str]:
    """Whether the methods come in the paper's order, pair by pair."""
    known = sorted((name for name in found if METHODS[name].paper), key=lambda name: METHODS[name].paper)
    turned = [
        f"{METHODS[better].title} before {METHODS[worse].title}"
        for i, better in enumerate(known)
        for worse in known[i + 1 :]
        if found[better]["bits"] > found[worse]["bits"]
    ]
    if not turned:
        return ["The order is the paper's."]
    return ["The paper has, and we have the other way round: " + "; ".join(turned) + "."]


def picture(curves: dict[str, Curve], found: dict[str, dict[str, float]]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", width_ratios=(3, 2))
    for name, curve in curves.items():
        left.plot([n / 1e6 for n in curve["letters"]], curve["bits"], label=METHODS[name].title, marker=".")
    left.set(xlabel="letters seen (millions)", ylabel="bits per character, held out")
    left.legend(fontsize="small")
    names = sorted(found, key=lambda name: -found[name]["bits"])
    for place, name in enumerate(names):
        right.errorbar(found[name]["bits"], place, xerr=found[name]["half"], fmt="o", color="tab:blue", capsize=3)
        if METHODS[name].paper:
            right.plot(METHODS[name].paper, place, "x", color="0.4")
    right.set_yticks(range(len(names)), [METHODS[name].title for name in names])
    right.set(xlabel="bits per character (crosses: the paper, text8)")
    return figure
