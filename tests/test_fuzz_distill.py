"""Random cases of distillation."""

from distill_cases import check_distill
from hypothesis import given
from hypothesis import strategies as st
from random_cases import CASES, fuzz


@fuzz(CASES // 2)
@given(st.data())
def test_distill(data):
    check_distill(data.draw, "cpu")
