"""The processes that torchrun has started, also where it starts them again."""

import os
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

Result = TypeVar("Result")


def join(backend: str) -> None:
    """Makes the process group of all of them."""
    shared, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group(backend, store=_fresh(shared, rank), rank=rank, world_size=size)


def _fresh(shared: dist.Store, rank: int) -> dist.Store:
    """A store for ranks to find each other in, which the first of them keeps.

    That of torchrun outlives them, so those that it starts again would find the addresses of those that have died.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return shared
    host, name = os.environ["MASTER_ADDR"], "fastdiff port"
    if rank == 0:
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
        shared.set(name, str(store.port))
        return store
    while True:
        port = int(shared.get(name))
        try:
            socket.create_connection((host, port), timeout=10).close()
            return dist.TCPStore(host, port, wait_for_workers=False)
        except OSError:  # of a first rank that has died; the new one is on its way
            time.sleep(0.1)


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def agree(group: dist.ProcessGroup | None, work: Callable[[], Result]) -> list[Result]:
    """What the work of each rank gives, or on every rank the error of the first that failed."""
    result, error = None, None
    try:
        result = work()
    except Exception as raised:
        plain = isinstance(raised, OSError | TypeError | ValueError)  # others might not survive being sent
        error = raised if plain else RuntimeError(f"{type(raised).__name__}: {raised}")
    everyone: list[Any] = [(result, error)]
    if group is not None:
        everyone *= group.size()
        dist.all_gather_object(everyone, (result, error), group=group)
    for _, error in everyone:
        if error is not None:
            raise error
    return [result for result, _ in everyone]
