"""Counts what the row losses do for each number of a row, from their machine code for an H100. No GPU is needed.

    PYTHONPATH=tests python benchmarks/instructions.py

A loop is the code from a backward branch's target to that branch. Counted are the loops that read: those that a scored
row passes, one after the other; an unscored row is only zero-filled. Each thread of the program executes a loop once a
block of the row, so that a number costs

    instructions in the loops * threads of a program * blocks of a row / V

of one thread, the idle part of the last block included. What happens once a row is left out. "ALU" are the integer,
comparing, selecting and packing instructions among them, "MUFU" exp2 and reciprocals. Each loop reads the row through
the second-level cache (50 MB), the first one from memory; "MB open" are all rows that are being worked on at a time, as
registers allow. "cycles" are those of a multiprocessor for one number, by what needs the most.
"""

import re

import torch
from ahead_of_time import compiled_row_loss, resources

from fastdiff.kernels import row_loss
from fastdiff.ops.functors import FUNCTORS

V = 50257
MULTIPROCESSORS, THREADS, REGISTERS = 132, 2048, 65536  # of an H100, and of a multiprocessor
# Its rates, for each cycle of a multiprocessor at 1.7 GHz: bytes of memory, and threads' instructions by kind.
RATES = {"memory": 3.35e12 / MULTIPROCESSORS / 1.7e9, "instructions": 4 * 32, "ALU": 64, "MUFU": 16}
ALU = re.compile(r"(ISETP|IADD3|VIADD|LEA|LOP3|SHF|PRMT|SEL|FSEL|FSETP|FMNMX|VIMNMX|P2R|R2P|F2FP)\b")


def loops(sass):
    """The operations of each loop that reads 16 bytes at a time, without predicates: ["LDG.E.128", "FADD", ...]."""
    operations, starts, found = [], {}, []
    for line in sass.splitlines():
        if label := re.match(r"(LBB\d+):", line):
            starts[label[1]] = len(operations)
        elif instruction := re.match(r"\S+\t(?:@!?U?P\w+ )?([\w.]+)(.*)", line):
            operations.append(instruction[1])
            target = re.search(r"LBB\d+", instruction[2])
            if target and target[0] in starts:
                found.append(operations[starts[target[0]] :])
    return [loop for loop in found if any(re.match(r"LDG.*\.128", name) for name in loop)]


def counts(functor, dtype, with_grad):
    """The columns of the table, by name."""
    config = row_loss.config(functor, V, dtype.itemsize)
    binary = compiled_row_loss(functor, dtype, V, "sm_90", with_grad, with_stats=False)
    registers, spilled = resources(binary)
    passes, threads = loops(binary.asm["sass"]), 32 * config["num_warps"]
    names = [name for loop in passes for name in loop]
    each = threads * -(-V // config["BLOCK"]) / V
    programs = min(THREADS // threads, REGISTERS // (threads * -(-registers // 8) * 8))
    work = {
        "instructions": each * len(names),
        "ALU": each * sum(bool(ALU.match(name)) for name in names),
        "MUFU": each * sum(name.startswith("MUFU") for name in names),
        "memory": dtype.itemsize * (1 + with_grad),
    }
    return {
        "loss": f"`{functor}`",
        "type": str(dtype).removeprefix("torch."),
        "gradient": "yes" if with_grad else "no",
        "registers": registers,
        "spilled bytes": spilled,
        **{name: f"{work[name]:.1f}" for name in ("instructions", "ALU", "MUFU")},
        "memory bytes": work["memory"],
        "L2 bytes": dtype.itemsize * (len(passes) + with_grad),
        "MB open": round(MULTIPROCESSORS * programs * V * dtype.itemsize / 1e6),
        "cycles": "{:.2f} {}".format(*max((amount / RATES[name], name) for name, amount in work.items())),
    }


def main():
    cases = [(f, dtype, g) for f in FUNCTORS for dtype in (torch.bfloat16, torch.float32) for g in (False, True)]
    rows = [counts(*case) for case in cases]
    for row in (rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)):
        print("|", " | ".join(map(str, row)), "|")


if __name__ == "__main__":
    main()
