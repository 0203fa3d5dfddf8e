"""How well a number tells texts from the true ones: the area under the curve of hits against false alarms (AUC)."""

from typing import NamedTuple

import torch
from torch import Tensor

RESAMPLES = 1000


class Area(NamedTuple):
    value: float
    error: float  # its standard error

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


def area_under_curve(nll: Tensor, true: Tensor) -> Area:
    """P(a text is less likely than a true one) of [n] and [n], ties by half.

    The error is of a bootstrap over windows, each drawn with both of its texts; 0 where all are told apart.
    """
    n = len(true)
    less = (nll.unsqueeze(1) > true).double() + (nll.unsqueeze(1) == true).double() / 2
    drawn = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(RESAMPLES, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
    areas = ((counts @ less) * counts).sum(1) / n**2
    return Area(less.mean().item(), areas.std().item())


def findings(areas: dict[str, Area]) -> list[str]:
    """Which areas are two standard errors from a half, on either side."""
    kinds = {
        "Less likely than true responses": lambda area: area.value - 2 * area.error > 0.5,
        "Likelier than true responses": lambda area: area.value + 2 * area.error < 0.5,
        "Not told from true responses": lambda area: abs(area.value - 0.5) <= 2 * area.error,
    }
    found = {kind: [name for name, area in areas.items() if holds(area)] for kind, holds in kinds.items()}
    return [f"{kind}: {'; '.join(names)}." for kind, names in found.items() if names]


def settled(areas: dict[int, Area], final: Area) -> str:
    """The fewest passes from which on areas are within the final one's standard error of it."""
    off = [passes for passes, area in areas.items() if abs(area.value - final.value) > final.error]
    return str(min((passes for passes in areas if passes > max(off, default=0)), default="never"))
