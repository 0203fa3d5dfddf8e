"""Collects every measured row of a run into one table and, with --json-results FILE, a JSON file."""

import json
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from measure import Machine, Probe, Row, interleave, peak_extra_bytes

ROUNDS = 7
_rows: list[Row] = []
_rates: list[Machine] = []


def pytest_addoption(parser):
    parser.addoption("--json-results", default=None, help="write the table to this file too")


@pytest.fixture(scope="session")
def probe() -> Probe:
    return Probe()


@pytest.fixture
def compare(probe, benchmark) -> Callable[..., None]:
    """Measures calls against each other and the machine; the first is ours, which pytest-benchmark times too."""

    def run(case: str, calls: dict[str, Callable[[], object]], floor: Callable[[Machine], float] | None = None) -> None:
        seconds = interleave(calls | probe.calls, ROUNDS)
        rates = probe.rates(seconds)
        _rates.append(rates)
        least = None if floor is None else floor(rates)
        for who, call in calls.items():
            _rows.append(Row(case, who, statistics.median(seconds[who]), least, peak_extra_bytes(call)))
        benchmark.pedantic(next(iter(calls.values())), rounds=3)

    return run


def pytest_terminal_summary(terminalreporter, config):
    if not _rows:
        return
    rates = Machine(*(statistics.median(rate) for rate in zip(*_rates, strict=True)))
    write = terminalreporter.write_line
    write(f"\n{_processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    write("GB/s: read {:.1f}, copy {:.1f}, fresh fill {:.1f};  matmul {:.0f} GFLOP/s".format(*rates))
    write(f"\n{'case':56} {'who':22} {'ms':>9} {'of floor':>9} {'slower':>8} {'extra MB':>9}")
    first: Row | None = None
    for row in _rows:
        first = row if first is None or row.case != first.case else first
        share = f"{row.floor / row.seconds:9.0%}" if row.floor else f"{'':9}"
        ratio = "" if row is first else f"{row.seconds / first.seconds:.1f}x"
        case = row.case if row is first else ""
        write(f"{case:56} {row.who:22} {row.seconds * 1e3:9.2f} {share} {ratio:>8} {row.extra_bytes / 1e6:9.1f}")
    if config.getoption("--json-results"):
        result = {"machine": _processor(), "torch": torch.__version__}
        result |= {"threads": torch.get_num_threads(), "rates": rates._asdict(), "rows": [r._asdict() for r in _rows]}
        path = Path(config.getoption("--json-results"))
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(part, path)


def _processor() -> str:
    """The processor's name (Linux), or its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
