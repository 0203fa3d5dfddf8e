"""The kernels of every instruction set that this processor has; each needs a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff.backends import report

pytestmark = pytest.mark.slow

FILES = [str(Path(__file__).with_name(name)) for name in ("test_fuzz.py", "test_fuzz_distill.py")]
CASES = int(os.environ.get("FASTDIFF_FUZZ_CASES", "500")) // 6


@pytest.mark.parametrize("isa", ["baseline", "v3", "v4"])
def test_fuzz(isa):
    if isa in report()[0].detail:
        pytest.skip("these files run on it themselves")
    env = os.environ | {"FASTDIFF_CPU_ISA": isa, "FASTDIFF_FUZZ_CASES": str(CASES)}
    check = "from fastdiff.backends import report; print(report()[0].detail)"
    detail = subprocess.run([sys.executable, "-c", check], env=env, capture_output=True, text=True).stdout
    if "does not have" in detail:
        pytest.skip(f"this processor has no {isa}")
    assert isa in detail
    fuzz = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *FILES]
    result = subprocess.run(fuzz, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_an_unknown_instruction_set_is_an_error():
    env = os.environ | {"FASTDIFF_CPU_ISA": "v5"}
    code = "from fastdiff.backends import report; print(report()[0])"
    output = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout
    assert "FASTDIFF_CPU_ISA: expected baseline, v3 or v4, got v5" in output
