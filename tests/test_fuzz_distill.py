"""Random cases of distillation, on every instruction set that this processor has."""

import os
import subprocess
import sys

import pytest
from distill_cases import check_distill
from hypothesis import given
from hypothesis import strategies as st
from random_cases import CASES, fuzz


@fuzz(CASES // 2)
@given(st.data())
def test_distill(data):
    check_distill(data.draw, "cpu")


@pytest.mark.parametrize("isa", ["baseline", "v3"])
def test_other_instruction_sets(isa):
    env = os.environ | {"FASTDIFF_CPU_ISA": isa, "FASTDIFF_FUZZ_CASES": str(CASES // 5)}
    check = "from fastdiff.backends import report; print(report()[0].detail)"
    detail = subprocess.run([sys.executable, "-c", check], env=env, capture_output=True, text=True).stdout
    if "does not have" in detail:
        pytest.skip(f"this processor has no {isa}")
    fuzz = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"{__file__}::test_distill"]
    result = subprocess.run(fuzz, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
