"""README and docs: the files, names and options that they speak of are there."""

import importlib
import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest
from guides import GIVEN

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
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


def python_of(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_readme_runs():
    for snippet in python_of(ROOT / "README.md"):
        exec(snippet, {})


@pytest.mark.parametrize("name", GIVEN)
def test_the_guides_run(name, tmp_path, monkeypatch):
    """All of a page in one go, from what it takes as given."""
    monkeypatch.chdir(tmp_path)
    names = GIVEN[name]()
    snippets = python_of(ROOT / "docs" / name)
    assert snippets
    for snippet in snippets:
        exec(snippet, names)


def test_the_command_is_told_whole():
    pytest.importorskip("typer")
    path = ROOT / "docs" / "hooks.py"
    spec = importlib.util.spec_from_file_location("hooks", path)
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    shown = hooks.on_page_markdown((ROOT / "docs" / "command.md").read_text())
    for command in hooks.app.registered_commands:
        assert f"\n## `fastdiff {command.name}`\n" in shown
    assert "* `--lr-schedule" in shown


def test_the_seams_of_the_readme_are_there():
    reference = (ROOT / "docs" / "integrations" / "reference.md").read_text()
    seams = re.findall(r"\| `(\w+)\.(\w+)\(", (ROOT / "README.md").read_text())
    assert len(seams) > 10
    for module, name in seams:
        assert re.search(rf"integrations.{module}\n.*\n.*[\[ ]{name}[,\]]", reference), f"{module}.{name}"
        assert f"def {name}(" in (ROOT / "fastdiff" / "integrations" / f"{module}.py").read_text()
