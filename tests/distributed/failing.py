"""The command on a rank of torchrun, which fails in the middle of a step as FASTDIFF_TEST_FAILURES says; or, with names
of functions for arguments, what is refused on all ranks.

FASTDIFF_TEST_FAILURES is JSON: [attempt, step, ranks, whom, signal] each, whom among "agent" and "self".
"""

import contextlib
import io
import json
import os
import shlex
import sys
import time
from pathlib import Path

import torch.distributed as dist
import torchrun

import fastdiff.cli
import fastdiff.training.trainer as trainer
from fastdiff.training.records import open_metrics

FOLDER = Path(os.environ["FASTDIFF_TEST_FOLDER"])
ATTEMPT, RANK = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
SIZES = "--length 16 --dim 16 --depth 1 --heads 2 --batch-size 8 --lr 0.001 --warmup 5"
noise = trainer.noise


def failing(*args, step, **names):
    for attempt, at, ranks, whom, number in json.loads(os.environ["FASTDIFF_TEST_FAILURES"]):
        if (attempt, at) == (ATTEMPT, step) and RANK in ranks:
            while not any(path.suffix == "" for path in FOLDER.glob("run/checkpoints/step-*")):
                time.sleep(0.01)
            for pid in {"agent": [os.getppid()], "self": [os.getpid()], "job": [os.getppid(), os.getpid()]}[whom]:
                os.kill(pid, number)
            time.sleep(1)  # until the signal is there
    return noise(*args, step=step, **names)


def refused(arguments, text):
    """The first rank says so in one line, the others nothing; all have an error, and no file changes."""
    before = contents()
    sys.argv = ["fastdiff", "train", *shlex.split(f"--out {FOLDER / 'run'} {arguments}")]
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            code = fastdiff.cli.main()
        except SystemExit as exit:
            code = exit.code
    told = stderr.getvalue()
    assert code == 2, (code, told)
    assert told.startswith("fastdiff: ") == told.endswith("\n") == (RANK == 0), told
    assert told.count(text) == told.count("\n") == (RANK == 0), told
    dist.barrier()
    assert contents() == before, arguments


def contents():
    return {path: path.read_bytes() for path in FOLDER.rglob("*") if path.is_file()}


def what_does_not_fit():
    fastdiff.cli._TO_TELL = 0
    new = f"--data {FOLDER / 'text.txt'} {SIZES}"
    refused(f"{new} --batch-size 3", "batch_size: expected a multiple of ranks x accumulation = 2 x 1, got 3")
    refused(f"{new} --sharding hybrid --shards 3", "shards: expected a divisor of the 2 ranks, got 3")
    refused(new, "holds a run already")
    refused("--resume --dim 32", "dim: the run in")
    refused("--resume --steps 10", "steps: the run in")
    refused(f"--resume --data {FOLDER / 'other.txt'}", "this run was trained on other data")
    with open_metrics(FOLDER / "run" if RANK == 0 else None):
        refused("--resume", "out: another run is writing to")


if __name__ == "__main__":
    if sys.argv[1] == "train":
        time.sleep(float(os.environ.get("FASTDIFF_TEST_LATE", "0")) * (RANK == 0))
        trainer.noise = failing
        fastdiff.cli.main()
    else:
        torchrun.run(globals())
