"""Triton without a GPU: the tests of tests/kernels in the interpreter, and every kernel compiled ahead of time."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdiff.kernels import corrupt, row_loss

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
# Bytes stored and loaded again: 4 of a row's float64 constants, beside 255 registers that are full.
ALLOWED_SPILLS = {(100, "dse_uniform_logits", torch.float32, True): 8}
FUNCTORS = ["dce", "dse_absorb", "dse_uniform", "dse_uniform_logits"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/kernels runs on the GPU itself")
@pytest.mark.parametrize("file", ["test_triton_row_loss.py", "test_triton_corrupt.py"])
def test_in_the_interpreter(file):
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    path = str(Path(__file__).parent / "kernels" / file)
    result = subprocess.run([*tests, path], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def compiled(kernel, types, constants, capability, num_warps):
    """The kernel for a compute capability, with every pointer aligned to 16 bytes, as torch's tensors are."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=num_warps))


def spills(binary, tmp_path):
    """Bytes of registers that the assembler had to keep in memory."""
    ptx, report = tmp_path / "kernel.ptx", ""
    ptx.write_text(binary.asm["ptx"])
    target = re.search(r"\.target (\w+)", binary.asm["ptx"]).group(1)
    for ptxas in Path(triton.__file__).parent.rglob("ptxas*"):  # of those that Triton brings, one that knows this PTX
        command = [ptxas, "-v", f"-arch={target}", ptx, "-o", tmp_path / "kernel.cubin"]
        report += subprocess.run(command, capture_output=True, text=True).stderr
    found = re.findall(r"(\d+) bytes spill", report)
    assert found, report
    return sum(map(int, found))


@pytest.mark.parametrize("with_grad", [False, True], ids=["forward", "gradient"])
@pytest.mark.parametrize("dtype", list(POINTERS), ids=str)
@pytest.mark.parametrize("functor", FUNCTORS)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_row_loss_compiles_to_wide_loads_and_no_spills(capability, functor, dtype, with_grad, tmp_path):
    types = dict.fromkeys(["X0", "XT"], "*i64") | dict.fromkeys(["SIGMA", "WEIGHT", "SCALE"], "*fp64")
    types |= dict(Z=POINTERS[dtype], GRAD=POINTERS[dtype], LOSS="*fp32", STATS="*fp32", z_loss="fp32")
    types |= dict(V="i32", inner="i32", stride_outer="i64", stride_inner="i64", mask_index="i32", ignore_index="i64")
    constants = dict(MASK=None, FUNCTOR=functor, EXCLUDE_MASK=True, SCALE_BY_SIGMA=False, WITH_GRAD=with_grad)
    constants |= dict(CONTIGUOUS=True, VEC=16 // dtype.itemsize)
    if functor == "dce":
        constants["SIGMA"] = None
    else:
        constants["STATS"] = None
    for config in (row_loss.SMALL, row_loss.LARGE[dtype.itemsize]):
        options = config.copy()
        num_warps = options.pop("num_warps")
        binary = compiled(row_loss.row_loss_kernel, types, constants | options, capability, num_warps)
        assert spills(binary, tmp_path) <= ALLOWED_SPILLS.get((capability, functor, dtype, with_grad), 0)
        # A row of odd length starts anywhere; all but its two ends goes in 16-byte accesses all the same.
        ptx = binary.asm["ptx"]
        assert re.search(r"ld\.global[\w.:]*\.v4\.b32", ptx)
        assert not with_grad or re.search(r"st\.global[\w.:]*\.v4\.b32", ptx)


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_other_kernels_compile_without_spills(capability, tmp_path):
    names = dict.fromkeys(["X0", "SEED", "STEPS", "SAMPLE_IDS", "XT", "COUNTS", "CU_SEQLENS"], "*i64")
    types = names | dict.fromkeys(["P", "TABLE", "WEIGHT"], "*fp64") | dict.fromkeys(["MASKABLE", "MASKED"], "*i1")
    types |= dict.fromkeys(["length", "p_stride_b", "p_stride_l", "mask_index", "number"], "i32")
    types |= dict(GRAD="*bf16", FACTOR="*fp32", size="i64")
    cases = [
        (corrupt.token_noise_kernel, corrupt.TOKENS),
        (corrupt.token_noise_kernel, corrupt.TOKENS | {"MASKED": None}),
    ]
    cases += [(corrupt.subset_kernel, config) for config in (corrupt.SHORT, corrupt.MEDIUM, corrupt.LONG)]
    cases += [(row_loss.scale_kernel, row_loss.SCALE)]
    for kernel, config in cases:
        constants = {name: value for name, value in config.items() if name != "num_warps"}
        binary = compiled(kernel, types, constants, capability, config["num_warps"])
        assert spills(binary, tmp_path) == 0
