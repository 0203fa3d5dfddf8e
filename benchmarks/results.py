"""Measured cases and the files that keep them, one file a machine. A case says itself what it was measured on."""

import hashlib
import importlib.metadata
import json
import os
import platform
import statistics
from pathlib import Path
from typing import NamedTuple

import torch
from measure import DEVICE, Machine

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy", "quack-kernels")


class Call(NamedTuple):
    """Seconds, the median and the quartiles, and the most memory that the call needs beyond what was there before."""

    seconds: float
    low: float
    high: float
    extra_bytes: int


class Case(NamedTuple):
    """Calls that were measured in turns. The first is ours; the floor, in seconds, is the least that it can take."""

    calls: dict[str, Call]
    floor: float | None
    rates: Machine
    machine: str
    versions: dict[str, str]
    sources: str

    @property
    def first(self) -> Call:
        return next(iter(self.calls.values()))


def case(seconds: dict[str, list[float]], extra_bytes: dict[str, int], floor: float | None, rates: Machine) -> Case:
    """A case measured here and now."""
    calls = {who: Call(*_quartiles(seconds[who]), extra) for who, extra in extra_bytes.items()}
    return Case(calls, floor, rates, machine(), versions(), sources(DEVICE.type))


def load(file: Path) -> dict[str, Case]:
    """Cases by name, "operation: case"."""
    return {name: _case(**fields) for name, fields in json.loads(file.read_text()).items()}


def save(file: Path, measured: dict[str, Case]) -> None:
    """Puts cases into a file, in place of those of the same names."""
    kept = load(file) if file.exists() else {}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps({name: _fields(c) for name, c in (kept | measured).items()}, indent=1) + "\n")
    os.replace(part, file)


def machine() -> str:
    """The GPU's name, or the processor's (Linux), or its architecture."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    installed = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    return {"python": platform.python_version()} | {name: installed[name] for name in PACKAGES if name in installed}


def sources(device: str) -> str:
    """A hash of the sources of the kernels for the CPU or for GPUs ("cuda"): results say which they are of."""
    kernels = ["csrc/cuda/*", "fastdiff/kernels/*.py"] if device == "cuda" else ["csrc/cpu/*"]
    files = sorted(file for pattern in ("csrc/*.h", *kernels) for file in ROOT.glob(pattern))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _quartiles(seconds: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return middle, low, high


def _fields(c: Case) -> dict:
    return c._asdict() | {"calls": {who: call._asdict() for who, call in c.calls.items()}, "rates": c.rates._asdict()}


def _case(calls: dict, rates: dict, **fields) -> Case:
    return Case({who: Call(**call) for who, call in calls.items()}, rates=Machine(**rates), **fields)
