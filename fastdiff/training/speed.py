"""How fast a run is, without waiting for the device: moments of its work, the share of its peak, and its memory."""

import resource
import sys
import time

import torch
from torch import nn

from fastdiff.model import DiffusionTransformer
from fastdiff.training.cards import peak_of


class Moment:
    """When all work that the device was given so far is done."""

    def __init__(self, device: torch.device) -> None:
        self._at, self._event = time.perf_counter(), None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def since(self, other: "Moment") -> float:
        """Seconds between two moments that are over."""
        if self._event is not None and other._event is not None:
            return other._event.elapsed_time(self._event) / 1000
        return self._at - other._at


def operations_per_token(model: DiffusionTransformer, length: int, streams: int = 1) -> int:
    """Of a training step: 6 for each weight but the embeddings', and attention's 12 L dim a layer.

    With more streams than one (`TrainConfig.streams`) a token passes the layers but the last in each of them, and
    attention is over all.

    The usual count, of which the share of the peak is told (MFU), so that it compares with others': the last layer's
    are among them for every token, multiplied or not, and recomputed ones are not. `Plan.operations` are those done.
    """
    config = model.config
    embedded = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding))
    last = sum(p.numel() for p in model.lm_head.parameters())
    weights = sum(p.numel() for p in model.parameters()) - embedded - last
    return 6 * (streams * weights + last) + 12 * streams**2 * length * config.dim * config.depth


def peak(device: torch.device, dtype: str) -> float | None:
    """Operations that the device does in a second at most, where that is known."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def memory(device: torch.device) -> int:
    """The most bytes taken so far: of tensors on a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
