"""The operator namespace torch.ops.fastdiff. Each operator has one overload a backend, all with
the same schema.

Schemas are defined here in Python. The compiled extension registers its kernels to the overloads `cpu`; gpu.py says
what those of `triton` and `cuda` are.
"""

from collections.abc import Callable
from typing import Any

import torch

from fastdiff.backends import KERNELS

library = torch.library.Library("fastdiff", "DEF")


def define(name: str, signature: str, fake: Callable[..., Any], backends: tuple[str, ...] = KERNELS) -> dict[str, Any]:
    """Defines the overloads of an operator, with the shapes of its results under tracing; by backend."""
    for backend in backends:
        library.define(f"{name}.{backend}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"fastdiff::{name}.{backend}", fake, lib=library)
    return {backend: getattr(getattr(torch.ops.fastdiff, name), backend) for backend in backends}


def implement(name: str, function: Callable[..., Any]) -> None:
    """An implementation in terms of other operators, for every device."""
    library.impl(name, function, "CompositeExplicitAutograd")


def no_double_backward(name: str) -> None:
    """Makes differentiating a backward operator an error; without it the result would silently be zero."""

    def refuse(*_: Any) -> None:
        raise RuntimeError(f"fastdiff: {name} has no derivative, so double backward is not possible here")

    torch.library.register_autograd(f"fastdiff::{name}", refuse, lib=library)
