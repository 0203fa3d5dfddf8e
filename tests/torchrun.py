"""Functions of a file, called on a few ranks of torchrun and gloo, on the CPU."""

import os
import subprocess
import sys

import torch
import torch.distributed as dist


def launch(file, ranks, *functions):
    """Runs the file, which ends in `run(globals())`, with names of its functions."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", str(file)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([*command, *functions], env=env, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr


def run(functions):
    """Calls on this rank the functions that were named, one after another."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for name in sys.argv[1:]:
        functions[name]()
    dist.destroy_process_group()
    # DTensor's caches keep a group, and so its threads. One that is late to free the tensor of its last collective
    # would meet an interpreter that is shutting down, and abort.
    os._exit(0)
