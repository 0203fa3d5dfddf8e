"""Text drawn around what is given at any position: at an end, in the middle, every other word."""

from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from torch import Tensor

from fastdiff.loading import Loaded

from .drawing import fill, samplers_of
from .judging import Judged, judged, letters_of, listed, mean, means, shown, sign
from .methods import METHODS, Network
from .report import Table

UNSEEING = "tweedie, not seeing what is given"
MARKERS = {UNSEEING: "x", "tweedie": "o", "first_hitting": "^", "confidence": "s"}
START, BETWEEN = "the first half", "both ends"
PLACES = (START, "the last half", "the middle half", BETWEEN, "every other word")
SEDD = METHODS["sedd-absorb"].title
NETWORKS = (METHODS["radd"].title, SEDD)
SHOWN = 3  # texts in the JSON


class Filled(NamedTuple):
    tokens: Tensor  # [n, L]
    judged: Judged


ByPlace = dict[str, Filled]  # by what is given
Around = dict[str, dict[str, ByPlace]]  # by model and sampler


def given_places(model: Loaded, x: Tensor) -> dict[str, Tensor]:
    """True where a token is given, half of them or about so: bool [n, L]."""
    at, length = torch.arange(x.shape[1]).expand(x.shape), x.shape[1]
    middle = (at >= length // 4) & (at < length - length // 4)
    begins = torch.tensor([[model.tokenizer.decode([token]).startswith(" ") for token in row] for row in x.tolist()])
    given = at < length // 2, at >= length // 2, middle, ~middle, begins.cumsum(1) % 2 == 0
    return dict(zip(PLACES, given, strict=True))


def infilled(model: Loaded, judge: Network, truth: Tensor, whole: Tensor, steps: int) -> dict[str, ByPlace]:
    """By sampler; and with letters of `whole` [n, L], which were drawn with nothing given."""
    places = given_places(model, truth)
    found = {UNSEEING: {place: truth.where(given, whole) for place, given in places.items()}}
    for sampler in samplers_of(model):
        if sampler in MARKERS:
            found[sampler] = {
                place: fill(model, sampler, truth.where(given, -1), steps).tokens for place, given in places.items()
            }
    return {
        sampler: {place: Filled(x, judged(judge, letters_of(model, x))) for place, x in by_place.items()}
        for sampler, by_place in found.items()
    }


def more_bits(found: Filled, truth: Judged) -> dict[str, float]:
    """Than the true text has, pair by pair."""
    return mean(found.judged.bits - truth.bits)


def samples(models: dict[str, Loaded], around: Around, x: Tensor) -> dict[str, dict[str, list[str]]]:
    """A few texts of each model by tweedie, by what was given, with what was drawn in capitals."""
    found = {}
    for name in around:
        model = models[name]
        places = given_places(model, x)
        found[name] = {
            place: [marked(model, *pair) for pair in zip(filled.tokens[:SHOWN], places[place], strict=False)]
            for place, filled in around[name]["tweedie"].items()
        }
    return found


def marked(model: Loaded, tokens: Tensor, given: Tensor) -> str:
    parts = [model.tokenizer.decode([token]) for token in tokens.tolist()]
    return "".join(part if kept else part.upper() for part, kept in zip(parts, given.tolist(), strict=True))


def numbers(around: Around, truth: Judged) -> dict[str, Any]:
    """For JSON."""
    return {
        name: {
            sampler: {
                place: means(found.judged) | {"more_bits": more_bits(found, truth)} for place, found in by_place.items()
            }
            for sampler, by_place in by_sampler.items()
        }
        for name, by_sampler in around.items()
    }


def table(around: Around, truth: Judged, steps: int, texts: dict[str, dict[str, list[str]]]) -> Table:
    rows = []
    for name, by_sampler in around.items():
        for sampler, by_place in by_sampler.items():
            cells = [shown(more_bits(found, truth), "+") for found in by_place.values()]
            different = torch.cat([found.judged.different for found in by_place.values()]).mean()
            rows.append([name, sampler, *cells, f"{different:.3f}"])
    notes = [
        f"Of the whole text, whose true bits are {shown(mean(truth.bits))}; ± is half of the 95% interval of the "
        f"differences, text by text. In {steps} steps, but for first_hitting, which takes one for each token. Held-out "
        f"text has {truth.different.mean():.3f} of its 4-grams different.",
        *use_of_given(around),
        *beside_prompts(around, truth),
        *(f"{name}, drawn in capitals: {text}" for name in texts for text in texts[name][BETWEEN][:2]),
    ]
    head = ["model", "sampler", *(f"{place} given" for place in PLACES), "4-grams that differ"]
    return Table("Infilling: bits per letter above those of the true text", head, rows, notes)


def use_of_given(around: Around) -> list[str]:
    """Where seeing what is given makes text of fewer bits."""
    kinds = {-1: "Seeing what is given takes bits away", 1: "It adds bits", 0: "It makes no difference"}
    found: dict[int, list[tuple[str, str]]] = {kind: [] for kind in kinds}
    for name, by_sampler in around.items():
        for place, unseeing in by_sampler[UNSEEING].items():
            seeing = by_sampler["tweedie"][place].judged
            found[sign(seeing.bits, unseeing.judged.bits)].append((name, place))
    return [f"{kinds[kind]}, by tweedie: {listed(lines)}." for kind, lines in found.items() if lines]


def beside_prompts(around: Around, truth: Judged) -> list[str]:
    """What a review of the paper says of infilling and going on from a prompt, and whether it is so here."""
    if SEDD not in around:
        return []
    prompted, between = (around[SEDD]["tweedie"][place] for place in (START, BETWEEN))
    found = {-1: "fewer", 1: "more", 0: "no more and no fewer, within the intervals"}
    return [
        "A review of the paper has SEDD's Mauve, 0.957 after prompts and 0.942 in infilling, almost as good. "
        f"Here {SEDD} has {shown(more_bits(prompted, truth), '+')} after the first half and "
        f"{shown(more_bits(between, truth), '+')} between both ends: "
        f"{found[sign(between.judged.bits, prompted.judged.bits)]}."
    ]


def draw(axes: Axes, around: Around, truth: Judged) -> None:
    lines = [(name, sampler) for name, by_sampler in around.items() for sampler in by_sampler]
    for i, (name, sampler) in enumerate(lines):
        bits = [more_bits(found, truth) for found in around[name][sampler].values()]
        x = [place + (i - len(lines) / 2) * 0.8 / len(lines) for place in range(len(bits))]
        style = dict(color=f"C{list(around).index(name)}", marker=MARKERS[sampler], linestyle="", markersize=4)
        heights, halves = [each["mean"] for each in bits], [each["half"] for each in bits]
        axes.errorbar(x, heights, halves, label=f"{name}, {sampler}", **style)
    axes.axhline(0, color="k", linestyle="--")
    axes.set_xticks(range(len(PLACES)), [place.replace(" ", "\n", 1) for place in PLACES])
    axes.set(ylabel="bits per letter above the true text's", xlabel="given")
    axes.legend(fontsize="xx-small")
