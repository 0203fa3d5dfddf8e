"""Launch settings on the GPU that is there: one of NVIDIA's, or one of AMD's, whose warps may be twice as wide."""

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from fastdiff.backends import INTERPRETING

NVIDIA = GPUTarget("cuda", 80, 32)  # as far as settings go they are all alike


def here() -> GPUTarget:
    """The GPU that launches are for now; one of NVIDIA's in the interpreter."""
    return NVIDIA if INTERPRETING or torch.version.hip is None else driver.active.get_current_target()


def for_rows(settings: dict[str, int], size: int, target: GPUTarget | None = None) -> dict[str, int]:
    """Settings of a kernel that walks rows of numbers of `size` bytes, with VEC, how many of them are 16 bytes: no more
    warps than have that much of a block for each thread. AMD's compiler takes no maxnreg, and needs none."""
    target = target or here()
    vec = 16 // size
    warps = min(settings["num_warps"], settings["BLOCK"] // (vec * target.warp_size))
    known = {name: value for name, value in settings.items() if name != "maxnreg" or target.backend == "cuda"}
    return known | dict(num_warps=warps, VEC=vec)
