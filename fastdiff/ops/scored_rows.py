"""The compact list of the rows that are scored, which the linear losses multiply."""

from typing import Any

import torch
from torch import Tensor

from fastdiff.backends import resolve
from fastdiff.checks import check_bool
from fastdiff.ops.gpu import define_launch, implement_on_gpus
from fastdiff.ops.library import define


def scored_rows(scored: Tensor, capacity: int | None = None, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The compact list of scored rows, and how many there are.

    Args:
        scored: [...] bool, as the mask of a noised batch.
        capacity: the length of the list, which is cut or filled up with scored.numel(); then nothing waits for the
            device and no shape depends on data. None makes it as long as there are rows.
        backend: "cuda" for one launch of its own; the others take PyTorch's operators.

    Returns:
        int64 [capacity] indices into the flattened tokens, in order, and their number, int64 [] on the device.

    Raises:
        TypeError: scored is not bool.
        BackendUnavailable: the named backend cannot run here.
    """
    check_bool("scored", scored, scored.shape, scored.device)
    flat = scored.flatten()
    if capacity is None:
        return flat.nonzero().squeeze(1), scored.sum()
    if resolve(backend, scored.device, "scored_rows", scored.numel()) == "cuda":
        return _compact["cuda"](flat, capacity)
    return torch.nonzero_static(flat, size=capacity, fill_value=scored.numel()).squeeze(1), scored.sum()


def _fake(scored: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    return scored.new_empty(capacity, dtype=torch.int64), scored.new_empty((), dtype=torch.int64)


def _on_gpu(kernels: Any, scored: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    index, count = _fake(scored, capacity)
    kernels.launch_compact(scored.contiguous(), index, count)
    return index, count


_compact = define("compact", "(Tensor scored, SymInt capacity) -> (Tensor, Tensor)", _fake, ("cuda",))
define_launch("launch_compact", "Tensor scored, Tensor(a!) index, Tensor(b!) count")
implement_on_gpus("compact", _on_gpu, triton=None)
