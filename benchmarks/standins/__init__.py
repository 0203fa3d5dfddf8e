"""Stand-ins for the codebases that fastdiff drops into: what each computes at its seam, in plain PyTorch.

Given a folder of their checkouts in FASTDIFF_CHECKOUTS, the real code is used where it can be imported.
"""

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor


@dataclass
class Problem:
    """A noised batch. Times and noise levels are one number a sequence, [B] float64."""

    x0: Tensor  # int64 [B, L]
    xt: Tensor  # x0 with masks
    moved: Tensor  # x0 with tokens drawn anew
    t: Tensor
    sigma: Tensor  # total noise of the log-linear schedule, -log(1 - t)
    dsigma: Tensor  # its rate, 1 / (1 - t)
    num_states: int  # the mask is the last

    @property
    def mask_index(self) -> int:
        return self.num_states - 1


def problem(batch: int, length: int, num_states: int, seed: int = 0) -> Problem:
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    x0 = torch.randint(0, num_states - 1, (batch, length), generator=g)
    t = 0.05 + 0.9 * torch.rand(batch, generator=g, dtype=torch.float64)
    noised = torch.rand(batch, length, generator=g) < t[:, None]
    anew = torch.randint(0, num_states, (batch, length), generator=g)
    xt, moved = torch.where(noised, num_states - 1, x0), torch.where(noised, anew, x0)
    return Problem(x0, xt, moved, t, -torch.log1p(-t), 1 / (1 - t), num_states)


def checkout(name: str, module: str) -> ModuleType | None:
    """A module of the checkout of this name, or None where there is none. Another checkout may have modules of the same
    names, so those of this one are not left where an import would find them."""
    folder = os.environ.get("FASTDIFF_CHECKOUTS")
    if folder is None or not (path := Path(folder) / name).is_dir():
        return None
    sys.path.insert(0, str(path))
    before = set(sys.modules)
    try:
        return importlib.import_module(module)
    finally:
        sys.path.remove(str(path))
        for new in set(sys.modules) - before:
            if str(getattr(sys.modules[new], "__file__", "")).startswith(str(path)):
                del sys.modules[new]
