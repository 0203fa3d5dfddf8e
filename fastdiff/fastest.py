"""Which kernels an operation takes on a GPU when nobody names a backend: those that were measured to be faster."""

from typing import NamedTuple


class Measured(NamedTuple):
    """From this size on (numbers of a row, tokens of a sequence) CUDA C++ was faster than Triton."""

    operation: str
    size: int
    measurement: str  # a file of benchmarks/results, a colon, and what it says


# Nothing has been measured on a GPU yet. Until then Triton is the default, which compiles for the GPU that is there.
CUDA_IS_FASTER: tuple[Measured, ...] = ()


def by_speed(operation: str, size: int) -> tuple[str, str]:
    """The backends of a GPU, the fastest first."""
    faster = any(m.operation == operation and size >= m.size for m in CUDA_IS_FASTER)
    return ("cuda", "triton") if faster else ("triton", "cuda")
