import json
import math
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

from examples.experiments import dna, drawing, infilling, judging, networks, page, ratio, variance
from examples.experiments.__main__ import EXPERIMENTS
from examples.experiments.methods import METHODS
from examples.experiments.report import Setup, Table, reporting
from examples.experiments.spreads import spread
from examples.experiments.texts import Letters, letters

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def test_every_experiment_writes_its_numbers_and_its_picture(tmp_path: Path) -> None:
    """In one process, which is half of its time, and with networks that are made once."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join(topics.values()))
    command = [sys.executable, "-m", "examples.experiments", "--quick", "--out", tmp_path, "--text", text, "all"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in EXPERIMENTS:
        content = json.loads((tmp_path / "quick" / f"{name}.json").read_text())
        assert content["made"]["command"].endswith("all")
        assert content["tables"]
        assert (tmp_path / "quick" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_letters() -> None:
    assert letters("In 1611, GOD-fearing\nmen.") == "in one six one one god fearing men"
    assert Letters().decode(Letters().encode("Abc, z")) == "abc z"


def test_training_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path: Path, monkeypatch) -> None:
    text = networks.LetterText("\n".join(topics.values()), networks.LENGTH)
    whole, _ = networks.trained("mdlm", setup(tmp_path / "whole"), text)
    step = networks.train_step

    def stops(*arguments: Any) -> None:
        if arguments[4] == 2:
            raise KeyboardInterrupt
        step(*arguments)

    monkeypatch.setattr(networks, "train_step", stops)
    with pytest.raises(KeyboardInterrupt):
        networks.trained("mdlm", setup(tmp_path / "parts"), text)
    monkeypatch.undo()
    parts, curve = networks.trained("mdlm", setup(tmp_path / "parts"), text)
    assert len(curve["bits"]) == 4
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


def test_a_spread_is_the_variance_between_repeats_and_not_that_between_texts() -> None:
    texts, noise = 100 * torch.arange(4.0), torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0))
    found = spread(3 * noise.double() + texts)
    assert abs(found["variance"] - 9) < 4 * found["stderr"]
    assert found["stderr"] == pytest.approx(9 * math.sqrt(2 / 20_000 / 4), rel=0.1)


def test_pairs_differ_in_a_span_alone() -> None:
    x = torch.arange(3).view(3, 1).expand(3, 20)
    y = ratio.replaced(x)
    assert (x != y).sum(1).tolist() == [ratio.SPAN] * 3
    assert y[:, 10].tolist() == [1, 2, 0]


def test_the_page_shows_the_results_that_are_there(tmp_path: Path) -> None:
    with reporting("dna", setup(tmp_path)) as report:
        report.tables = [Table("Strings", ["what", "paper"], [["NLL", "1.23"]], ["A note."])]
        report.figure, _ = plt.subplots()
    to = tmp_path / "docs" / "experiments.md"
    page.write(tmp_path, {"variance": variance, "dna": dna}, to)
    text = to.read_text()
    assert "## dna\n\n" + dna.__doc__ in text
    assert "| what | paper |\n| --- | --- |\n| NLL | 1.23 |\n\nA note." in text
    assert "![dna](experiments_dna.png)" in text
    assert "torch " + torch.__version__ in text
    assert "variance" not in text
    assert (tmp_path / "docs" / "experiments_dna.png").read_bytes().startswith(b"\x89PNG")


def test_a_page_of_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no results"):
        page.write(tmp_path, {"dna": dna}, tmp_path / "page.md")


def test_judging() -> None:
    letters = torch.tensor([1, 2, 3, 4] * 2)
    assert judging.entropy(letters) == pytest.approx(2)
    assert judging.share_of_different(letters) == 4 / 5
    judge = networks.backbone(METHODS["ar"], quick=True)  # untrained: all alike
    assert judging.bits_per_letter(judge, letters.repeat(20)) == pytest.approx(math.log2(28))  # in two windows
    better = torch.tensor([1.0, 1.1, 0.9])
    assert [judging.sign(better, better + shift) for shift in (0.01, 1.0, -1.0)] == [0, -1, 1]
    assert [judging.sign(better - shift) for shift in (1.0, 2.0)] == [0, -1]


@pytest.mark.parametrize("name", ["radd", "sedd-uniform", "block"])
def test_what_is_given_stays_where_all_else_is_drawn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "trained", lambda name, *_: (networks.backbone(METHODS[name], quick=True), {}))
    model = networks.of_letters(name, setup(Path()), None)
    x0 = torch.tensor([Letters().encode(("ab cde f " * 20)[:128])])
    for place, given in infilling.given_places(model, x0).items():
        filled = drawing.fill(model, "tweedie", x0.where(given, -1), 8).tokens
        assert torch.equal(filled[given], x0[given]), place
        assert 0.25 < given.double().mean() < 0.75
        assert (filled < 27).all()
        assert not torch.equal(filled, x0)
    assert infilling.marked(model, x0[0], given[0]).startswith("ab CDE f AB cde")


def setup(out: Path) -> Setup:
    return Setup(out, None, None, steps=4, quick=True)
