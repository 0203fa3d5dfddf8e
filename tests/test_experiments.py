import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[1] / "examples" / "experiments.py"


@pytest.mark.parametrize("command", ["dna", "markov", "variance", "ratio", "information"])
def test_a_command_writes_its_numbers_and_its_picture(command: str, tmp_path: Path) -> None:
    environment = os.environ | {"FASTDIFF_DEMO_QUICK": "1", "OMP_NUM_THREADS": "1"}
    process = [sys.executable, str(EXPERIMENTS), command]
    printed = subprocess.run(process, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert "paper" in printed
    out = tmp_path / "runs" / "experiments"
    assert sorted(file.name for file in out.iterdir()) == [f"{command}.json", f"{command}.png"]
    assert json.loads((out / f"{command}.json").read_text())["seconds"] > 0
    assert (out / f"{command}.png").read_bytes().startswith(b"\x89PNG")
