"""Time-free likelihood: NLL(x0) = sum_m E_{|S| = m} [(1/m) sum_{i in S} -log c(x0_i | x0 with S masked)]."""

import math

import torch
from torch import Tensor


def subsets(length: int) -> tuple[Tensor, Tensor]:
    """All non-empty masks, bool [2^L - 1, L], and their weights 1 / (m C(L, m)) on the summed loss."""
    codes = torch.arange(1, 2**length, device="cpu")
    masks = (codes.unsqueeze(1) >> torch.arange(length, device="cpu")) & 1 == 1
    return masks, subset_weight(torch.full_like(codes, length), masks.sum(1))


def subset_weight(length: Tensor, m: Tensor) -> Tensor:
    """1 / (m C(L, m)), float64: what the summed loss of one subset of m >= 1 among L tokens counts for."""
    size = int(length.max()) + 1
    table = [[j * math.comb(i, j) for j in range(size)] for i in range(size)]
    return 1 / torch.tensor(table, dtype=torch.float64, device=length.device)[length, m]


def count_law(length: int, proposal: str) -> Tensor:
    """q(m) for m = 1..L, float64: 1/(m H_L) for "harmonic", 1/L for "uniform". The weight is 1/(m q(m))."""
    m = torch.arange(1, length + 1, dtype=torch.float64, device="cpu")
    return (1 / m) / (1 / m).sum() if proposal == "harmonic" else torch.full_like(m, 1 / length)
