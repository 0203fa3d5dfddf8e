"""Checkpoints and exports are whole at any kill."""

import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch.distributed as dist
import torchrun
from checkpointed import assert_whole, filled, shared

from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.training.checkpoints import Checkpoints
from fastdiff.training.exporting import export
from fastdiff.weights import read_weights

# pytest puts its own filters in the place of those that the module sets
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]


def is_killed():
    """Saves for ever; a kill in its turn ends a rank as it opens, renames or deletes something."""
    folder, after = shared() / "killed", int(os.environ["FASTDIFF_TEST_KILL"])
    checkpoints = Checkpoints(folder, keep=1)
    step = checkpoints.latest() or 0
    if dist.get_rank() == after % 2:
        kill_at(30 + after, folder)
    while True:
        step += 1
        checkpoints.save(step, filled(step), {"step": step})


def kill_at(number, folder):
    """Ends this process as by kill -9, in front of the number-th call that changes files in a folder."""
    left = [number]

    def count(event, args):
        writes = event == "open" and str(args[0]).startswith(str(folder)) and args[1] not in ("r", "rb")
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def kill_at_each_call(folder, work, check):
    """Forks a process that works, to be killed at its first call, the next at its second, until one gets through."""
    number, status = 0, None
    while status != 0:
        number += 1
        if (child := os.fork()) == 0:
            kill_at(number, folder)
            work()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        check()
    return number


def kill_saves(folder):
    def work():
        checkpoints = Checkpoints(folder, keep=1)
        step = checkpoints.latest() + 1
        checkpoints.save(step, filled(step), {"step": step})
        checkpoints.wait()

    newest = [0]

    def check():
        step = assert_whole(folder)
        assert step - newest[0] in (0, 1)
        newest[0] = step

    checkpoints = Checkpoints(folder)
    checkpoints.save(0, filled(0), {"step": 0})
    checkpoints.wait()
    checkpoints._thread.shutdown()  # no thread is forked
    assert kill_at_each_call(folder, work, check) > 15
    assert [path.name for path in folder.iterdir()] == [f"step-{newest[0]:08}"]  # nothing is left of those killed


def kill_exports(folder):
    model = DiffusionTransformer(ModelConfig(5, 4, 8, 1, 2)).requires_grad_(False)

    def fill(value):
        for parameter in model.parameters():
            parameter.fill_(value)

    def values():
        return {value for tensor in read_weights(folder).values() for value in tensor.unique().tolist()}

    def check():
        assert len(values()) == 1

    fill(0)
    export(model, folder)
    for value, file_size in enumerate((2000, 2000, 10**9), 1):  # several files after one, after several, and one again
        fill(value)
        assert kill_at_each_call(folder, partial(export, model, folder, file_size=file_size), check) > 5
        assert values() == {value}
        assert len(list(folder.glob("model*"))) == (1 if value == 3 else 4)


@pytest.mark.parametrize("after", [0, 1])
def test_a_rank_is_killed(tmp_path, monkeypatch, after):
    monkeypatch.setenv("FASTDIFF_TEST_FOLDER", str(tmp_path))
    monkeypatch.setenv("FASTDIFF_TEST_KILL", str(after))
    with pytest.raises(AssertionError, match="SIGKILL"):
        torchrun.launch(__file__, 2, "is_killed")
    assert assert_whole(tmp_path / "killed") > 1


@pytest.mark.parametrize("what", ["kill_saves", "kill_exports"])
def test_killed_at_any_call(tmp_path, what):
    names = "import torch; from pathlib import Path; from test_checkpoints_killed import *"
    code = f"{names}; torch.set_num_threads(1); {what}(Path({str(tmp_path / 'x')!r}))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


if __name__ == "__main__":
    torchrun.run(globals())
