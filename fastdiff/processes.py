"""The processes that torchrun has started, also where it starts them again."""

import os
import socket
import time

import torch.distributed as dist


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
