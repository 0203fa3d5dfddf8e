"""Where a model's weights lie: on one device, or spread over all that a rank of a machine has."""

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_FOR_WEIGHTS = 0.9  # of what is free; the rest is for what a pass holds


def placed(network: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> torch.device:
    """Moves a network, which gives back where: None is the first of this rank's GPUs, or the CPU.

    Its parameters get the type; buffers, which hold angles, keep theirs.
    """
    if device is None:
        device = torch.device(*(["cuda", gpus[0]] if (gpus := own_gpus()) else ["cpu"]))
    for parameter in network.parameters():
        parameter.data = parameter.data.to(device, dtype or parameter.dtype)
    network.to(device)
    return device


def spread(load: Callable[..., Any], path: str, **options: Any) -> Any:
    """`load(path, ...)` of transformers, its weights on all that this rank has: GPUs, memory of the CPU, then a disk.

    Layers that lie elsewhere come to a GPU for their own forward alone.
    """
    rest = tempfile.mkdtemp(prefix="fastdiff-")
    model, report = load(path, device_map="auto", max_memory=own_memory(), offload_folder=rest, **options)
    weakref.finalize(model, shutil.rmtree, rest, ignore_errors=True)
    return model, report


def own_gpus() -> list[int]:
    """The GPUs of this rank: of n ranks that torchrun started on the machine, rank r has r, r + n, ...

    Raises:
        ValueError: more ranks than GPUs.
    """
    (rank, ranks), gpus = _on_machine(), torch.cuda.device_count()
    if 0 < gpus < ranks:
        raise ValueError(f"device: expected a GPU for each of {ranks} ranks on a machine, got {gpus}")
    return list(range(rank, gpus, ranks))


def own_memory() -> dict[int | str, int]:
    """Bytes for weights on each GPU of this rank, and in its part of the CPU's memory, as accelerate takes them."""
    import psutil  # which accelerate needs

    free: dict[int | str, int] = {gpu: torch.cuda.mem_get_info(gpu)[0] for gpu in own_gpus()}
    free["cpu"] = psutil.virtual_memory().available // _on_machine()[1]
    return {place: int(_FOR_WEIGHTS * size) for place, size in free.items()}


def _on_machine() -> tuple[int, int]:
    """This rank among those on its machine, and how many those are."""
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
