"""The benchmarks' own machinery: results, the pages made from them, and a call of every kernel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import report
from measure import Machine
from results import Call, Case, load, save

ROOT = Path(__file__).parent.parent


def run(*command):
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def a_case(seconds=0.002):
    calls = {"fastdiff": Call(seconds, 0.001, 0.003, 0), "other": Call(0.2, 0.1, 0.3, 5_000_000)}
    return Case(calls, 0.0005, Machine(1.0, 2.0, 3.0, 4.0, 5.0), "a machine", {"torch": "2.13.0"}, "abcd")


def test_results_are_kept_case_by_case(tmp_path):
    file = tmp_path / "results/machine.json"
    save(file, {"op: a": a_case(), "op: b": a_case()})
    save(file, {"op: b": a_case(0.004)})
    assert load(file) == {"op: a": a_case(), "op: b": a_case(0.004)}
    assert os.listdir(file.parent) == [file.name]


def test_a_table_of_a_case():
    row = report.table("op", {"op: a": a_case()}).splitlines()[-1]
    assert row == "| a |  | 2 (1 to 3) | 25% | 0 | other 100x 5 MB |"


@pytest.mark.parametrize(
    "page", [p for p in sorted(ROOT.glob("docs/**/*.md")) if "<!-- results" in p.read_text()], ids=str
)
def test_pages_show_the_results(page):
    assert report.page(page.read_text()) == page.read_text()


def test_every_kernel_can_be_called():
    assert "fastdiff" in run("benchmarks/each_kernel.py", "small")


@pytest.mark.slow
def test_a_benchmark_leaves_its_cases(tmp_path):
    file = tmp_path / "results.json"
    one = "benchmarks/bench_corrupt.py::test_mask_tokens"
    shown = run("-m", "pytest", "-p", "no:cacheprovider", one, f"--json-results={file}")
    cases = load(file)
    assert list(cases) == ["corrupt: mask_tokens"]
    assert all(name in shown for name in cases)
    assert all(0 < call.low <= call.seconds <= call.high for c in cases.values() for call in c.calls.values())
