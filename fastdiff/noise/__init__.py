"""The forward process: graphs, masks, corrupted tokens and times. Schedules are in `fastdiff.schedules`."""

from fastdiff.noise.blocks import MaskedBlocks, block_causal, mask_blocks, two_streams, two_streams_mask
from fastdiff.noise.graphs import Absorbing, Uniform
from fastdiff.noise.mixture import Mixture, mixture_weight
from fastdiff.noise.noising import (
    HarmonicMask,
    Masked,
    corrupt,
    harmonic_mask,
    mask_exactly,
    mask_tokens,
    sample_mask_counts,
    sample_times,
)
from fastdiff.noise.times import ImportanceTimes

__all__ = [
    "Absorbing",
    "HarmonicMask",
    "ImportanceTimes",
    "Masked",
    "MaskedBlocks",
    "Mixture",
    "Uniform",
    "block_causal",
    "corrupt",
    "harmonic_mask",
    "mask_blocks",
    "mask_exactly",
    "mask_tokens",
    "mixture_weight",
    "sample_mask_counts",
    "sample_times",
    "two_streams",
    "two_streams_mask",
]
