"""`fastdiff doctor`."""

import importlib.metadata
import platform
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from fastdiff import backends
from fastdiff.cli.options import show


def doctor() -> None:
    """What can run here, and why not the rest."""
    versions = {
        "python": platform.python_version(),
        "fastdiff from": str(Path(backends.__file__).parent),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    for package in ("fastdiff-kernels", "torch", "numpy", "triton"):
        versions[package] = _version(package)
    show("versions", versions)
    table = Table("backend", "available", "detail", title="backends", title_justify="left")
    for name, available, detail in backends.report():
        table.add_row(name, "yes" if available else "no", detail)
    Console().print(table)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
