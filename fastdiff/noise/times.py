"""Times drawn where the gradient varies most: a law learned from the losses that were met there."""

import torch
import torch.distributed as dist
from torch import Tensor

from fastdiff.checks import check_integer, check_tensor
from fastdiff.philox import Purpose, resolve_seed, uniform

RENEWED = 32  # updates between changes of the law, for each of which the host waits for the device once


class ImportanceTimes:
    """A law of times in [eps, 1), piecewise constant, that brings the variance of a weighted loss's gradient down.

    Best is a density in proportion to the root of the gradient's mean square. That of a row follows, over a wide range
    of times, the sum over tokens of squared losses, which costs nothing: the square of their sum, as in improved DDPM,
    grows with the number of masks where the gradient shrinks. The law follows the means of these sums in equal bins,
    over the last updates. A mean of losses times `weight` is unbiased whatever was learned, for a law depends on
    earlier steps alone.

    Args:
        eps: the smallest time.
        bins: how many parts of [eps, 1) have a density each.
        share: of the times that are drawn uniformly. No weight is more than 1 / share.

    Raises:
        ValueError: an argument out of range.
    """

    def __init__(self, *, eps: float = 1e-3, bins: int = 32, share: float = 0.1) -> None:
        self.eps, self.bins, self.share = eps, check_integer("bins", bins, 1), share
        if not 0 <= eps < 1 or not 0 < share <= 1:
            raise ValueError(f"eps, share: expected 0 <= eps < 1 and 0 < share <= 1, got {eps} and {share}")
        self._density = torch.ones(bins, dtype=torch.float64, device="cpu")
        self._met = torch.zeros(2, bins, dtype=torch.float64, device="cpu")  # squares, and rows, by bin
        self._updates = torch.zeros((), dtype=torch.int64, device="cpu")

    def sample(self, n: int, *, seed: int, step: int = 0) -> tuple[Tensor, Tensor]:
        """Draws n times, one in each of n parts of equal probability, in rising order, and their weights 1 / density.

        Args:
            n: times of the whole batch; as in `sample_mask_counts`, rows must take them in an order of their own.
            seed, step: name the draws, which are those of `sample_times`; with the same updates the same times.

        Returns:
            t and weight, float64 [n] on the CPU.
        """
        index = torch.arange(check_integer("n", n, 1), device="cpu")
        key = resolve_seed(seed, None, None)
        v = (index + uniform(key, Purpose.TIME, check_integer("step", step), 0, 0, index)) / n
        ends = self._density.cumsum(0) / self.bins
        at = torch.searchsorted(ends, v, right=True).clamp_max(self.bins - 1)
        density = self._density[at]
        u = (at + 1 - (ends[at] - v) * self.bins / density) / self.bins
        return self.eps + (1 - self.eps) * u.clamp(0, 1 - 2**-53), 1 / density

    def update(self, t: Tensor, losses: Tensor, group: "dist.ProcessGroup | None" = None) -> None:
        """Learns from the rows of a step; every `RENEWED` calls the law changes.

        Args:
            t: [n] float64 times as drawn, on the CPU.
            losses: [n, L], of tokens, each times the row's `weight`.
            group: the ranks that have the other rows of the step; all call this.

        Raises:
            ValueError, TypeError: tensors of another shape or type.
        """
        check_tensor("t", t)
        check_tensor("losses", losses)
        if t.dim() != 1 or t.dtype != torch.float64 or losses.dim() != 2 or len(losses) != len(t):
            what = f"{t.dtype} {tuple(t.shape)} and {tuple(losses.shape)}"
            raise ValueError(f"t, losses: expected float64 [n] and [n, L], got {what}")
        at = ((t - self.eps) / (1 - self.eps) * self.bins).long().clamp(0, self.bins - 1)
        at, density, before = (x.to(losses.device, non_blocking=True) for x in (at, self._density[at], self._met))
        squares = (losses.detach() * density.unsqueeze(1)).square().sum(1)
        met = torch.zeros_like(before).index_add_(1, at, torch.stack([squares, torch.ones_like(squares)]))
        if group is not None:
            dist.all_reduce(met, group=group)
        self._met = before + met
        self._updates += 1
        if self._updates % RENEWED == 0:
            self._renew()

    def _renew(self) -> None:
        """The law of what was met, of which half is remembered."""
        squares, rows = self._met.cpu()
        if (rows > 0).all() and squares.sum() > 0:
            root = (squares / rows).sqrt()
            self._density = self.share + (1 - self.share) * root / root.mean()
        self._met = self._met / 2

    def state_dict(self) -> dict[str, Tensor]:
        return {"density": self._density, "met": self._met, "updates": self._updates}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._density, self._met, self._updates = (state[name].clone() for name in ("density", "met", "updates"))
