"""Triton kernels compiled for a GPU that need not be here."""

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdiff.kernels import reverse_rows, row_loss, row_sample
from fastdiff.ops.functors import FUNCTORS

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}


def compiled(kernel, types, config, capability):
    """The kernel for a compute capability. Pointers are multiples of 16, as torch's are, and so is what is "i32:16"."""
    options = {name: value for name, value in config.items() if name in ("num_warps", "num_stages", "maxnreg")}
    constants = {name: value for name, value in config.items() if name not in options}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    sixteens = [i for i, name in enumerate(names) if signature[name].startswith("*") or signature[name].endswith(":16")]
    signature = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    constants = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs={(i,): [["tt.divisibility", 16]] for i in sixteens}
    )
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options=options)


def compiled_row_loss(
    functor, dtype, num_states, capability, with_grad=True, in_place=False, with_stats=None, with_entropy=False
):
    softmax = functor in ("dce", "loo")
    if with_stats is None:
        with_stats = softmax and not with_entropy  # backward asks for none
    types = dict.fromkeys(["X0", "XT"], "*i64")
    types |= dict.fromkeys(["SIGMA", "WEIGHT", "ENTROPY_WEIGHT", "EXTRA", "SCALE"], "*fp64")
    types |= dict(Z=POINTERS[dtype], GRAD=POINTERS[dtype], LOSS="*fp32", STATS="*fp32", penalty="fp32")
    types |= dict.fromkeys(["V", "all_states", "inner", "mask_index"], "i32")
    types |= dict.fromkeys(["stride_outer", "stride_inner", "ignore_index"], "i64")
    constants = dict(MASK=None, FUNCTOR=functor, EXCLUDE_MASK=True, SCALE_BY_SIGMA=False, WITH_GRAD=with_grad)
    constants |= dict(IN_PLACE=in_place, CONTIGUOUS=True, VEC=16 // dtype.itemsize)
    given = dict(SIGMA=functor != "dce", STATS=with_stats, ENTROPY_WEIGHT=with_entropy, EXTRA=FUNCTORS[functor].extra)
    constants |= {name: None for name, is_given in given.items() if not is_given}
    constants |= row_loss.config(functor, num_states, dtype.itemsize)
    return compiled(row_loss.row_loss_kernel, types, constants, capability)


def compiled_row_sample(options, dtype, config, capability):
    types = dict.fromkeys(["XT", "EXCLUDE", "SEED", "STEP_NUMBER", "SAMPLE_IDS", "POSITIONS", "TOKENS"], "*i64")
    types |= dict(Z=POINTERS[dtype], LIVE="*i1", LAW="*fp64", ARGMAX="*i64", STATS="*fp32")
    types |= dict.fromkeys(["V", "num_excluded", "inner", "top_k"], "i32")
    types |= dict.fromkeys(["stride_outer", "stride_inner"], "i64") | dict.fromkeys(["temperature", "top_p"], "fp32")
    constants = dict(LAW=None, ARGMAX=None, STATS=None, GREEDY=False, TWO_SUMS=False, KEPT=False)
    constants |= dict(VEC=16 // dtype.itemsize) | options | config
    for given in [name for name, value in options.items() if value is True and name in types]:
        del constants[given]
    return compiled(row_sample.row_sample_kernel, types, constants, capability)


def compiled_reverse_rows(dtype, contiguous, config, capability):
    types = dict(Z=POINTERS[dtype], XT="*i64", LIVE="*i1", LAW="*fp64", PROBS="*fp32", V="i32", inner="i32")
    types |= dict.fromkeys(["stride_outer", "stride_inner"], "i64")
    constants = dict(CONTIGUOUS=contiguous, VEC=16 // dtype.itemsize)
    return compiled(reverse_rows.reverse_rows_kernel, types, constants | config, capability)


def resources(binary):
    """Registers of a thread, and bytes of them that the assembler had to keep in memory."""
    report, target = "", re.search(r"\.target (\w+)", binary.asm["ptx"])[1]
    with TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(binary.asm["ptx"])
        for ptxas in Path(triton.__file__).parent.rglob("ptxas*"):  # of those that Triton brings, one knows this PTX
            command = [ptxas, "-v", f"-arch={target}", ptx, "-o", ptx.with_suffix(".cubin")]
            report += subprocess.run(command, capture_output=True, text=True).stderr
    spilled = re.findall(r"(\d+) bytes spill", report)
    assert spilled, report
    return int(re.search(r"Used (\d+) registers", report)[1]), sum(map(int, spilled))
