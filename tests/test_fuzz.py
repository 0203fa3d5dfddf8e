"""Random cases of the compiled kernels against the reference; FASTDIFF_FUZZ_CASES sets how many."""

from hypothesis import given
from hypothesis import strategies as st
from random_cases import CASES, check_dce, check_dse, check_masks, fuzz


@fuzz(CASES)
@given(st.data())
def test_dce(data):
    check_dce(data.draw, "cpu")


@fuzz(CASES)
@given(st.data())
def test_dse(data):
    check_dse(data.draw, "cpu")


@fuzz(CASES)
@given(st.data())
def test_masks(data):
    check_masks(data.draw, "cpu", expected="reference")
