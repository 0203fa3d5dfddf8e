"""CUDA C++ without a GPU: the tests of tests/kernels in the emulator, and every kernel compiled by nvcc."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulated import TARGET_OPTIONS, extension, sources

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TESTS = sorted(map(str, (ROOT / "tests/kernels").glob("test_[cg]*.py")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/kernels runs on the GPU itself")
def test_in_the_emulator():
    """In one process, as each takes seconds to start. The order in which threads run must not matter; `make sanitize`
    has them backward, and sm_80, which has no clusters."""
    extension()
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *TESTS]
    env = os.environ | {"EMULATE_CUDA": "1", "EMULATED_CAPABILITY": "90", "EMULATED_ORDER": "shuffled"}
    result = subprocess.run(tests, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize(("architecture", "whole"), [("80", False), ("90a", True)])
@pytest.mark.parametrize("source", [s for s in sources() if s.suffix == ".cu"], ids=lambda s: s.stem)
def test_compiles_without_warnings_or_spills(source, architecture, whole, tmp_path):
    """The host's part too, which takes longer and is the same for all, where it is compiled whole."""
    options = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-Wall", "-Werror", "all-warnings"]
    options += ["-Xptxas", "-v", f"-gencode=arch=compute_{architecture},code=sm_{architecture}", *TARGET_OPTIONS]
    command = ["nvcc", *options, "-DUSE_CUDA", "-c" if whole else "-cubin", source, "-o", tmp_path / "object"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    registers = re.findall(r"Used (\d+) registers", result.stderr)
    assert len(spilled) >= len(registers) > 0  # functions that kernels call are told of as well
    assert set(spilled) == {("0", "0")}
    print(
        f"{source.stem} for sm_{architecture}: {len(registers)} kernels, at most {max(map(int, registers))} registers"
    )
