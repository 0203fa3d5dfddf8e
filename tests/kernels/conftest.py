"""These tests run Triton kernels: on a GPU if there is one, else in the interpreter that TRITON_INTERPRET=1 asks for.

tests/test_triton.py runs them so where there is no GPU.
"""

import pytest
import torch

from fastdiff.backends import INTERPRETING

DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETING else "cpu")
collect_ignore_glob = [] if DEVICE.type == "cuda" or INTERPRETING else ["test_*"]


@pytest.fixture
def device():
    return DEVICE
