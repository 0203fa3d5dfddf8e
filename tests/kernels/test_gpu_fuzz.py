"""Random cases of the GPU backends: losses against the reference, masks bit for bit against the CPU kernels."""

from hypothesis import given
from hypothesis import strategies as st
from random_cases import CASES, check_dce, check_dse, check_masks, fuzz

FEWER = max(CASES // 20, 1)  # a case is interpreted, or may be compiled


@fuzz(FEWER)
@given(st.data())
def test_dce(backend, device, data):
    check_dce(data.draw, backend, device)


@fuzz(FEWER)
@given(st.data())
def test_dse(backend, device, data):
    check_dse(data.draw, backend, device)


@fuzz(FEWER)
@given(st.data())
def test_masks(backend, device, data):
    check_masks(data.draw, backend, "cpu", device)
