"""Training of a `DiffusionTransformer` on any number of ranks: losses, averaged weights, held-out likelihood.

A run folder holds config.json and model.safetensors (the averaged weights, for `from_pretrained`), checkpoints/ (all
that a resumed run needs) and metrics.jsonl (a record a line; locked while the run goes on).
"""

from fastdiff.training.config import LOSSES, TrainConfig
from fastdiff.training.loop import Stopped, train
from fastdiff.training.objectives import SCHEDULE, Noised, diffusion_loss, noise, time_free
from fastdiff.training.records import Record

__all__ = [
    "LOSSES",
    "SCHEDULE",
    "Noised",
    "Record",
    "Stopped",
    "TrainConfig",
    "diffusion_loss",
    "noise",
    "time_free",
    "train",
]
