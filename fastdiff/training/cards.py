"""GPUs: what their data sheets say."""

from typing import NamedTuple

USABLE = 0.9  # of a card's memory: the rest is for the context, libraries and fragments


class Card(NamedTuple):
    """A part of the device's name, memory in bytes, and dense bfloat16 operations a second."""

    device: str
    memory: float
    peak: float


# From NVIDIA's data sheets; what is said there "with sparsity" is halved. A longer name stands before its beginning.
_CARDS = [
    Card("A100", 40e9, 312e12),
    Card("A100", 80e9, 312e12),
    Card("H100 PCIe", 80e9, 756e12),
    Card("H100 NVL", 94e9, 835e12),
    Card("H100", 80e9, 989e12),
    Card("H200", 141e9, 989e12),
    Card("B200", 192e9, 2250e12),
]
CARDS = {f"{card.device} {card.memory / 1e9:.0f} GB": card for card in _CARDS}


def peak_of(name: str) -> float | None:
    """Of the device of that name, where it is known."""
    return next((card.peak for card in _CARDS if card.device in name), None)
