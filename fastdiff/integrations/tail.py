"""What a model does with its logits behind its last layer, found out from what it makes of given numbers."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

_ROUNDED = (torch.bfloat16, torch.float16)  # what wrappers round logits to


@dataclasses.dataclass(frozen=True)
class Tail:
    """softcap * tanh(scale * z / softcap) of the first num_states ids; the rest of num_logits is -inf, and left_out."""

    scale: float
    softcap: float
    num_states: int
    num_logits: int
    left_out: int | None

    def __call__(self, z: Tensor) -> Tensor:
        z = z[..., : self.num_states]
        z = z if self.scale == 1 else z * self.scale
        return z if self.softcap == 0 else self.softcap * torch.tanh(z / self.softcap)

    def applied(self, options: dict[str, Any]) -> dict[str, Any]:
        """A loss's options, which leave out what the model does.

        Raises:
            ValueError: they count what the model leaves out, or leave out another id.
        """
        if self.left_out is None and self.num_states == self.num_logits:
            return options
        said = options.get("mask_index", -1)
        said += self.num_logits if said < 0 else 0
        if "sigma" in options:
            if options.get("graph", "absorb") != "absorb" or said != self.left_out or self.num_states < self.num_logits:
                raise ValueError("graph: expected a model that leaves out no id but the absorbing graph's mask")
            return options
        excluded = options.get("exclude_mask", True) and said < self.num_states
        if self.left_out is None:
            return {**options, "mask_index": said, "exclude_mask": excluded}
        if said != self.left_out and (excluded or options.get("xt") is not None):
            raise ValueError(f"mask_index: expected {self.left_out}, which the model leaves out, got {said}")
        return {**options, "mask_index": self.left_out, "exclude_mask": True}


def numbers(num_states: int) -> Tensor:
    """[4, V] float64: of many sizes and either sign for each id, with so few bits that no type rounds them."""
    g, n = torch.Generator("cpu").manual_seed(0), 4 * num_states
    sizes = torch.linspace(-20, 15, n, dtype=torch.float64, device="cpu")
    exponent = sizes[torch.randperm(n, generator=g, device="cpu")].floor()
    mantissa = torch.randint(128, 256, (n,), generator=g, device="cpu").double() / 128
    sign = 1 - 2 * torch.randint(0, 2, (4, num_states), generator=g, device="cpu").double()
    sign[1], sign[2] = 1, -1
    return (mantissa * 2**exponent).view(4, num_states) * sign


def fitted(z: Tensor, found: Tensor) -> Tail:
    """The tail that makes of z [4, V] what was found, [4, V] or fewer ids.

    Raises:
        ValueError: there is none.
    """
    z, found, num_logits = z[:, : found.shape[1]], found.double(), found.shape[1]
    kept = (found > torch.finfo(torch.float16).min).any(0)  # less stands for -inf
    num_states = int(kept.nonzero().max()) + 1 if kept.any() else 0
    out = (~kept[:num_states]).nonzero().flatten().tolist()
    if not out and num_states == num_logits - 1:  # the last alone may be the mask
        out, num_states = [num_states], num_logits
    if len(out) > 1 or num_states == 0:
        raise ValueError(f"logits: expected at most one id left out, and the last of them, got {out[:8]}")
    kept[num_states:] = False
    z, got = z[:, kept].flatten(), found[:, kept].flatten()
    rounded = any(torch.equal(got.to(dtype).double(), got) for dtype in _ROUNDED)
    rtol, atol, smallest = (2**-6, 2**-24, 2**-12) if rounded else (4e-6, 0, 0)
    sizes = torch.where(z.abs() < smallest, math.inf, z.abs())
    least = sizes.topk(-(-len(z) // 10), largest=False).indices  # a softcap does nothing to these
    scale = (got[least] / z[least]).median().item()
    scale = 1.0 if abs(scale - 1) < rtol / 4 else scale
    for softcap in (0.0, got.abs().max().item()):
        tail = Tail(scale, softcap, num_states, num_logits, out[0] if out else None)
        made = dataclasses.replace(tail, num_states=len(z))(z)
        exact = any(torch.equal(made.to(dtype).double(), got) for dtype in (torch.float64, *_ROUNDED))
        if exact or ((scale, softcap) != (1, 0) and torch.allclose(made, got, rtol, atol)):
            return tail
    at = (scale * z - got).abs().argmax()
    raise ValueError(
        "logits: expected a model that scales, caps (softcap * tanh) or cuts what its last layer gives, or leaves out "
        f"an id; got one that makes {got[at].item():.5g} of {z[at].item():.5g}"
    )
