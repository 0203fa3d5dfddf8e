"""Triton kernels compiled for a GPU that need not be here."""

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdiff.kernels import reverse_rows, row_loss, row_sample
from fastdiff.kernels.targets import for_rows
from fastdiff.ops.functors import FUNCTORS

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}
GPUS = {f"sm_{capability}": GPUTarget("cuda", capability, 32) for capability in (80, 90, 100)}
GPUS |= {name: GPUTarget("hip", name, 64) for name in ("gfx942", "gfx950")}
# Of AMD's two, which are much alike, each has half of the cases.
ROWS = [
    (gpu, dtype)
    for gpu in GPUS
    for dtype in POINTERS
    if (gpu, dtype) not in (("gfx942", torch.float32), ("gfx950", torch.bfloat16))
]


def compiled(kernel, types, config, gpu):
    """The kernel for one of `GPUS`. Pointers are multiples of 16, as torch's are, and so is what is "i32:16"."""
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
    return triton.compile(source, target=GPUS[gpu], options=options)


def compiled_row_loss(
    functor, dtype, num_states, gpu, with_grad=True, in_place=False, with_stats=None, with_entropy=False
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
    constants |= dict(IN_PLACE=in_place, CONTIGUOUS=True)
    given = dict(SIGMA=functor != "dce", STATS=with_stats, ENTROPY_WEIGHT=with_entropy, EXTRA=FUNCTORS[functor].extra)
    constants |= {name: None for name, is_given in given.items() if not is_given}
    constants |= for_rows(row_loss.config(functor, num_states, dtype.itemsize), dtype.itemsize, GPUS[gpu])
    return compiled(row_loss.row_loss_kernel, types, constants, gpu)


def compiled_row_sample(options, dtype, config, gpu):
    types = dict.fromkeys(["XT", "EXCLUDE", "SEED", "STEP_NUMBER", "SAMPLE_IDS", "POSITIONS", "TOKENS"], "*i64")
    types |= dict(Z=POINTERS[dtype], LIVE="*i1", LAW="*fp64", ARGMAX="*i64", STATS="*fp32")
    types |= dict.fromkeys(["V", "num_excluded", "inner", "top_k"], "i32")
    types |= dict.fromkeys(["stride_outer", "stride_inner"], "i64") | dict.fromkeys(["temperature", "top_p"], "fp32")
    constants = dict(LAW=None, ARGMAX=None, STATS=None, GREEDY=False, TWO_SUMS=False, KEPT=False)
    constants |= options | for_rows(config, dtype.itemsize, GPUS[gpu])
    for given in [name for name, value in options.items() if value is True and name in types]:
        del constants[given]
    return compiled(row_sample.row_sample_kernel, types, constants, gpu)


def compiled_reverse_rows(dtype, contiguous, config, gpu):
    types = dict(Z=POINTERS[dtype], XT="*i64", LIVE="*i1", LAW="*fp64", PROBS="*fp32", V="i32", inner="i32")
    types |= dict.fromkeys(["stride_outer", "stride_inner"], "i64")
    constants = dict(CONTIGUOUS=contiguous) | for_rows(config, dtype.itemsize, GPUS[gpu])
    return compiled(reverse_rows.reverse_rows_kernel, types, constants, gpu)


def resources(binary):
    """Registers of a thread, and bytes of memory that it has for those that are too many."""
    if "amdgcn" in binary.asm:
        use = dict(re.findall(r"^ +\.(\w+): +(\d+)$", binary.asm["amdgcn"], re.MULTILINE))
        return int(use["vgpr_count"]), int(use["private_segment_fixed_size"])
    with TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(binary.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", report).groups()
    return int(registers), int(stack) + int(local)


def wide_accesses(binary, access):
    """How many instructions "load" or "store" 16 bytes a thread."""
    if "amdgcn" in binary.asm:
        return len(re.findall(rf"(?:global|buffer)_{access}_dwordx4", binary.asm["amdgcn"]))
    return len(re.findall(rf"{dict(load='ld', store='st')[access]}\.global[\w.:]*\.v4\.b32", binary.asm["ptx"]))
