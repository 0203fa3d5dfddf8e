"""Training over processes of torchrun and gloo: the numbers of one process, however they share batch and model."""

from pathlib import Path

import pytest
import torchrun
import training

pytestmark = pytest.mark.slow


def test_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_TEST_FOLDER", str(tmp_path))
    monkeypatch.setattr(training, "FOLDER", tmp_path)
    training.one_process()
    file = Path(training.__file__)
    torchrun.launch(file, 2, "two_ranks", "first_half")
    torchrun.launch(file, 4, "other_ranks_go_on", "four_ranks")
