"""Functions of a file, called on a few ranks with gloo, on the CPU.

Ranks have torchrun's environment, but are forked from one process that has imported torch and fastdiff: to import them
takes most of the time of a short test. tests/distributed/test_training_failures.py has torchrun itself.
"""

import importlib
import os
import runpy
import signal
import socket
import subprocess
import sys

import torch
import torch.distributed as dist


def launch(file, ranks, *functions):
    """Runs the file, which ends in `run(globals())`, with names of its functions."""
    env = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, str(file), str(ranks), *functions]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
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


def agent(file, ranks, *functions):
    """Starts the ranks, and ends them all when one fails."""
    for module in ("torch.distributed.tensor", "fastdiff"):
        importlib.import_module(module)
    sizes = dict(WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, TORCHELASTIC_RESTART_COUNT=0)
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listening:
        port, fd = listening.getsockname()[1], listening.detach()
    where = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE=True)
    started = [
        started_rank(sizes | where | dict(RANK=rank, LOCAL_RANK=rank), file, functions) for rank in range(int(ranks))
    ]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, master_listen_fd=fd)  # has a thread
    while started:
        ended, status = os.wait()
        started.remove(ended)
        if code := os.waitstatus_to_exitcode(status):
            for rank in started:
                os.kill(rank, signal.SIGKILL)
            sys.exit(f"a rank has ended with {code if code > 0 else signal.Signals(-code).name}")
    del store


def started_rank(env, file, functions):
    if child := os.fork():
        return child
    os.environ.update({name: str(value) for name, value in env.items()})
    sys.argv = [file, *functions]
    sys.path.insert(0, os.path.dirname(file))
    try:
        runpy.run_path(file, run_name="__main__")
    except BaseException:
        sys.excepthook(*sys.exc_info())
    os._exit(1)


if __name__ == "__main__":
    agent(*sys.argv[1:])
