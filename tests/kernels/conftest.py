"""These tests run Triton kernels: on a GPU if there is one, else in the interpreter that TRITON_INTERPRET=1 asks for.

tests/test_triton.py runs them so where there is no GPU.
"""

from functools import cache

import pytest
import torch

from fastdiff.backends import INTERPRETING

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu")
collect_ignore_glob = [] if DEVICE.type == "cuda" or INTERPRETING else ["test_*"]

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
