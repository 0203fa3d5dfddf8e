"""Sizes with names: what `fastdiff train --preset` trains and `fastdiff plan` reckons with."""

from typing import NamedTuple

from fastdiff.model import ModelConfig
from fastdiff.training.config import TrainConfig

COND_DIM = 128  # of a model that sees the noise level, as SEDD's
_GPT2 = 50257 + 1  # ids of its tokenizer, and the mask
_LLADA = 126464


class Preset(NamedTuple):
    """A shape, whose num_states is that of the vocabulary it is usually trained on; and how it is trained."""

    model: ModelConfig
    training: TrainConfig


def _rotary(num_states: int, length: int, dim: int, depth: int, heads: int) -> ModelConfig:
    return ModelConfig(num_states, length, dim, depth, heads, learned_positions=False)


# Settings of SEDD's configs, and of LLaDA's report (batches of 1280, weight decay 0.1), rounded to a power of 2.
_SMALL = TrainConfig(batch_size=512, lr=3e-4, warmup=2500, weight_decay=0.0, dtype="bfloat16")
_LARGE = TrainConfig(
    batch_size=1024, lr=4e-4, warmup=2000, weight_decay=0.1, dtype="bfloat16", sharding="full", recompute=True
)

PRESETS = {
    "tiny": Preset(ModelConfig(257, 128, 128, 2, 4), TrainConfig(batch_size=8, lr=3e-3, warmup=50)),  # the demo's
    "gpt2-small": Preset(_rotary(_GPT2, 1024, 768, 12, 12), _SMALL),  # SEDD's small
    "gpt2-medium": Preset(_rotary(_GPT2, 1024, 1024, 24, 16), _SMALL),  # SEDD's medium
    "1b": Preset(_rotary(_LLADA, 4096, 2048, 22, 32), _LARGE),
    "3b": Preset(_rotary(_LLADA, 4096, 2560, 32, 20), _LARGE),
    "7b": Preset(_rotary(_LLADA, 4096, 4096, 32, 32), _LARGE),
}
