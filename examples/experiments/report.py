"""What an experiment leaves behind: a table in the terminal, a picture, and a JSON file that says what made them."""

import dataclasses
import io
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import rich.table
import torch
from matplotlib.figure import Figure
from rich.console import Console

from fastdiff.files import write_atomically

plt.switch_backend("Agg")  # files, no windows

console = Console(width=140)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What all experiments are told on the command line."""

    out: Path
    text: Path | None
    model: str | None
    steps: int
    quick: bool


@dataclasses.dataclass
class Table:
    title: str
    head: Sequence[str]
    rows: list[Sequence[str]]
    notes: Sequence[str] = ()

    def in_terminal(self) -> rich.table.Table:
        table = rich.table.Table(*self.head, title=self.title, title_justify="left", caption_justify="left")
        for row in self.rows:
            table.add_row(*row)
        table.caption = "\n".join(self.notes)
        return table

    def in_markdown(self) -> str:
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        return "\n\n".join([f"**{self.title}**", rows, *self.notes])


class Report:
    """Of one experiment, written when it is done."""

    def __init__(self, name: str, setup: Setup) -> None:
        self.name, self.setup = name, setup
        self.tables: list[Table] = []
        self.numbers: dict[str, Any] = {}
        self.figure: Figure | None = None


@contextmanager
def reporting(name: str, setup: Setup) -> Iterator[Report]:
    """What the block puts into the report is printed and written after it: <name>.json, and <name>.png."""
    report, wall, cpu = Report(name, setup), time.perf_counter(), cpu_seconds()
    yield report
    made = {
        "command": shlex.join(["python", "-m", "examples.experiments", *sys.argv[1:]]),
        "model": setup.model or "trained here",
        "text": str(setup.text or "King James Bible"),
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(cpu_seconds() - cpu, 1),
        "threads": torch.get_num_threads(),
        "machine": machine(),
        "versions": {package: version(package) for package in ("torch", "fastdiff-kernels")},
    }
    setup.out.mkdir(parents=True, exist_ok=True)
    if report.figure is not None:
        picture = io.BytesIO()
        report.figure.savefig(picture, format="png", dpi=130)
        plt.close(report.figure)
        write_atomically(setup.out / f"{name}.png", picture.getvalue())
    content = {"made": made, "tables": [dataclasses.asdict(table) for table in report.tables]} | report.numbers
    write_atomically(setup.out / f"{name}.json", json.dumps(content, indent=1).encode())
    for table in report.tables:
        console.print(table.in_terminal())
    console.print(f"{made['seconds']:.0f} s on {made['threads']} threads: {setup.out}/{name}.json and .png")


def cpu_seconds() -> float:
    """Of this process, and of its children that have ended."""
    return sum(os.times()[:4])


def machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{os.cpu_count()} cores, {name}"
