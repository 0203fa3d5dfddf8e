import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from examples.experiments.__main__ import EXPERIMENTS
from examples.experiments.texts import Letters, letters

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Networks are made once, and shared."""
    return tmp_path_factory.mktemp("experiments")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_writes_its_numbers_and_its_picture(name: str, folder: Path) -> None:
    text = folder / "text.txt"
    text.write_text("\n".join(topics.values()))
    command = [sys.executable, "-m", "examples.experiments", "--quick", "--out", folder, "--text", text, name]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    content = json.loads((folder / "quick" / f"{name}.json").read_text())
    assert content["made"]["command"].endswith(name)
    assert content["tables"]
    assert (folder / "quick" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_letters() -> None:
    assert letters("In 1611, GOD-fearing\nmen.") == "in one six one one god fearing men"
    assert Letters().decode(Letters().encode("Abc, z")) == "abc z"
