"""Losses over several processes of torchrun and gloo, on the CPU: those of one process, and errors without hanging."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__).with_name("ranks.py")
CASES = [
    ("vocabulary_parallel", 2),
    ("vocabulary_parallel", 4),
    ("options_of_the_last_layer", 2),
    ("sharded_logits", 3),
    ("numbers_of_any_size", 2),
    ("dtensors", 3),
    ("wrong_calls_raise_on_every_rank", 2),
    ("data_parallel", 2),
    ("fsdp_with_a_last_layer_of_its_own", 2),
]


@pytest.mark.parametrize(("function", "ranks"), CASES)
def test_ranks(function, ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = os.environ | {"PYTHONPATH": str(FILE.parent.parent)}
    result = subprocess.run([*command, str(FILE), function], env=env, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr
