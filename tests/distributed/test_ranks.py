"""Losses over several processes of torchrun and gloo, on the CPU: those of one process, and errors without hanging."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("ranks.py")
# By number of ranks. Starting processes takes longest, so the functions of one number share them, one after another.
# The last one raises in the middle of a forward.
CASES = {
    2: [
        "options_of_the_last_layer",
        "numbers_of_any_size",
        "wrong_calls_raise_on_every_rank",
        "data_parallel",
        "vocabulary_parallel",
        "fsdp_with_a_last_layer_of_its_own",
    ],
    3: ["dtensors", "sharded_logits"],
    4: ["vocabulary_parallel"],
}


@pytest.mark.parametrize("ranks", CASES)
def test_ranks(ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = os.environ | {"PYTHONPATH": str(FILE.parent.parent)}
    result = subprocess.run([*command, str(FILE), *CASES[ranks]], env=env, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
