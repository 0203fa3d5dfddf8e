"""README and docs: the files, names and options that they speak of are there."""

import importlib
import importlib.metadata
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PATH = r"(?:benchmarks|csrc|docs|examples|fastdiff|tests)/[\w/-]+\.\w+"
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pages
def test_files_exist(page):
    text = page.read_text()
    links = [page.parent / link for link in re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", text)]
    paths = [ROOT / path for path in re.findall(rf"(?<![\w/.-]){PATH}", text)]
    assert [str(path) for path in links + paths if not path.exists()] == []


@pages
def test_names_are_defined_in_the_file_that_is_said_to_hold_them(page):
    """As in "`log_gap` in `csrc/row_loss.h`", or "`Functor` and `functor_named` (`csrc/functor.h`)"."""
    for names, path in re.findall(rf"((?:`\w+`(?:, | and )?)+) (?:in |of |\()`({PATH})`", page.read_text()):
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"(?:^|\w[>&*]* ){name}\b", (ROOT / path).read_text(), re.MULTILINE), f"{name} in {path}"


@pages
def test_imports_work(page):
    for module, names in re.findall(r"^from (fastdiff[\w.]*) import ([\w, ]+)", page.read_text(), re.MULTILINE):
        for name in names.split(","):
            name = name.split(" as ")[0].strip()
            assert hasattr(importlib.import_module(module), name) or importlib.import_module(f"{module}.{name}")


@pages
def test_only_what_pip_finds_is_installed_by_name(page):
    """The package itself is installed from the clone, under extras that it has."""
    extras = importlib.metadata.metadata("fastdiff-kernels").get_all("Provides-Extra")
    for command in re.findall(r"pip install[^`\n]*", page.read_text()):
        assert "fastdiff-kernels" not in command
        for names in re.findall(r"\.\[([\w,-]+)\]", command):
            assert set(names.split(",")) <= set(extras)


def test_the_readme_runs():
    for snippet in re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL):
        exec(snippet, {})


def test_the_seams_of_the_readme_are_there():
    seams = re.findall(r"\| `(\w+)\.(\w+)\(", (ROOT / "README.md").read_text())
    assert len(seams) > 10
    for module, name in seams:
        assert f"def {name}(" in (ROOT / "fastdiff" / "integrations" / f"{module}.py").read_text()
