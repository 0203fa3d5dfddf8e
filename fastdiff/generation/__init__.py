"""The reverse process: tokens drawn from logits, steps backwards, whole sequences."""

from fastdiff.generation.block_cache import BlockCache, Cache
from fastdiff.generation.mixture_step import mixture_reverse_step
from fastdiff.generation.reverse import reverse_probs, reverse_step
from fastdiff.generation.sampling import Generated, sample
from fastdiff.generation.soft_embeddings import linear_soft_embeddings
from fastdiff.generation.tokens import TokenStats, linear_sample_tokens, sample_tokens

__all__ = [
    "BlockCache",
    "Cache",
    "Generated",
    "TokenStats",
    "linear_sample_tokens",
    "linear_soft_embeddings",
    "mixture_reverse_step",
    "reverse_probs",
    "reverse_step",
    "sample",
    "sample_tokens",
]
