"""How the benchmarks measure: interleaved calls, medians, the machine's own rates in the same run, peak memory.

Everything runs on the GPU if there is one.
"""

import mmap
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

MB = 1 << 20
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Machine(NamedTuple):
    """Rates in GB/s (bytes read plus bytes written) and GFLOP/s."""

    read: float
    copy: float
    fresh_fill: float
    matmul: float  # float32
    matmul_bf16: float


class Probe:
    """Calls that show the machine's rates, to be timed among others. Their memory is touched beforehand, once."""

    def __init__(self) -> None:
        gpu = DEVICE.type == "cuda"
        size, side = (1024 * MB, 8192) if gpu else (256 * MB, 2048)
        torch.ones(4 << 30, dtype=torch.uint8)  # a virtual machine pays for pages never touched before
        source, target = torch.ones(size // 4, device=DEVICE), torch.ones(size // 4, device=DEVICE)
        a = torch.rand(side, side, device=DEVICE)
        low = a.bfloat16()

        def fresh_fill() -> None:
            """What an output costs: on the CPU 2 MB pages, touched the first time."""
            if gpu:
                target.fill_(1)
                return
            with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
                pages.madvise(mmap.MADV_HUGEPAGE)
                torch.frombuffer(pages, dtype=torch.float32).fill_(1)

        self.calls: dict[str, Callable[[], object]] = {
            "read": source.sum,
            "copy": lambda: target.copy_(source),
            "fresh_fill": fresh_fill,
            "matmul": lambda: a @ a,
            "matmul_bf16": lambda: low @ low,
        }
        self.work = {"read": size, "copy": 2 * size, "fresh_fill": size}
        self.work |= dict.fromkeys(["matmul", "matmul_bf16"], 2 * side**3)

    def rates(self, seconds: dict[str, list[float]]) -> Machine:
        return Machine(**{name: work / statistics.median(seconds[name]) / 1e9 for name, work in self.work.items()})


def interleave(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, one of each a round. Each is called twice: no call pays for the one before it."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            wait()
            start = time.perf_counter()
            call()
            wait()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def wait() -> None:
    """Until the device is done."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def both_ways(loss: Callable[[], torch.Tensor], *leaves: torch.Tensor) -> None:
    """A loss and its gradients, into leaves that have none yet."""
    for leaf in leaves:
        leaf.grad = None
    loss().backward()


def in_graph(call: Callable[[], object], times: int) -> Callable[[], object]:
    """The kernels of so many calls, captured as a CUDA graph."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            call()
    return graph.replay


def peak_extra_bytes(call: Callable[[], object]) -> int:
    """The most memory that a call needs beyond what is there before it: resident (Linux), or torch's on the GPU."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the high-water mark starts again from here
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    with open("/proc/self/status") as f:
        line = next(line for line in f if line.startswith(field))
    return int(line.split()[1]) * 1024
