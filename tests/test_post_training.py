import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from post_training import PROMPT, rewards, strings, target

EXAMPLE = Path(__file__).parents[1] / "examples" / "post_training.py"


@pytest.mark.slow
def test_it_writes_its_numbers_and_its_picture(tmp_path: Path) -> None:
    environment = os.environ | {"FASTDIFF_DEMO_QUICK": "1", "OMP_NUM_THREADS": "1"}
    process = [sys.executable, str(EXAMPLE)]
    printed = subprocess.run(process, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    out = tmp_path / "runs" / "post_training"
    assert sorted(file.name for file in out.iterdir()) == ["post_training.png", "results.json"]
    assert (out / "post_training.png").read_bytes().startswith(b"\x89PNG")
    methods = json.loads((out / "results.json").read_text())["methods"]
    assert {method["objective"] for method in methods} == {"DPO", "GRPO"}
    for method in methods:
        assert method["estimator"] in " ".join(printed.split())
        assert len(method["curves"]) == 2
        for curve in method["curves"]:
            assert [step for step, *_ in curve] == [0, 1, 2]
            sequences = 4 * 8 if method["objective"] == "DPO" else 2 * 16  # x and y, policy and reference; old and new
            assert [passes for _, passes, _ in curve] == [i * sequences * method["passes"] for i in range(3)]


def test_the_reward() -> None:
    whole = strings(100, seed=3)
    assert rewards(whole).tolist() == [1.0] * 100
    assert not rewards(1 - whole).any()
    assert not rewards(torch.cat([whole[:, :-1], 1 - whole[:, -1:]], 1)).any()
    closes_too_soon = whole.clone()
    closes_too_soon[:, :2] = torch.tensor([1, 0])
    assert not rewards(closes_too_soon).any()
    assert target(whole).sum(1).unique().item() == whole.shape[1] - PROMPT
