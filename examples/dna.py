"""The DNA toy of Jeon et al. (2025): a small distribution over strings whose true likelihood is known."""

import torch
from torch import Tensor

LETTERS = "ACGT"


def dna_strings(seed: int = 0) -> tuple[Tensor, Tensor]:
    """128 distinct strings of length 8 over ACGT, int64 [128, 8], and p proportional to exp(u / 0.5), u uniform."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randperm(4**8, generator=generator)[:128]
    strings = (codes.unsqueeze(1) >> (2 * torch.arange(8))) & 3
    return strings, torch.softmax(torch.rand(128, dtype=torch.float64, generator=generator) / 0.5, 0)
