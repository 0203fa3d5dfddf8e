"""CUDA C++ without a GPU: every kernel compiled by nvcc. `make sanitize` runs tests/kernels in an emulator."""

import re
import shutil
import subprocess

import pytest
from emulated import TARGET_OPTIONS, sources

pytestmark = pytest.mark.slow


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
