"""What a judge says of texts: bits under the autoregressive network, and beside them how much a text repeats itself."""

import math
from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastdiff.loading import Loaded

from .methods import Network, autoregressive_nll
from .networks import LENGTH
from .texts import Letters


class Judged(NamedTuple):
    """Of n texts, float64 [n] each."""

    bits: Tensor  # per letter, by the judge
    entropy: Tensor  # of the text's own letters, in bits
    different: Tensor  # share of its 4-grams that differ from each other


def judged(judge: Network, texts: Iterable[Tensor]) -> Judged:
    """Of the letters of each text."""
    texts, measures = list(texts), (partial(bits_per_letter, judge), entropy, share_of_different)
    return Judged(*(torch.tensor([measure(text) for text in texts], dtype=torch.float64) for measure in measures))


def letters_of(model: Loaded, x: Tensor) -> Iterable[Tensor]:
    """The letters of a model's tokens [n, L]; of a text that has none, a space."""
    if isinstance(model.tokenizer, Letters):
        return x
    return [torch.tensor(Letters().encode(model.tokenizer.decode(tokens)) or [0]) for tokens in x.tolist()]


def bits_per_letter(judge: Network, letters: Tensor) -> float:
    nll = sum(autoregressive_nll(judge, window.unsqueeze(0)).item() for window in letters.split(LENGTH))
    return nll / len(letters) / math.log(2)


def entropy(letters: Tensor) -> float:
    return torch.special.entr(letters.bincount() / len(letters)).sum().item() / math.log(2)


def share_of_different(letters: Tensor) -> float:
    grams = letters.unfold(0, min(4, len(letters)), 1)
    return len(grams.unique(dim=0)) / len(grams)


def mean(values: Tensor) -> dict[str, float]:
    """And half of its 95% interval, over texts."""
    return {"mean": values.mean().item(), "half": 1.96 * values.std().item() / math.sqrt(len(values))}


def means(found: Judged) -> dict[str, dict[str, float]]:
    return {name: mean(values) for name, values in found._asdict().items()}


def shown(found: dict[str, float], signed: str = "") -> str:
    return f"{found['mean']:{signed}.2f} ± {found['half']:.2f}"


def sign(a: Tensor, b: Tensor) -> int:
    """Of the difference of two means; 0 within its 95% interval."""
    difference = a.mean() - b.mean()
    half = 1.96 * math.hypot(*(values.std().item() / math.sqrt(len(values)) for values in (a, b)))
    return int(difference.sign()) if abs(difference) > half else 0


def listed(lines: list[tuple[str, str]]) -> str:
    """What there is of each model."""
    by_model: dict[str, list[str]] = {}
    for name, what in lines:
        by_model.setdefault(name, []).append(what)
    return "; ".join(f"{name}: {', '.join(what)}" for name, what in by_model.items()) or "none"
