"""The overloads `triton` and `cuda` of an operator: one function makes the results, one launch of a kernel fills them.

A launch has the same name and arguments in both: in Triton it is a function of a module in fastdiff.kernels, which is
imported when it first runs; in CUDA C++ an operator, which the extension fastdiff._C_cuda registers.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends import EMULATING, INTERPRETING
from fastdiff.ops.library import library


def define_launch(name: str, signature: str) -> None:
    """The launch of a CUDA kernel."""
    library.define(f"{name}({signature}) -> ()")


def implement_on_gpus(name: str, function: Callable[..., Any], triton: str | None) -> None:
    """The overloads are function(kernels, *arguments), where `kernels` has the launches; for Triton in this module."""
    for backend, on_cpu in (("triton", INTERPRETING), ("cuda", EMULATING)):
        if backend == "triton" and triton is None:
            continue
        for key in ("CUDA", "CPU") if on_cpu else ("CUDA",):
            library.impl(f"{name}.{backend}", functools.partial(_call, function, backend, triton), key)


def _call(function: Callable[..., Any], backend: str, module: str | None, *arguments: Any) -> Any:
    kernels = importlib.import_module(f"fastdiff.kernels.{module}") if backend == "triton" else torch.ops.fastdiff
    with torch.cuda.device_of(arguments[0]):
        return function(kernels, *arguments)


def at_most_three_dimensions(z: Tensor) -> Tensor:
    """z [..., V] as kernels take it: row r begins at (r // n) * stride(0) + (r % n) * stride(1), n = shape[1], or at
    r * stride(0)."""
    return z.flatten(0, -3) if z.dim() > 3 else z  # a copy if its strides ask for one
