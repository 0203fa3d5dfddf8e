"""These tests run the kernels of GPUs: on one if there is one; else Triton's in the interpreter that TRITON_INTERPRET=1
asks for, or those in CUDA C++ in the emulator that EMULATE_CUDA=1 asks for.

tests/test_triton.py and `make sanitize` run them so where there is no GPU.
"""

import os
from functools import cache

import pytest
import torch

if os.environ.get("EMULATE_CUDA") == "1":
    import emulated

    emulated.load()

from fastdiff.backends import CUDA_MISSING, EMULATING, INTERPRETING, TRITON_MISSING

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETING and not EMULATING else "cpu")
BACKENDS = [
    *(["triton"] if INTERPRETING or (DEVICE.type == "cuda" and TRITON_MISSING is None) else []),
    *(["cuda"] if EMULATING or (DEVICE.type == "cuda" and CUDA_MISSING is None) else []),
]
if DEVICE.type == "cuda" and not BACKENDS:
    raise RuntimeError(f"there is a GPU, and nothing to test on it: {TRITON_MISSING}; {CUDA_MISSING}")
collect_ignore_glob = [] if BACKENDS else ["test_*"]

if INTERPRETING:
    from triton.runtime import interpreter

    # It patches triton.language whenever a jitted function is called, and takes the patches back after each launch:
    # nearly half of its time. In a process that only interprets they may stay.
    if hasattr(interpreter, "_LangPatchScope"):
        interpreter._LangPatchScope.restore = lambda scope: None
        interpreter._patch_lang = cache(interpreter._patch_lang)


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param
