"""Checks of public arguments. Each raises an error that names the argument, what came and what was expected."""

import numbers
import operator
import os

import torch
from torch import Tensor

Number = int | float
CHECKED = os.environ.get("FASTDIFF_CHECK") == "1"  # look at values on every device, and wait for it


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")


def check_integer(name: str, value: object, least: int | None = None) -> int:
    """An integer of any kind, NumPy's and a tensor of one too, but no bool, as an int."""
    if type(value) is not int:  # of what torch.compile traces nothing more must be asked
        try:
            if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
                raise TypeError
            value = operator.index(value)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"{name}: expected an int, got {value!r}") from None
    if least is not None and value < least:
        raise ValueError(f"{name}: expected at least {least}, got {value}")
    return value


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def check_tokens(name: str, tokens: Tensor, shape: torch.Size | None, device: torch.device | None = None) -> None:
    check_tensor(name, tokens)
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name}: expected int64 or int32 token ids, got {tokens.dtype}")
    _check_place(name, tokens, shape, device)


def check_bool(name: str, value: Tensor, shape: torch.Size, device: torch.device) -> None:
    check_tensor(name, value)
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: expected a bool tensor, got {value.dtype}")
    _check_place(name, value, shape, device)


def check_rows(name: str, rows: Tensor, width: str = "V") -> None:
    """Rows of V numbers: [..., V], floating, V >= 1; `width` is what messages call V."""
    check_tensor(name, rows)
    if rows.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        raise TypeError(f"{name}: expected float32, float64, bfloat16 or float16, got {rows.dtype}")
    if rows.dim() < 2 or rows.shape[-1] < 1:
        raise ValueError(f"{name}: expected shape [..., {width}] with at least 2 dimensions, got {tuple(rows.shape)}")


def per_token(name: str, value: Number | Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """A number, or a tensor over a prefix of the token shape, as float64 of the whole token shape.

    [B] against [B, L] is one value per sequence, also when B == L; [B, 1] and [B, L] broadcast as given.
    """
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name}: expected a number or a tensor, got {type(value).__name__}")
        return torch.full(shape, value, dtype=torch.float64, device=device)
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: has no gradient here, but came with requires_grad=True; detach it")
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected real numbers, got {value.dtype}")
    if value.device != device and value.dim() > 0:
        raise ValueError(f"{name}: expected a tensor on {device}, got {value.device}")
    spread = value.reshape(value.shape + (1,) * (len(shape) - value.dim()))
    if value.dim() > len(shape) or any(v != 1 and v != s for v, s in zip(spread.shape, shape, strict=True)):
        raise ValueError(
            f"{name}: expected a number or a shape that is a prefix of {tuple(shape)} or broadcasts to it, "
            f"got {tuple(value.shape)}"
        )
    return spread.to(device=device, dtype=torch.float64).expand(shape)


def values_are_checked(device: torch.device) -> bool:
    """Whether to look at values: not where that would break a graph, or wait for a device without CHECKED."""
    return not torch.compiler.is_compiling() and (CHECKED or device.type == "cpu")


def check_values(name: str, value: Tensor, wrong: Tensor, expected: str) -> None:
    """Raises where `wrong` is true, if values are checked."""
    if not values_are_checked(value.device) or not wrong.any():
        return
    at = tuple(wrong.nonzero()[0].tolist())
    raise ValueError(f"{name}: expected {expected}, got {value[at].item()} at {list(at)}")


def vocabulary_index(name: str, index: int, num_states: int) -> int:
    """A token id, negative ones counted from the end."""
    index = check_integer(name, index)
    if not -num_states <= index < num_states:
        raise ValueError(f"{name}: expected an id in [-{num_states}, {num_states}), got {index}")
    return index % num_states


def _check_place(name: str, value: Tensor, shape: torch.Size | None, device: torch.device | None) -> None:
    if shape is not None and value.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(value.shape)}")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {value.device}")
