"""Which backend runs an operation, and why another cannot."""

import functools
import importlib
import os
import warnings
from typing import NamedTuple

import torch

from fastdiff.checks import check_choice

BACKENDS = ("cpu", "reference")
_DEFAULT = os.environ.get("FASTDIFF_BACKEND") or None


class BackendUnavailable(RuntimeError):
    """A backend that was named explicitly cannot run here; the message says what is missing."""


class Report(NamedTuple):
    name: str
    available: bool
    detail: str


@functools.cache
def _load_cpu() -> str | None:
    """Registers the compiled CPU kernels; the reason if that fails."""
    try:
        importlib.import_module("fastdiff._C_cpu").isa()
    except (ImportError, ValueError) as error:
        return f"the compiled extension fastdiff._C_cpu did not load ({error})"
    return None


CPU_MISSING = _load_cpu()


def resolve(backend: str | None, device: torch.device) -> str:
    """The backend for tensors on `device`: the one named, or FASTDIFF_BACKEND, or the best that can run.

    Raises ValueError for an unknown name and BackendUnavailable for a known one that cannot run here.
    """
    backend = backend or _DEFAULT
    if backend is not None:
        check_choice("backend", backend, BACKENDS)
    missing = f"no kernels for {device.type} tensors" if device.type != "cpu" else CPU_MISSING
    if backend == "cpu" and missing:
        raise BackendUnavailable(f"backend 'cpu': {missing}")
    if backend is None and missing:
        _warn_once(missing)
        return "reference"
    return backend or "cpu"


def report() -> list[Report]:
    """What can run here, and why not the rest."""
    cpu = CPU_MISSING
    if cpu is None:
        extension = importlib.import_module("fastdiff._C_cpu")
        cpu = f"instruction set {extension.isa()}; built by {extension.build()}"
    return [Report("cpu", CPU_MISSING is None, cpu), Report("reference", True, "float64 PyTorch, any device, slow")]


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"fastdiff runs its slow float64 reference: {reason}", RuntimeWarning, stacklevel=4)
