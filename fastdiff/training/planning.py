"""What a step of training needs, by formulas: memory, exchanged bytes, operations.

They are those of `fastdiff.training` in eager mode, held against counts in tests/training/test_planning.py. Sizes are
bytes.
"""

import dataclasses
import math
from functools import cached_property
from typing import Any

import torch
from torch import nn

from fastdiff.checks import check_integer
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.noise.blocks import num_blocks
from fastdiff.ops.chunks import TILE_BYTES
from fastdiff.training.cards import USABLE, Card
from fastdiff.training.config import DTYPES, TrainConfig
from fastdiff.training.objectives import LARGE_VOCABULARY
from fastdiff.training.ranks import Ranks, check_topology
from fastdiff.training.speed import operations_per_token


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step of training a model of a shape on some GPUs.

    Args:
        model: the shape; its cond_dim fits the loss.
        training: how; with "hybrid" and shards of 0, a copy is shared by 8 ranks, or all if they are fewer.
        gpus: how many, a rank each.
        length: tokens in a sequence.

    Raises:
        ValueError, TypeError: the ranks cannot share the batch or the model equally; a length that the model does not
            take, or that blocks do not divide.
    """

    model: ModelConfig
    training: TrainConfig
    gpus: int
    length: int

    def __post_init__(self) -> None:
        check_integer("gpus", self.gpus, 1)
        check_integer("length", self.length, 1)
        most = self.model.max_length if self.model.learned_positions else None
        if most is not None and self.length > most:
            raise ValueError(f"length: expected at most {most}, the learned positions, got {self.length}")
        if self.training.block_length:
            num_blocks(self.length, self.training.block_length)
        if self.training.sharding == "hybrid" and not self.training.shards:
            shards = dataclasses.replace(self.training, shards=min(8, self.gpus))
            object.__setattr__(self, "training", shards)
        check_topology(self.training, Ranks(0, self.gpus))

    # -----------------------------------------------------------------------------------------------------
    # What there is.

    @cached_property
    def network(self) -> DiffusionTransformer:
        """The model, without memory."""
        with torch.device("meta"):
            return DiffusionTransformer(self.model)

    @cached_property
    def parameters(self) -> int:
        return _count(self.network)

    @property
    def shards(self) -> int:
        """Ranks that share a copy of the model."""
        return {"none": 1, "full": self.gpus, "hybrid": self.training.shards}[self.training.sharding]

    @property
    def sharded(self) -> bool:
        return self.training.sharding != "none" and self.gpus > 1

    @property
    def rows(self) -> int:
        """Sequences that a rank passes through the model at a time."""
        return self.training.batch_size // self.gpus // self.training.accumulation

    @property
    def tokens(self) -> int:
        """Tokens that a rank passes through the model at a time, in all streams."""
        return self.training.streams * self.last_tokens

    @property
    def last_tokens(self) -> int:
        """Of these, those that come to the last layer."""
        return self.rows * self.length

    @property
    def multiplied(self) -> int:
        """Of these, those that the last layer multiplies: the scored ones, on average, if the vocabulary is large."""
        most = self.training.block_length or self.length  # masks of what is noised as one
        harmonic = sum(1 / m for m in range(1, most + 1))
        shares = {"dce-k": (most + 1) / (2 * most), "dce-harmonic": 1 / harmonic, "dse-uniform": 1.0, "gidd": 1.0}
        share = shares.get(self.training.loss, 0.5)
        large = self.model.num_states >= LARGE_VOCABULARY
        return math.ceil(share * self.last_tokens) if large else self.last_tokens

    @property
    def size(self) -> int:
        """Bytes of a number in products."""
        return DTYPES[self.training.dtype].itemsize

    @property
    def stream(self) -> int:
        """Bytes of a number between blocks: autocast leaves them in the type of the embeddings."""
        return self.size if self.sharded else 4

    # -----------------------------------------------------------------------------------------------------
    # Memory of a rank.

    @cached_property
    def memory(self) -> dict[str, int]:
        """By what is in it, at the moment when most of it is taken; the sum is about the most."""
        held = self._of_a_rank(self.network)
        always = {
            "weights": 4 * held,
            "gradients": self._gradients(held),
            "AdamW": 8 * held + 4 * len(list(self.network.parameters())),  # two moments, and a count of steps each
            "averaged weights": 4 * held,
        }
        return always | max(self._at_the_loss, self._at_the_end, key=lambda moment: sum(moment.values()))

    @property
    def _at_the_loss(self) -> dict[str, int]:
        """As backward begins."""
        return {
            "weights in use": self._weights_in_use(),
            "activations": self.activations,
            "backward of a block": self._backward_of_a_block(),
            "last layer and loss": self.last_layer + self.logits,
        }

    @property
    def _at_the_end(self) -> dict[str, int]:
        """As backward ends, with what is in no block: whole weights, their gradients, and the sums of these, which
        are made in float32 and in a second place; and a rank's part of them, if it is to be added to that of before."""
        if not self.sharded:
            return {}
        outside, held = self._outside_blocks, self._of_a_rank(self.network) - self._of_a_rank(self.network.blocks)
        sums = (self.size + 8) * outside + (4 * held if self.training.accumulation > 1 else 0)
        return {"weights in use": self.size * outside, "gradients to be summed": sums}

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    def _of_a_rank(self, module: nn.Module) -> int:
        """Parameters that the first rank holds: FSDP2 cuts each along its first dimension, rounding up."""
        shards = self.shards if self.sharded else 1
        return sum(math.ceil(p.shape[0] / shards) * (p.numel() // p.shape[0]) for p in module.parameters())

    def _gradients(self, held: int) -> int:
        """In float32. With more parts of a batch than one, DDP's wait for the last part beside its buckets."""
        waits = self.gpus > 1 and not self.sharded and self.training.accumulation > 1
        return 4 * held * (2 if waits else 1)

    def _weights_in_use(self) -> int:
        """Sharded: whole, of all that is in no block, and of two blocks, the one at work and the next. Otherwise
        autocast's copies of linear layers."""
        if self.sharded:
            return self.size * (self._outside_blocks + 2 * _count(self.network.blocks[0]))
        return 2 * self._autocast_copies if self.size == 2 else 0

    @property
    def _outside_blocks(self) -> int:
        return self.parameters - _count(self.network.blocks)

    @property
    def _autocast_copies(self) -> int:
        linear = [module for module in self.network.modules() if isinstance(module, nn.Linear)]
        exact = 0 if self.network.sigma_map is None else _count(self.network.sigma_map)
        return sum(map(_count, linear)) - exact

    @property
    def activations(self) -> int:
        """What autograd keeps of the blocks and the norm behind them for backward."""
        depth = self.model.depth
        if self.training.recompute:  # the input of each block, and all of the one that is run again
            blocks = (depth - 1) * self.tokens * self.model.dim * self.stream + self.activations_of_a_block
        else:
            blocks = depth * self.activations_of_a_block
        return blocks + self._of_all_blocks() + self._norm(modulated=bool(self.model.cond_dim))

    def _of_all_blocks(self) -> int:
        """What attention adds to its scores, of two streams, and what each token's noise level becomes."""
        if not self.training.block_length:
            return 0
        bias = self.size * (self.training.streams * self.length) ** 2
        level: Any = self.network.sigma_map
        waves = level.mlp[0].in_features + 5 * self.model.cond_dim if level is not None else 0
        return bias + 4 * self.tokens * waves

    @property
    def activations_of_a_block(self) -> int:
        """What autograd keeps of one block."""
        wide = self.tokens * self.model.dim
        conditioned = bool(self.model.cond_dim)
        linear = 1 + 1 + 1 + 4  # inputs of attn_qkv, attn_out and the two of the MLP
        attention = 2 + 1 + 1  # q and k turned by their positions; v; the output
        branches = 2 if conditioned else 0  # outputs of both, which gates multiply
        levels = 6 + 2 if self._level_per_token else 0  # what modulates, and scales plus 1
        gelu = 4
        softmax = 4 * self.tokens * self.model.heads  # its logarithm, in float32
        kept = self.size * wide * (linear + attention + branches + levels + gelu)
        return kept + softmax + 2 * self._norm(conditioned)

    @property
    def _level_per_token(self) -> bool:
        """Whether the noise level is one for each token, where otherwise a sequence has one."""
        return bool(self.model.cond_dim and self.training.block_length)

    def _norm(self, modulated: bool) -> int:
        """Input in float32, mean and deviation; and the output, where the noise level scales it."""
        output = self.stream if modulated else 0
        return self.tokens * (self.model.dim * (4 + output) + 2 * 4)

    def _backward_of_a_block(self) -> int:
        """Gradients of the MLP's inner layer and of the stream; sharded, also of a block's weights, on their way."""
        flowing = self.tokens * self.model.dim * (4 * self.size + 2 * self.stream)
        return flowing + ((self.size + 4) * _count(self.network.blocks[0]) if self.sharded else 0)

    @property
    def last_layer(self) -> int:
        """Hidden states and their gradient, and the weight's gradient."""
        num_states, weight = self.model.num_states, self.model.num_states * self.model.dim
        hidden = 2 * self.last_tokens * self.model.dim * self.stream
        if num_states < LARGE_VOCABULARY:
            return hidden
        if self.sharded:  # in float32 where it is a sum over chunks, and in the type of the weights
            chunks = self.multiplied * num_states * self.size > 4 * weight
            return hidden + (self.size + 4 * (chunks and self.size == 2)) * weight
        return hidden + 4 * weight * (2 if self.gpus > 1 else 1)  # DDP copies it into a bucket

    @property
    def logits(self) -> int:
        """Those that there are at a time: of a large vocabulary few, otherwise all, and their gradient."""
        logits = self.multiplied * self.model.num_states * self.size
        if self.model.num_states < LARGE_VOCABULARY:
            return 2 * logits
        in_float32 = 4 * self.model.num_states * self.model.dim if self.sharded and self.size == 2 else 0
        return logits if logits <= in_float32 else min(logits, TILE_BYTES["cuda"])

    @property
    def naive_logits(self) -> int:
        """What a loss of whole logits would add: they and their gradient, in float32."""
        return 2 * 4 * self.last_tokens * self.model.num_states

    # -----------------------------------------------------------------------------------------------------
    # Exchange and work.

    @cached_property
    def exchanged(self) -> dict[str, int]:
        """Bytes that a rank receives in a step, by the ring's count: (n - 1) / n of what is gathered or scattered."""
        if self.gpus == 1:
            return {}
        if not self.sharded:
            return {"all-reduce": round(2 * (1 - 1 / self.gpus) * 4 * self.parameters)}
        ring, copies, parts = 1 - 1 / self.shards, self.gpus // self.shards, self.training.accumulation
        whole, blocks = self.shards * self._of_a_rank(self.network), self.shards * self._of_a_rank(self.network.blocks)
        sums = {
            "all-gather, forward": ring * parts * self.size * whole,
            "all-gather, backward": ring * parts * self.size * blocks,  # what is in no block stayed
            "reduce-scatter": ring * parts * 4 * whole,
        }
        if copies > 1:  # with the last part
            sums["all-reduce"] = 2 * (1 - 1 / copies) * 4 * whole / self.shards
        return {name: round(value) for name, value in sums.items()}

    @cached_property
    def operations(self) -> int:
        """Of all ranks in a step: forward, backward (twice that), and blocks once more if they are recomputed, but
        for their last product where nothing needs it again."""
        dim, depth, passes = self.model.dim, self.model.depth, self.gpus * self.training.accumulation
        block: Any = self.network.blocks[0]
        layers = [block.attn_qkv, block.attn_out, block.mlp[0], block.mlp[2]]
        layers += [block.adaLN_modulation] if self._level_per_token else []
        weights = sum(layer.weight.numel() for layer in layers)
        attention = 4 * self.training.streams * self.length * dim  # q k^T, and its product with v
        forward = depth * self.tokens * (2 * weights + attention)
        last = 2 * self.multiplied * dim * self.model.num_states
        again = 0
        if self.training.recompute:
            again = forward - (0 if self.model.cond_dim else depth * self.tokens * 2 * block.mlp[2].weight.numel())
        return passes * (3 * (forward + last) + again)

    def tokens_per_second(self, card: Card, share: float) -> float:
        """Of all GPUs at a share of their peak, which is counted as a run tells it (mfu)."""
        each = operations_per_token(self.network, self.length, self.training.streams)
        return share * self.gpus * card.peak / each

    def fits(self, card: Card) -> bool:
        return self.total <= USABLE * card.memory

    def accumulation_for(self, card: Card) -> int | None:
        """The fewest parts, from those asked for on, with which it fits; None if it does with none."""
        rows = self.training.batch_size // self.gpus
        for parts in range(self.training.accumulation, rows + 1):
            if rows % parts == 0:
                plan = dataclasses.replace(self, training=dataclasses.replace(self.training, accumulation=parts))
                if plan.fits(card):
                    return parts
        return None


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
