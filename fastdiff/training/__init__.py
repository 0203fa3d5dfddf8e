"""Training of a `DiffusionTransformer` on any number of ranks: losses, averaged weights, held-out likelihood.

A run folder holds config.json, checkpoints/ (with it all that a resumed run needs), metrics.jsonl (a record a line;
locked while the run goes on) and model.safetensors (the averaged weights, for `from_pretrained`), which is written when
the run ends or stops: one that is killed keeps what it had, and a resumed one writes it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastdiff.training.config import LOSSES, MIXED, SCHEDULE, SCORES, TrainConfig
from fastdiff.training.records import Record

if TYPE_CHECKING:
    from fastdiff.training.loop import Stopped, train
    from fastdiff.training.objectives import Noised, diffusion_loss, noise

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

_TRAINS = {
    "Stopped": "loop",
    "train": "loop",
    "Noised": "objectives",
    "diffusion_loss": "objectives",
    "noise": "objectives",
}


def __getattr__(name: str) -> Any:
    """What trains stands on torch.distributed and its compiler, for whose import no likelihood or sample must wait."""
    if name not in _TRAINS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_TRAINS[name]}"), name)
