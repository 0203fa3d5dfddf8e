"""Collects the measured cases of a run into one table and, with --json-results FILE, in a file of results."""

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from measure import DEVICE, Machine, Probe, in_graph, interleave, peak_extra_bytes
from results import Case, case, machine, save, versions

from fastdiff import backends

ROUNDS = 7
Floor = Callable[[Machine], float]
_cases: dict[str, Case] = {}
_floors: dict[str, Floor] = {}


def pytest_addoption(parser):
    parser.addoption("--json-results", type=Path, help="keep the cases in this file, beside the others there")


@pytest.fixture(scope="session")
def probe() -> Probe:
    return Probe()


@pytest.fixture
def compare(probe, benchmark, request) -> Callable[..., None]:
    """Measures calls against each other and the machine; the first is ours, which pytest-benchmark times too."""
    operation, file = request.module.__name__.removeprefix("bench_"), request.config.getoption("--json-results")

    def run(
        name: str,
        calls: dict[str, Callable[[], object]],
        floor: Floor | None = None,
        rounds: int = ROUNDS,
        graph: int = 0,
    ) -> None:
        calls, graphs = on_each_backend(calls), {}
        if graph and DEVICE.type == "cuda":
            ours = {who: call for who, call in calls.items() if who.startswith("fastdiff")}
            graphs = {f"{who}, one of {graph} in a graph": in_graph(call, graph) for who, call in ours.items()}
        calls |= graphs
        seconds = interleave(calls | probe.calls, rounds)
        seconds |= {who: [s / graph for s in seconds[who]] for who in graphs}
        rates = probe.rates(seconds)
        extra_bytes = {who: peak_extra_bytes(call) for who, call in calls.items()}
        name = f"{operation}: {name}"
        _cases[name] = case(seconds, extra_bytes, floor and floor(rates), rates)
        if floor:
            _floors[name] = floor
        if file:
            save(file, {name: _cases[name]})
        benchmark.pedantic(next(iter(calls.values())), rounds=3)

    return run


def on_each_backend(calls: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """On a GPU our calls become two, one for each backend that can run there."""
    kernels = [r.name for r in backends.report() if r.available and r.name in ("triton", "cuda")]
    if DEVICE.type == "cpu" or len(kernels) < 2:
        return calls

    def by(backend: str, call: Callable[[], object]) -> object:
        backends.DEFAULT = backend
        return call()

    ours = {who: call for who, call in calls.items() if who.startswith("fastdiff")}
    both = {f"{who}, {backend}": partial(by, backend, call) for who, call in ours.items() for backend in kernels}
    return both | {who: call for who, call in calls.items() if who not in ours}


def pytest_terminal_summary(terminalreporter):
    if not _cases:
        return
    write, file = terminalreporter.write_line, terminalreporter.config.getoption("--json-results")
    # One case's rates vary more than a run's, of which there are many.
    rates = Machine(*(statistics.median(rate) for rate in zip(*(c.rates for c in _cases.values()), strict=True)))
    for name, c in _cases.items():
        floor = _floors[name](rates) if name in _floors else None
        _cases[name] = c._replace(rates=rates, floor=floor)
    if file:
        save(file, _cases)
    write(f"\n{machine()}, " + ", ".join(f"{name} {version}" for name, version in versions().items()))
    write("GB/s: read {:.1f}, copy {:.1f}, fresh fill {:.1f};  matmul {:.0f}, bfloat16 {:.0f} GFLOP/s".format(*rates))
    write(f"\n{'case':68} {'who':28} {'ms':>9} {'of floor':>9} {'slower':>8} {'extra MB':>9}")
    for name, c in _cases.items():
        for who, call in c.calls.items():
            label, ratio = (name, "") if call is c.first else ("", f"{call.seconds / c.first.seconds:.1f}x")
            share = f"{c.floor / call.seconds:.0%}" if c.floor else ""
            write(f"{label:68} {who:28} {call.seconds * 1e3:9.3f} {share:>9} {ratio:>8} {call.extra_bytes / 1e6:9.1f}")
