"""Collects every measured row of a run into one table and, with --json-results FILE, a JSON file."""

import json
import os
import platform
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from measure import DEVICE, Machine, Probe, Row, interleave, peak_extra_bytes, sources

from fastdiff import backends

ROUNDS = 7
Floor = Callable[[Machine], float]
_rows: list[tuple[Row, Floor | None]] = []  # the floor is known when the rates of the whole run are
_rates: list[Machine] = []


def pytest_addoption(parser):
    parser.addoption("--json-results", default=None, help="write the table to this file too")


@pytest.fixture(scope="session")
def probe() -> Probe:
    return Probe()


@pytest.fixture
def compare(probe, benchmark) -> Callable[..., None]:
    """Measures calls against each other and the machine; the first is ours, which pytest-benchmark times too."""

    def run(
        case: str, calls: dict[str, Callable[[], object]], floor: Floor | None = None, rounds: int = ROUNDS
    ) -> None:
        calls = on_each_backend(calls)
        seconds = interleave(calls | probe.calls, rounds)
        _rates.append(probe.rates(seconds))
        for who, call in calls.items():
            row = Row(case, who, statistics.median(seconds[who]), None, peak_extra_bytes(call))
            _rows.append((row, floor))
        benchmark.pedantic(next(iter(calls.values())), rounds=3)

    return run


def on_each_backend(calls: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """On a GPU our calls become two, one for each backend that can run there."""
    kernels = [r.name for r in backends.report() if r.available and r.name in ("triton", "cuda")]
    if DEVICE.type == "cpu" or len(kernels) < 2:
        return calls

    def by(backend: str, call: Callable[[], object]) -> object:
        backends._DEFAULT = backend
        return call()

    ours = {who: call for who, call in calls.items() if who.startswith("fastdiff")}
    both = {f"{who}, {backend}": partial(by, backend, call) for who, call in ours.items() for backend in kernels}
    return both | {who: call for who, call in calls.items() if who not in ours}


def pytest_terminal_summary(terminalreporter, config):
    if not _rows:
        return
    rates = Machine(*(statistics.median(rate) for rate in zip(*_rates, strict=True)))
    rows = [row._replace(floor=floor and floor(rates)) for row, floor in _rows]
    write = terminalreporter.write_line
    write(f"\n{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    write("GB/s: read {:.1f}, copy {:.1f}, fresh fill {:.1f};  matmul {:.0f}, bfloat16 {:.0f} GFLOP/s".format(*rates))
    write(f"\n{'case':56} {'who':28} {'ms':>9} {'of floor':>9} {'slower':>8} {'extra MB':>9}")
    first: Row | None = None
    for row in rows:
        first = row if first is None or row.case != first.case else first
        share = f"{row.floor / row.seconds:9.0%}" if row.floor else f"{'':9}"
        ratio = "" if row is first else f"{row.seconds / first.seconds:.1f}x"
        case = row.case if row is first else ""
        write(f"{case:56} {row.who:28} {row.seconds * 1e3:9.2f} {share} {ratio:>8} {row.extra_bytes / 1e6:9.1f}")
    if config.getoption("--json-results"):
        result = {"machine": _processor(), "torch": torch.__version__, "sources": sources()}
        result |= {"threads": torch.get_num_threads(), "rates": rates._asdict(), "rows": [r._asdict() for r in rows]}
        path = Path(config.getoption("--json-results"))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(part, path)


def _processor() -> str:
    """The GPU's name, or the processor's (Linux), or its architecture."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
