"""Which backend runs an operation, and why another cannot."""

import functools
import importlib
import importlib.util
import os
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from fastdiff.checks import check_choice
from fastdiff.fastest import by_speed

KERNELS = ("cpu", "triton", "cuda")  # backends that are operators of their own
BACKENDS = (*KERNELS, "reference")
OLDEST_TRITON, OLDEST_GPU = (3, 6), (8, 0)
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's interpreter takes CPU tensors too, slowly
DEFAULT = os.environ.get("FASTDIFF_BACKEND") or None  # may be set at any time, as benchmarks do


class BackendUnavailable(RuntimeError):
    """A backend that was named explicitly cannot run here; the message says what is missing."""


class Report(NamedTuple):
    name: str
    available: bool
    detail: str


def _load(name: str, first_call: str) -> str | None:
    """Registers the kernels of a compiled extension; the reason if that, or a call of one of its functions, fails."""
    try:
        getattr(importlib.import_module(f"fastdiff.{name}"), first_call)()
    except (ImportError, ValueError) as error:
        if isinstance(error, ModuleNotFoundError):
            if hidden := _hidden(name):
                return f"{Path(__file__).parent} was imported, which is not compiled; it hides {hidden}, which is"
            if name == "_C_cuda":
                return "the CUDA kernels were not built; FASTDIFF_BUILD_CUDA=1 makes the installation say why"
        return f"the compiled extension fastdiff.{name} did not load ({error})"
    return None


def _hidden(extension: str) -> Path | None:
    """Another fastdiff on the path, one that has the extension: the installed one, where Python runs in a clone."""
    return next((file.parent for entry in sys.path for file in Path(entry).glob(f"fastdiff/{extension}.*")), None)


def _triton_missing() -> str | None:
    """Why Triton cannot run anything, without importing it."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "triton is not installed"
    # Not from a package's metadata: on ROCm it comes in packages of other names.
    version = re.search(r"^__version__ = ['\"]((\d+)\.(\d+).*)['\"]", Path(spec.origin).read_text(), re.MULTILINE)
    if version is not None and (int(version[2]), int(version[3])) < OLDEST_TRITON:
        return f"triton {version[1]} is too old, {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]} is needed"
    return None


CPU_MISSING, TRITON_MISSING, CUDA_MISSING = _load("_C_cpu", "isa"), _triton_missing(), _load("_C_cuda", "build")
# Compiled for the CPU by tests/cuda/emulated.py.
EMULATING = CUDA_MISSING is None and bool(importlib.import_module("fastdiff._C_cuda").emulated)


def _missing(backend: str, device: torch.device) -> str | None:
    """Why a backend with kernels cannot run on a device."""
    if backend == "cpu":
        return CPU_MISSING if device.type == "cpu" else f"no kernels for {device.type} tensors"
    if device.type not in ("cpu", "cuda"):
        return f"no kernels for {device.type} tensors"
    if device.type == "cpu" and backend == "triton" and not INTERPRETING:
        return "no kernels for cpu tensors, unless TRITON_INTERPRET=1 interprets them"
    if device.type == "cpu" and backend == "cuda" and not EMULATING:
        return CUDA_MISSING or "no kernels for cpu tensors"
    if device.type == "cuda" and torch.version.hip is not None:
        return TRITON_MISSING if backend == "triton" else "CUDA C++ is for NVIDIA's GPUs, and this torch is for AMD's"
    if device.type == "cuda" and not torch.compiler.is_compiling():
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST_GPU:
            return f"compute capability {capability[0]}.{capability[1]}, 8.0 is needed"
    return TRITON_MISSING if backend == "triton" else CUDA_MISSING


def resolve(backend: str | None, device: torch.device, operation: str, size: int) -> str:
    """The backend for an operation on tensors of `device`, over rows or sequences of a size.

    That is the one named, or FASTDIFF_BACKEND, or the fastest that can run. Raises ValueError for an unknown name and
    BackendUnavailable for a known one that cannot run here.
    """
    backend = backend or DEFAULT
    if backend is not None:
        check_choice("backend", backend, BACKENDS)
        missing = None if backend == "reference" else _missing(backend, device)
        if missing is not None:
            raise BackendUnavailable(f"backend {backend!r}: {missing}")
        return backend
    reasons = []
    for name in by_speed(operation, size) if device.type == "cuda" else ("cpu",):
        missing = _missing(name, device)
        if missing is None:
            return name
        reasons.append(missing)
    _warn_once("; ".join(dict.fromkeys(reasons)))
    return "reference"


def report() -> list[Report]:
    """What can run here, and why not the rest."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else ""
    cpu, triton, cuda = CPU_MISSING, _missing("triton", device), _missing("cuda", device)
    if cpu is None:
        extension = importlib.import_module("fastdiff._C_cpu")
        cpu = f"instruction set {extension.isa()}; built by {extension.build()}"
    built = "" if CUDA_MISSING else f"; built for {importlib.import_module('fastdiff._C_cuda').build()}"
    return [
        Report("cpu", CPU_MISSING is None, cpu),
        Report("triton", triton is None, triton or gpu or "interpreted, very slow"),
        Report("cuda", cuda is None, (cuda or gpu or "emulated, very slow") + built),
        Report("reference", True, "float64 PyTorch, any device, slow"),
    ]


@functools.cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"fastdiff runs its slow float64 reference: {reason}", RuntimeWarning, stacklevel=4)
