"""How fast a run is, without waiting for the device: moments of its work, the share of its peak, and its memory."""

import resource
import sys
import time

import torch
from torch import nn

from fastdiff.model import DiffusionTransformer

# Dense bfloat16 operations a second, from NVIDIA's data sheets, by a part of the device's name; the first that fits.
_PEAKS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}


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


def operations(model: DiffusionTransformer, length: int) -> int:
    """Of a training step for each token: 6 for each weight but the embeddings', and attention's 12 L dim a layer.

    The usual count: the last layer's are among them for every token, multiplied or not, and recomputed ones are not.
    """
    config = model.config
    embedded = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Embedding))
    weights = sum(p.numel() for p in model.parameters()) - embedded
    return 6 * weights + 12 * length * config.dim * config.depth


def peak(device: torch.device, dtype: str) -> float | None:
    """Operations that the device does in a second at most, where that is known."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in _PEAKS.items() if part in name), None)


def memory(device: torch.device) -> int:
    """The most bytes taken so far: of tensors on a GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
