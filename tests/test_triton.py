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

from ahead_of_time import (
    POINTERS,
    compiled,
    compiled_reverse_rows,
    compiled_row_loss,
    compiled_row_sample,
    resources,
)

from fastdiff.kernels import corrupt, linear_loss, row_loss, row_sample
from fastdiff.ops.functors import FUNCTORS


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/kernels runs on the GPU itself")
@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("kernels/test_[gt]*.py")), ids=lambda p: p.stem)
def test_in_the_interpreter(path):
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore"]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run([*tests, str(path)], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("dtype", list(POINTERS), ids=str)
@pytest.mark.parametrize("functor", FUNCTORS)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_row_loss_compiles_to_wide_loads_and_no_spills(capability, functor, dtype):
    cases = [dict(num_states=50257)]
    if (capability, dtype) == (90, torch.bfloat16):
        cases += [dict(num_states=1000), dict(num_states=50257, with_grad=False)]
        cases += [dict(num_states=50257, in_place=True)] * FUNCTORS[functor].of_scores  # elsewhere the same kernel
        cases += [dict(num_states=50257, with_entropy=True)] * (functor == "dce")
    for case in cases:
        binary = compiled_row_loss(functor, dtype, capability=capability, **case)
        assert resources(binary)[1] == 0
        # A row of odd length starts anywhere; all but its two ends goes in 16-byte accesses all the same.
        ptx = binary.asm["ptx"]
        assert re.search(r"ld\.global[\w.:]*\.v4\.b32", ptx)
        assert not case.get("with_grad", True) or re.search(r"st\.global[\w.:]*\.v4\.b32", ptx)


STATS = dict(ARGMAX=True, STATS=True)
DRAWS = {
    "plain": {},
    "kept": dict(KEPT=True),
    "statistics": STATS,
    "statistics, temperature": STATS | dict(TWO_SUMS=True),
    "law": dict(LAW=True),
    "law, temperature": dict(LAW=True, TWO_SUMS=True),
}


@pytest.mark.parametrize("dtype", list(POINTERS), ids=str)
@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_row_sample_compiles_to_wide_loads_and_no_spills(capability, name, dtype):
    careful = name.startswith(("statistics", "law"))
    config = row_sample.CAREFUL if careful else row_loss.LARGE[dtype.itemsize]
    binary = compiled_row_sample(DRAWS[name], dtype, config, capability)
    assert resources(binary)[1] == 0
    assert re.search(r"ld\.global[\w.:]*\.v4\.b32", binary.asm["ptx"])


@pytest.mark.parametrize("dtype", list(POINTERS), ids=str)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_reverse_rows_compiles_to_wide_accesses_and_no_spills(capability, dtype):
    config = row_loss.LARGE[dtype.itemsize]
    for contiguous in (True, False):
        binary = compiled_reverse_rows(dtype, contiguous, config, capability)
        assert resources(binary)[1] == 0
        ptx = binary.asm["ptx"]
        assert re.search(r"ld\.global[\w.:]*\.v4\.b32", ptx)
        if contiguous:  # 4 numbers a thread and store, in the loop for zeros and in that for probabilities
            stores = len(re.findall(r"st\.global[\w.:]*\.v4\.b32", ptx))
            assert stores >= 2 * config["BLOCK"] // (4 * 32 * config["num_warps"])


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_other_kernels_compile_without_spills(capability):
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
        assert resources(compiled(kernel, types, config, capability))[1] == 0


@pytest.mark.parametrize("softcap", [False, True], ids=["plain", "softcap"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_evaluation_without_logits_compiles_to_pipelined_products(capability, bias, softcap):
    types = dict.fromkeys(["HIDDEN", "LM_HEAD", "BIAS"], "*bf16") | dict.fromkeys(["INDEX", "COUNT", "X0"], "*i64")
    types |= dict.fromkeys(["TOP", "TOTAL", "AT_X0"], "*fp32") | dict.fromkeys(
        ["num_rows", "num_ids", "excluded"], "i32"
    )
    types |= dict(width="i32:16", share="i32:16", softcap="fp32")
    config = linear_loss.TILE | dict(SOFTCAP=softcap) | ({} if bias else dict(BIAS=None))
    binary = compiled(linear_loss.row_sums_kernel, types, config, capability)
    assert resources(binary)[1] == 0
    assert "cp.async.cg" in binary.asm["ptx"]  # 16 bytes past the registers
    assert {80: "mma.sync", 90: "wgmma", 100: "tcgen05"}[capability] in binary.asm["ptx"]
