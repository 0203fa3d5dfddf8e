"""Text drawn by every sampler, judged by the autoregressive network of the same letters.

Against the number of steps, and around given text. How much a text repeats itself stands beside, for a judge takes
repetition for good text.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from fastdiff.generation.unmasking import SAMPLERS
from fastdiff.loading import Loaded

from . import infilling
from .autoregressive import continued
from .drawing import fill, numbers_of_steps, samplers_of
from .infilling import SEDD, SHOWN, Around, infilled
from .judging import Judged, judged, letters_of, listed, mean, means, shown, sign
from .methods import METHODS, Network
from .networks import LENGTH, letter_text, of_letters, subject, trained, unseen
from .report import Setup, Table, console, reporting
from .texts import Letters

MINUTES = 10
NETWORKS = ("radd", "sedd-absorb", "sedd-uniform", "block")
TRUE, OWN = "held-out text", "autoregressive, the judge itself"


class Drawn(NamedTuple):
    """Sequences [n, L], network passes that each took, and what the judge says of them."""

    tokens: Tensor
    passes: float
    judged: Judged


Curve = dict[int, Drawn]  # by steps
Curves = dict[str, dict[str, Curve]]  # by model and sampler


def run(setup: Setup) -> None:
    """Bits of drawn text against sampling steps, with its repetition, and of text drawn around given text."""
    n, steps, steps_around = (4, (8, 16), 8) if setup.quick else (64, (2, 8, 32, 128), 32)
    with reporting("generation", setup) as report:
        judge, _ = trained("ar", setup, letter_text(setup))
        models = models_of(setup)
        first = next(iter(models.values()))
        x = unseen(setup, first, n)
        own = continued(judge, torch.empty(n, 0, dtype=torch.int64), LENGTH)
        references = {TRUE: judged(judge, letters_of(first, x)), OWN: judged(judge, own)}
        curves = {name: curves_of(name, model, judge, len(x), steps) for name, model in models.items()}
        around = {}
        for name in [setup.model] if setup.model else infilling.NETWORKS:
            whole = curves[name]["tweedie"][steps_around].tokens
            around[name] = infilled(models[name], judge, x, whole, steps_around)
        texts = samples(models, curves) | {OWN: [Letters().decode(row) for row in own[:SHOWN].tolist()]}
        filled = infilling.samples(models, around, x)
        report.numbers = numbers(curves, references) | {"around": infilling.numbers(around, references[TRUE])}
        report.numbers |= {"samples": texts, "filled": filled, "texts": len(x)}
        report.tables = [bits_table(curves, references), repetition_table(curves, references, texts)]
        report.tables.append(infilling.table(around, references[TRUE], steps_around, filled))
        report.figure = picture(curves, around, references)


def models_of(setup: Setup) -> dict[str, Loaded]:
    """The model that --model names, or four networks of the letters; they draw windows of at most LENGTH tokens."""
    if setup.model:
        model = subject(setup)
        return {setup.model: dataclasses.replace(model, length=min(LENGTH, model.length))}
    text = letter_text(setup)
    return {METHODS[name].title: of_letters(name, setup, text) for name in NETWORKS}


def curves_of(name: str, model: Loaded, judge: Network, n: int, asked: tuple[int, ...]) -> dict[str, Curve]:
    """By sampler."""
    found: dict[str, Curve] = {}
    for sampler in samplers_of(model):
        found[sampler] = {}
        for steps in numbers_of_steps(model, sampler, asked):
            drawn = fill(model, sampler, torch.full((n, model.length), -1), steps)
            says = judged(judge, letters_of(model, drawn.tokens))
            found[sampler][steps] = Drawn(drawn.tokens, drawn.num_forwards / n, says)
            console.print(f"{name} by {sampler} in {steps} steps: {says.bits.mean():.2f} bits per letter")
    return found


def samples(models: dict[str, Loaded], curves: Curves) -> dict[str, list[str]]:
    """A few texts of each model by tweedie in the most steps."""
    last = {name: max(by_sampler["tweedie"].items())[1].tokens[:SHOWN] for name, by_sampler in curves.items()}
    return {name: [models[name].tokenizer.decode(row) for row in x.tolist()] for name, x in last.items()}


def numbers(curves: Curves, references: dict[str, Judged]) -> dict[str, Any]:
    """Means over texts and half of their 95% intervals, for JSON."""
    return {
        "references": {name: means(found) for name, found in references.items()},
        "by_steps": {
            name: {
                sampler: {steps: means(drawn.judged) | {"passes": drawn.passes} for steps, drawn in by_steps.items()}
                for sampler, by_steps in by_sampler.items()
            }
            for name, by_sampler in curves.items()
        },
    }


def bits_table(curves: Curves, references: dict[str, Judged]) -> Table:
    notes = [
        f"Under the autoregressive network; ± is half of the 95% interval over {len(references[TRUE].bits)} texts. "
        "2 to so many bits is the generative perplexity of a letter. Drawn in bfloat16, judged in float32. "
        '"ancestral" is "tweedie" by another name, and "euler" comes to the same where noise masks. '
        "Held-out text stands in the last column.",
        *trends(curves),
        *beside_autoregressive(curves, references[OWN]),
    ]
    title = "Bits per letter of drawn text"
    return by_steps_table(title, curves, references, lambda found: shown(mean(found.bits)), notes)


def repetition_table(curves: Curves, references: dict[str, Judged], texts: dict[str, list[str]]) -> Table:
    notes = [
        "The entropy of a text's own letters in bits, and the share of its 4-grams that differ from one another.",
        *repetitions(curves, references[TRUE]),
        *(f"{name}: {drawn[0]}" for name, drawn in texts.items()),
    ]

    def cell(found: Judged) -> str:
        return f"{found.entropy.mean():.2f}, {found.different.mean():.3f}"

    return by_steps_table("Repetition in drawn text", curves, references, cell, notes)


def by_steps_table(
    title: str, curves: Curves, references: dict[str, Judged], cell: Callable[[Judged], str], notes: list[str]
) -> Table:
    lines = {(name, sampler): by_steps for name in curves for sampler, by_steps in curves[name].items()}
    steps = sorted({number for by_steps in lines.values() for number in by_steps})
    rows = [
        [*line, *(cell(by_steps[number].judged) if number in by_steps else "" for number in steps)]
        for line, by_steps in lines.items()
    ]
    rows += [[name, *[""] * len(steps), cell(found)] for name, found in references.items()]
    return Table(title, ["model", "sampler", *(f"{number} steps" for number in steps)], rows, notes)


def trends(curves: Curves) -> list[str]:
    """Where bits fall from the fewest steps to the most, as generative perplexity does in the paper's figure."""
    kinds = {-1: "Bits fall from the fewest steps to the most", 1: "They rise", 0: "They stay within the intervals"}
    found: dict[int, list[tuple[str, str]]] = {kind: [] for kind in kinds}
    for name, by_sampler in curves.items():
        for sampler, by_steps in by_sampler.items():
            if len(by_steps) > 1:
                fewest, most = (by_steps[end(by_steps)].judged.bits for end in (min, max))
                found[sign(most, fewest)].append((name, sampler))
    return [f"{kinds[kind]}: {listed(lines)}." for kind, lines in found.items() if lines]


