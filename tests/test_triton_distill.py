"""Every kernel of distillation in Triton compiled for a GPU that need not be here."""

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

from ahead_of_time import GPUS, POINTERS, ROWS, compiled, resources, wide_accesses

from fastdiff.kernels import distill
from fastdiff.kernels.targets import for_rows


@pytest.mark.parametrize("many", [None, 32], ids=["all ids", "some ids"])
@pytest.mark.parametrize(("gpu", "dtype"), ROWS, ids=str)
def test_compiles_to_wide_accesses_and_no_spills(gpu, dtype, many):
    rows = POINTERS[dtype]
    types = dict(Z=rows, TEACHER="*fp64" if many else rows, IDS="*i64", MASK="*i1", WEIGHT="*fp64", SHARE="*fp64")
    types |= dict(LOSS="*fp32", GRAD=rows, scale="fp32")
    types |= dict.fromkeys(["V", "many", "inner", "teacher_inner", "mask_index"], "i32")
    types |= {f"{who}stride_{name}": "i64" for who in ("", "teacher_") for name in ("outer", "inner")}
    for reverse in (False, True):
        constants = dict(REVERSE=reverse, WITH_GRAD=True, CONTIGUOUS=True, ALIKE=True)
        constants |= dict(MANY=many or 1) | ({} if many else dict(IDS=None))
        config = for_rows(distill.LARGE[dtype.itemsize], dtype.itemsize, GPUS[gpu])
        binary = compiled(distill.row_distill_kernel, types, constants | config, gpu)
        assert resources(binary)[1] == 0
        assert wide_accesses(binary, "load")
        assert wide_accesses(binary, "store")
