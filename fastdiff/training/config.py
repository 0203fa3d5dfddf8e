"""How to train: the settings of a run."""

import dataclasses
import math

import torch

from fastdiff.checks import check_choice, check_integer
from fastdiff.schedules import Hybrid, LogLinear

SCHEDULE = LogLinear()
MIXED = Hybrid()  # the schedule of "gidd"
SCORES = {"absorb": "scale_by_sigma", "uniform": "log_score"}  # what a network of scores gives, by graph, as SEDD's
LOSSES = ("dce-t", "dce-lambda", "dce-k", "dce-harmonic", "dse-absorb", "dse-uniform", "gidd")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CHOICES = {
    "loss": LOSSES,
    "times": ("stratified", "importance"),
    "dtype": tuple(DTYPES),
    "sharding": ("none", "full", "hybrid"),
    "lr_schedule": ("constant", "cosine"),
    "track": ("none", "tensorboard", "wandb"),
}
_LEAST = {"steps": 1, "batch_size": 1, "accumulation": 1, "warmup": 0, "save_every": 1, "keep": 1, "seed": 0}
_LEAST |= {"eval_every": 0, "eval_sequences": 2, "eval_samples": 3, "shards": 0, "keep_every": 0, "block_length": 0}
# What a resumed run may change: where it ends, what is written down, and how the same numbers are come by.
_MAY_CHANGE = {"steps", "save_every", "keep", "keep_every", "eval_every", "eval_sequences", "eval_samples", "track"}
_MAY_CHANGE |= {"accumulation", "sharding", "shards", "recompute", "compile"}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        loss: what is minimised, in nats per token; each bounds the negative log-likelihood.
            "dce-t": cross-entropy of the masked tokens at time t of the log-linear schedule, weight
            dsigma / expm1(sigma). "dce-lambda": with a share lambda masked, weight 1 / lambda.
            "dce-k": with exactly m masked, m stratified over 1..L, weight L / m.
            "dce-harmonic": with m of probability 1 / (m H_L), weight H_L.
            "dse-absorb", "dse-uniform": score entropy of a model that sees the noise level, log-linear schedule.
            "gidd": `mixture_loss` of a model that sees the noise level, `Hybrid()` schedule, weights of the bound.
        block_length: tokens of a block, of block diffusion: blocks are noised each at a level of its own, and seen
            with the clean blocks before them; losses then bound a block's likelihood given these. 0: sequences whole.
        steps: optimiser steps.
        times: how noise levels (times, shares or numbers of masks) are drawn: "stratified", or by "importance", also
            stratified but under a law that is learned from the losses (`ImportanceTimes`); not with "dce-harmonic".
        complementary: for "dce-k": every sequence twice in a batch, under a mask and under its complement.
        batch_size: rows in a step, of all ranks: sequences, or with `complementary` two for each.
        accumulation: parts that a rank's share of a batch is cut into to fit memory; ranks that share a copy of the
            model sum gradients after each of them.
        lr: learning rate of AdamW, reached in proportion over the first `warmup` steps.
        lr_schedule: what follows them: "constant"; or "cosine", down to `lr_final` of it at the last of `steps`, which
            a resumed run then may not change.
        lr_final: of "cosine", the share of lr that is left at the end.
        weight_decay: AdamW's, on matrices.
        grad_clip: largest norm of the gradient.
        ema: decay of the averaged weights; (1 + step) / (10 + step) where that is less.
        dtype: "float32"; or "bfloat16", by autocast, or in sharded models for all but sums over ranks and the
            weights that the optimiser keeps.
        sharding: what ranks have of weights, gradients and optimiser: "none" (all: DDP), "full" (a part each: FSDP2,
            by block), or "hybrid" (a part each among `shards` ranks, the same parts in every such group).
        shards: ranks that share a copy in "hybrid"; 0 for those of one machine.
        recompute: keep a block's input alone, and run it again in backward (activation checkpointing).
        compile: run blocks through torch.compile.
        eval_every, eval_sequences, eval_samples: steps between evaluations (0: none), held-out sequences in
            one, and network passes for each of them.
        save_every: steps between checkpoints; the last step always saves.
        keep: how many of the newest stay.
        keep_every: those of every so many steps stay as well; 0: none.
        track: where records go beside metrics.jsonl: "none", "tensorboard" or "wandb".
        seed: the randomness of the noise.

    Raises:
        ValueError, TypeError: a value out of range or of another type, named.
    """

    loss: str = "dce-k"
    times: str = "stratified"
    complementary: bool = False
    block_length: int = 0
    steps: int = 1000
    batch_size: int = 64
    accumulation: int = 1
    lr: float = 1e-3
    warmup: int = 100
    lr_schedule: str = "constant"
    lr_final: float = 0.1
    weight_decay: float = 0.01
    grad_clip: float = 1.0
    ema: float = 0.9999
    dtype: str = "float32"
    sharding: str = "none"
    shards: int = 0
    recompute: bool = False
    compile: bool = False
    eval_every: int = 500
    eval_sequences: int = 64
    eval_samples: int = 32
    save_every: int = 500
    keep: int = 2
    keep_every: int = 0
    track: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        for name, least in _LEAST.items():
            value = check_integer(name, getattr(self, name), least)
            if value >= 2**63:
                raise ValueError(f"{name}: expected a number below 2^63, got {value}")
            object.__setattr__(self, name, value)
        whole = self.batch_size % self.accumulation == 0
        learned = self.times == "importance"
        expected = {
            "lr": ("a number > 0", 0 < self.lr < math.inf),
            "lr_final": ("a share in [0, 1]", 0 <= self.lr_final <= 1),
            "weight_decay": ("a number >= 0", 0 <= self.weight_decay < math.inf),
            "grad_clip": ("a number > 0", self.grad_clip > 0),
            "ema": ("a decay in [0, 1)", 0 <= self.ema < 1),
            "batch_size": (f"a multiple of accumulation = {self.accumulation}", whole),
            "times": ("'stratified' for loss 'dce-harmonic'", not learned or self.loss != "dce-harmonic"),
            "complementary": ("False unless loss is 'dce-k'", not self.complementary or self.loss == "dce-k"),
            "block_length": (f"0 for loss {self.loss!r}", not self.block_length or not self.moves_tokens),
            "shards": ("0 unless sharding is 'hybrid'", self.shards == 0 or self.sharding == "hybrid"),
        }
        for name, (what, holds) in expected.items():
            if not holds:
                raise ValueError(f"{name}: expected {what}, got {getattr(self, name)}")
        if self.complementary and self.batch_size % 2:
            raise ValueError(f"batch_size: expected an even number, as rows are complementary, got {self.batch_size}")

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, which are numbered from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.lr_schedule == "constant":
            return self.lr
        done = (step + 1 - self.warmup) / (self.steps - self.warmup)
        return self.lr * (self.lr_final + (1 - self.lr_final) * (1 + math.cos(math.pi * done)) / 2)

    @property
    def may_change(self) -> set[str]:
        """The settings that a resumed run may have other than the run had."""
        return _MAY_CHANGE - ({"steps"} if self.lr_schedule == "cosine" else set())

    @property
    def moves_tokens(self) -> bool:
        """Whether noise turns tokens into others, so that there are no conditionals of masks alone."""
        return self.loss in ("dse-uniform", "gidd")

    @property
    def sees_noise(self) -> bool:
        """Whether the model is told the noise level."""
        return not self.loss.startswith("dce")

    @property
    def streams(self) -> int:
        """Sequences side by side in a pass: with blocks the noised one and the clean one."""
        return 2 if self.block_length else 1
