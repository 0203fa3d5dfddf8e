"""Random cases of the GPU backends: losses and laws from their definitions, masks bit for bit as the CPU kernels'."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from random_cases import (
    CASES,
    check_conditionals,
    check_csm,
    check_dce,
    check_dse,
    check_logps,
    check_masks,
    fuzz,
)
from random_draws import check_reverse

FEWER = max(CASES // 40, 1)  # a case is interpreted, or may be compiled


@fuzz(FEWER)
@given(st.data())
def test_dce(backend, device, data):
    check_dce(data.draw, backend, device)


@fuzz(FEWER)
@given(st.data())
def test_logps(backend, device, data):
    check_logps(data.draw, backend, device)


@fuzz(FEWER)
@given(st.data())
def test_dse(backend, device, data):
    check_dse(data.draw, backend, device)


@fuzz(FEWER)
@given(st.data())
def test_csm(backend, device, data):
    check_csm(data.draw, backend, device)


@fuzz(FEWER)
@given(st.data())
def test_conditionals(backend, device, data):
    check_conditionals(data.draw, backend, device)


@fuzz(FEWER)
@given(st.data())
def test_masks(backend, device, data):
    check_masks(data.draw, backend, "cpu", device)


@fuzz(max(FEWER // 5, 1))
@given(st.data())
def test_reverse(backend, device, data):
    check_reverse(data.draw, backend, Counter(), device)
