"""The operator namespace torch.ops.fastdiff. Schemas are defined here in Python; backends register kernels to them."""

from typing import Any

import torch

library = torch.library.Library("fastdiff", "DEF")


def define(schema: str) -> Any:
    """Defines an operator and returns its overload."""
    name = library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    return getattr(torch.ops.fastdiff, name).default


def implement(name: str, function: Any) -> None:
    """An implementation in terms of other operators, for every device."""
    library.impl(name, function, "CompositeExplicitAutograd")


def no_double_backward(name: str) -> None:
    """Makes differentiating a backward operator an error; without it the result would silently be zero."""

    def refuse(*_: Any) -> None:
        raise RuntimeError(f"fastdiff: {name} has no derivative, so double backward is not possible here")

    torch.library.register_autograd(f"fastdiff::{name}", refuse, lib=library)
