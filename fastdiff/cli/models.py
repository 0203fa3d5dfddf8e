"""Models that a command names: how they are loaded, and what is said where a device has no room for them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastdiff.checks import check_choice
from fastdiff.cli.options import DTYPES, device_of, versions
from fastdiff.loading import Loaded, load
from fastdiff.placing import own_gpus


def load_named(name: str, device: str | None, dtype: str | None, **options: Any) -> Loaded:
    """`load` with the options of a command; the device "auto" is all that this rank has."""
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
    place = None if device == "auto" else device_of(device)
    with no_room(place, sum(size for _, size, _ in versions(name)), "a smaller model"):
        return load(name, place, dtype=None if dtype is None else getattr(torch, dtype), **options)


@contextmanager
def no_room(device: torch.device | None, size: int, fewer: str) -> Iterator[None]:
    """Where there is no room for what is done inside, one line says so, and what may help.

    Args:
        device: None is all that this rank has.
        size: bytes of the model, 0 if that is not known.
        fewer: the option that makes passes smaller.

    Raises:
        MemoryError: there was no room.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        takes = f"the model takes {_gigabytes(size)}, " if size else ""
        devices = [device] if device else [torch.device("cuda", gpu) for gpu in own_gpus()] + [torch.device("cpu")]
        has = ", ".join(f"{one} has {_room(one)}" for one in devices)
        tries = f"{fewer}, a smaller --length, --dtype bfloat16 or --device auto"
        raise MemoryError(f"no room: {takes}{has}; try {tries}") from error


def _room(device: torch.device) -> str:
    if device.type == "cuda":
        left, size = torch.cuda.mem_get_info(device)
        return f"{_gigabytes(size)}, of which {_gigabytes(left)} are left"
    return _gigabytes(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
