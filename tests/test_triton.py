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
    GPUS,
    POINTERS,
    cases,
    compiled,
    compiled_reverse_rows,
    compiled_row_loss,
    compiled_row_sample,
    resources,
    wide_accesses,
)
from triton.compiler import make_backend

from fastdiff.kernels import corrupt, distill, linear_loss, reverse_rows, row_loss, row_sample, rows, targets
from fastdiff.ops.functors import FUNCTORS

pytestmark = pytest.mark.slow

# Two processes, which each take seconds to start: as many as workers, and of about the same length.
PATHS = sorted(map(str, Path(__file__).parent.glob("kernels/test_[gt]*.py")))
LOSSES = [path for path in PATHS if "row_loss" in path]
INTERPRETED = {"row losses": LOSSES, "others": [path for path in PATHS if path not in LOSSES]}


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/kernels runs on the GPU itself")
@pytest.mark.parametrize("which", INTERPRETED)
def test_in_the_interpreter(which):
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *INTERPRETED[which]]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(tests, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(("functor", "gpu", "dtype"), cases(FUNCTORS, POINTERS), ids=str)
def test_row_loss_compiles_to_wide_loads_and_no_spills(functor, gpu, dtype):
    variants = [dict(num_states=50257)]
    if (gpu, dtype) == ("sm_90", torch.bfloat16):
        variants += [dict(num_states=1000), dict(num_states=50257, with_grad=False)]
        variants += [dict(num_states=50257, in_place=True)] * FUNCTORS[functor].of_scores  # elsewhere the same kernel
        variants += [dict(num_states=50257, with_entropy=True)] * (functor == "dce")
    for variant in variants:
        binary = compiled_row_loss(functor, dtype, gpu=gpu, **variant)
        assert resources(binary)[1] == 0
        # A row of odd length starts anywhere; all but its two ends goes in 16-byte accesses all the same.
        assert wide_accesses(binary, "load")
        assert not variant.get("with_grad", True) or wide_accesses(binary, "store")


STATS = dict(ARGMAX=True, STATS=True)
DRAWS = {
    "plain": {},
    "kept": dict(KEPT=True),
    "statistics": STATS,
    "statistics, temperature": STATS | dict(TWO_SUMS=True),
    "law": dict(LAW=True),
    "law, temperature": dict(LAW=True, TWO_SUMS=True),
}


@pytest.mark.parametrize(("name", "gpu", "dtype"), cases(DRAWS, POINTERS), ids=str)
def test_row_sample_compiles_to_wide_loads_and_no_spills(name, gpu, dtype):
    careful = name != "plain"
    config = row_sample.CAREFUL if careful else rows.LARGE[dtype.itemsize]
    binary = compiled_row_sample(DRAWS[name], dtype, config, gpu)
    assert resources(binary)[1] == 0
    assert wide_accesses(binary, "load")


@pytest.mark.parametrize(("contiguous", "gpu", "dtype"), cases([True, False], POINTERS), ids=str)
def test_reverse_rows_compiles_to_wide_accesses_and_no_spills(contiguous, gpu, dtype):
    config = rows.LARGE[dtype.itemsize]
    binary = compiled_reverse_rows(dtype, contiguous, config, gpu)
    assert resources(binary)[1] == 0
    assert wide_accesses(binary, "load")
    if contiguous:  # 4 numbers a thread and store, in the loop for zeros and in that for probabilities
        threads = GPUS[gpu].warp_size * config["num_warps"]
        assert wide_accesses(binary, "store") >= 2 * config["BLOCK"] // (4 * threads)


OTHERS = {
    "masks": (corrupt.token_noise_kernel, corrupt.TOKENS),
    "redraws": (corrupt.token_noise_kernel, corrupt.TOKENS | {"MASKED": None}),
    "short subsets": (corrupt.subset_kernel, corrupt.SHORT),
    "subsets": (corrupt.subset_kernel, corrupt.MEDIUM),
    "scale": (row_loss.scale_kernel, row_loss.SCALE),
    "long subsets": (corrupt.subset_kernel, corrupt.LONG),
}


@pytest.mark.parametrize(("name", "gpu", "dtype"), cases(OTHERS), ids=str)
def test_other_kernels_compile_without_spills(name, gpu, dtype):
    names = dict.fromkeys(["X0", "SEED", "STEPS", "SAMPLE_IDS", "XT", "COUNTS", "CU_SEQLENS"], "*i64")
    types = names | dict.fromkeys(["P", "TABLE", "WEIGHT"], "*fp64") | dict.fromkeys(["MASKABLE", "MASKED"], "*i1")
    types |= dict.fromkeys(["length", "p_stride_b", "p_stride_l", "mask_index", "number"], "i32")
    types |= dict(GRAD=POINTERS[dtype], FACTOR="*fp32", size="i64")
    kernel, config = OTHERS[name]
    assert resources(compiled(kernel, types, config, gpu))[1] == 0


PRODUCTS = {
    "sm_80": ("cp.async.cg", "mma.sync", 163),
    "sm_90": ("cp.async.cg", "wgmma", 227),
    "sm_100": ("cp.async.cg", "tcgen05", 227),
    "gfx942": ("buffer_load_dwordx4|global_load_dwordx4", "v_mfma", 64),
    "gfx950": ("(buffer|global)_load_(lds_dwordx4|dwordx4 .* lds)", "v_mfma", 160),
}


@pytest.mark.parametrize(("name", "gpu", "dtype"), cases(["plain", "bias", "bias, softcap", "softcap"]), ids=str)
def test_evaluation_without_logits_compiles_to_pipelined_products(name, gpu, dtype):
    types = dict.fromkeys(["HIDDEN", "LM_HEAD", "BIAS"], POINTERS[dtype])
    types |= dict.fromkeys(["INDEX", "COUNT", "X0"], "*i64") | dict.fromkeys(["TOP", "TOTAL", "AT_X0"], "*fp32")
    types |= dict.fromkeys(["num_rows", "num_ids", "excluded"], "i32") | dict.fromkeys(["width", "share"], "i32:16")
    config = linear_loss.TILE | dict(SOFTCAP="softcap" in name) | ({} if "bias" in name else dict(BIAS=None))
    binary = compiled(linear_loss.row_sums_kernel, types | dict(softcap="fp32"), config, gpu)
    assert resources(binary)[1] == 0
    # Operands come 16 bytes at a time, past the registers but on gfx942; a program has so many KiB for them.
    copy, product, room = PRODUCTS[gpu]
    code = binary.asm["amdgcn" if gpu.startswith("gfx") else "ptx"]
    assert re.search(copy, code)
    assert product in code
    assert binary.metadata.shared <= room * 1024


@pytest.mark.parametrize("num_states", [50257, 1000])
@pytest.mark.parametrize("dtype", list(POINTERS), ids=str)
@pytest.mark.parametrize("gpu", GPUS)
def test_launches_load_16_bytes_a_thread_and_name_no_option_of_another_gpu(gpu, dtype, num_states, monkeypatch):
    launches = {}

    class Recorded:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *arguments, **settings: launches.update({self.kernel: settings})

    monkeypatch.setattr(targets, "here", lambda: GPUS[gpu])
    for module, name in (
        (row_loss, "row_loss_kernel"),
        (row_sample, "row_sample_kernel"),
        (reverse_rows, "reverse_rows_kernel"),
        (distill, "row_distill_kernel"),
    ):
        monkeypatch.setattr(module, name, Recorded(getattr(module, name)))
    z, x = torch.zeros(3, num_states, dtype=dtype), torch.zeros(3, dtype=torch.long)
    nothing = [None] * 5
    row_loss.launch_row_loss(z, x, x, *nothing, x, x, z, None, "dce", 0, True, -100, False, 0.0, num_states)
    row_sample.launch_row_sample(z, x, x, *nothing[:2], x, x, x, x, x, x, x, 1.0, 0, 1.0)
    reverse_rows.launch_reverse_rows(z, x, x, x, z)
    distill.launch_row_distill(z, z, *nothing[:3], x, x, z, False, 0, 1.0)
    assert len(launches) == 4
    options = vars(make_backend(GPUS[gpu]).parse_options({}))
    for kernel, settings in launches.items():
        assert settings.keys() <= {*kernel.arg_names, *options}
        threads = GPUS[gpu].warp_size * settings["num_warps"]
        assert settings["VEC"] * dtype.itemsize == 16
        assert settings["BLOCK"] >= settings["VEC"] * threads
