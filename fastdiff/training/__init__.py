"""Training of a `DiffusionTransformer` on any number of ranks: losses, averaged weights, held-out likelihood.

A run folder holds config.json, checkpoints/ (with it all that a resumed run needs), metrics.jsonl (a record a line;
locked while the run goes on) and model.safetensors (the averaged weights, for `from_pretrained`), which is written when
the run ends or stops: one that is killed keeps what it had, and a resumed one writes it.
"""

from fastdiff.training.config import LOSSES, TrainConfig
from fastdiff.training.loop import Stopped, train
from fastdiff.training.objectives import MIXED, SCHEDULE, SCORES, Noised, diffusion_loss, noise
from fastdiff.training.records import Record

__all__ = [
    "LOSSES",
    "MIXED",
    "SCHEDULE",
    "SCORES",
    "Noised",
    "Record",
    "Stopped",
    "TrainConfig",
    "diffusion_loss",
    "noise",
    "train",
]
