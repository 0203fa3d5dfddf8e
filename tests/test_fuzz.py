"""Random cases of the compiled kernels and of the reference; FASTDIFF_FUZZ_CASES sets how many."""

from collections import Counter

import pytest
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
from random_draws import check_reverse, check_sample
from random_fits import check_fits


@fuzz(CASES)
@given(st.data())
def test_dce(data):
    check_dce(data.draw, "cpu")


@fuzz(max(CASES // 3, 1))
@given(st.data())
def test_logps(data):
    check_logps(data.draw, "cpu")


@fuzz(CASES)
@given(st.data())
def test_dse(data):
    check_dse(data.draw, "cpu")


@fuzz(CASES)
@given(st.data())
def test_csm(data):
    check_csm(data.draw, "cpu")


@fuzz(CASES)
@given(st.data())
def test_conditionals(data):
    check_conditionals(data.draw, "cpu")


@fuzz(CASES)
@given(st.data())
def test_masks(data):
    check_masks(data.draw, "cpu", expected="reference")


@fuzz(max(CASES // 5, 1))
@given(st.data())
def test_fits(data):
    check_fits(data.draw)


@pytest.mark.parametrize("check", [check_sample, check_reverse])
def test_draws(check):
    tally = Counter()

    @fuzz(max(CASES // 10, 1))  # the reference takes its time
    @given(st.data())
    def run(data):
        check(data.draw, "cpu", tally)

    run()
    assert 1000 * tally["rows that differ"] < max(tally["live rows"], 1), tally
