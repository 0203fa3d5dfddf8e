"""Work that can be done side by side: a process of one thread for each core.

A network this small gains half from a second thread; a second network beside it gains all.
"""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")


def side_by_side(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What jobs give, in order, from other processes. An error in one is raised when the others are done."""
    fresh = multiprocessing.get_context("spawn")  # torch's threads do not outlive a fork
    with ProcessPoolExecutor(torch.get_num_threads(), fresh, torch.set_num_threads, (1,)) as pool:
        for job in [pool.submit(job) for job in jobs]:
            yield job.result()
