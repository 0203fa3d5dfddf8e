"""The operator namespace torch.ops.fastdiff. Each operator has one overload a backend, all with
the same schema.

Schemas are defined here in Python. The compiled extension registers its kernels to the overloads `cpu`; gpu.py says
what those of `triton` and `cuda` are.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

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


def no_derivative(name: str, asked: str) -> None:
    """Makes differentiating an operator an error; without it the result would silently be zero."""

    def refuse(*_: Any) -> None:
        raise _not_there(name, asked)

    torch.library.register_autograd(f"fastdiff::{name}", refuse, lib=library)


def no_forward_mode(name: str, arguments: Iterable[Any]) -> None:
    """Raises where a tensor carries a tangent, which operators would silently drop."""
    if any(isinstance(x, Tensor) and unpack_dual(x).tangent is not None for x in arguments):
        raise _not_there(name, "forward-mode derivatives")


def _not_there(name: str, asked: str) -> RuntimeError:
    return RuntimeError(f"fastdiff: {name} does not give {asked}; backend='reference' does")