def beside_autoregressive(curves: Curves, own: Judged) -> list[str]:
    """What a review of the paper says of SEDD and autoregressive networks, and whether it is so here."""
    if SEDD not in curves:
        return []
    most, drawn = max(curves[SEDD]["tweedie"].items())
    agrees = {-1: "as there", 1: "the other way round", 0: "the same, within the intervals"}
    return [
        "The paper's figure is known here from a review, without its numbers. That says that SEDD's text needs no "
        "annealing, with a Mauve of 0.957 where GPT-2's without annealing has 0.802. Here, in bits, and by a judge "
        f"that favours its own: {SEDD} {shown(mean(drawn.judged.bits))} in {most} steps, autoregressive "
        f"{shown(mean(own.bits))}, {agrees[sign(drawn.judged.bits, own.bits)]}."
    ]


def repetitions(curves: Curves, truth: Judged) -> list[str]:
    """Which drawn texts repeat themselves more than held-out text, and which have fewer bits than it."""
    cells = {
        (name, f"{sampler} in {steps}"): drawn.judged
        for name, by_sampler in curves.items()
        for sampler, by_steps in by_sampler.items()
        for steps, drawn in by_steps.items()
    }
    repeat = [line for line, found in cells.items() if sign(found.different, truth.different) < 0]
    fewer = [line for line, found in cells.items() if sign(found.bits, truth.bits) < 0]
    return [
        f"More repetition of 4-grams than in held-out text: {listed(repeat)}.",
        f"Fewer bits than held-out text: {listed(fewer)}.",
    ]


def picture(curves: Curves, around: Around, references: dict[str, Judged]) -> Figure:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    draw_curves(left, middle, curves)
    for color, (name, found) in zip(("k", "0.5"), references.items(), strict=True):
        bits, different = found.bits.mean().item(), found.different.mean().item()
        left.axhline(bits, color=color, linestyle="--", label=name)
        middle.plot(different, bits, "*", color=color, markersize=12)
    left.set_xscale("log", base=2)
    left.set(xlabel="steps", ylabel="bits per letter, by the judge")
    middle.set(xlabel="share of 4-grams that differ", ylabel="bits per letter (stars: see left)")
    left.legend(fontsize="xx-small")
    infilling.draw(right, around, references[TRUE])
    return figure


def draw_curves(left: Axes, middle: Axes, curves: Curves) -> None:
    """A color for each model, a marker for each sampler."""
    markers = dict(zip(SAMPLERS, "oo^sDvPX", strict=True))
    for i, (name, by_sampler) in enumerate(curves.items()):
        for sampler, by_steps in by_sampler.items():
            bits = [mean(drawn.judged.bits) for drawn in by_steps.values()]
            heights, halves = [each["mean"] for each in bits], [each["half"] for each in bits]
            style = dict(color=f"C{i}", marker=markers[sampler], markersize=4, linewidth=1)
            left.errorbar(list(by_steps), heights, halves, label=f"{name}, {sampler}", **style)
            middle.plot([drawn.judged.different.mean() for drawn in by_steps.values()], heights, **style)
