"""Ranks that are killed, signalled or given what does not fit: all end, and the run goes on where it was saved."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from signal import SIGKILL, SIGTERM, SIGUSR1

import pytest
import torch
import torchrun

from fastdiff.cli import app
from fastdiff.loading import load
from fastdiff.training.checkpoints import Checkpoints
from fastdiff.weights import read_weights

pytestmark = pytest.mark.slow

FILE = Path(__file__).with_name("failing.py")
SIZES = "--length 16 --dim 16 --depth 1 --heads 2 --batch-size 8 --lr 0.001 --warmup 5"
EVALUATION = "--eval-every 15 --eval-sequences 4 --eval-samples 8 --ema 0.9 --save-every 10"
TIMES = ("tokens_per_second", "memory")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an unbroken run on one process."""
    folder = tmp_path_factory.mktemp("whole")
    begin(folder)
    return folder / "run"


def begin(folder):
    """A new run, on this process."""
    app(shlex.split(command(folder)), standalone_mode=False)


def command(folder):
    (folder / "text.txt").write_text(" ".join(str(i * i % 977) for i in range(2000)))
    return f"train --data {folder / 'text.txt'} --out {folder / 'run'} --steps 40 {SIZES} {EVALUATION}"


def goes_on(folder):
    app(["train", "--out", str(folder / "run"), "--resume"], standalone_mode=False)


def launch(folder, arguments, *failures, restarts=0, late=0):
    """The exit code on two ranks, and what each has written to stderr."""
    torch_run = f"-m torch.distributed.run --standalone --nproc-per-node=2 --max-restarts={restarts} --redirects=3"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    env |= {"FASTDIFF_TEST_FOLDER": str(folder), "FASTDIFF_TEST_FAILURES": json.dumps(failures)}
    env |= {"FASTDIFF_TEST_LATE": str(late)}
    logs = folder / f"logs-{len(list(folder.glob('logs-*')))}"
    started = [sys.executable, *torch_run.split(), f"--log-dir={logs}", str(FILE), *shlex.split(arguments)]
    code = subprocess.run(started, env=env, capture_output=True, timeout=120).returncode
    return code, ["".join(p.read_text() for p in sorted(logs.glob(f"*/*/{rank}/stderr.log"))) for rank in range(2)]


def same(run, expected):
    """The curve and the averaged weights, up to the rounding of sums over ranks."""
    found, wanted = ([json.loads(line) for line in (p / "metrics.jsonl").open()] for p in (run, expected))
    for record, told in zip(found, wanted, strict=True):
        times = {name: record[name] for name in TIMES if name in record}
        assert record == pytest.approx(told | times, rel=1e-5, abs=1e-6)  # a standard error is small beside its numbers
    for name, tensor in read_weights(expected).items():
        torch.testing.assert_close(read_weights(run)[name], tensor, rtol=1e-4, atol=1e-6)


def saved(folder):
    return Checkpoints(folder / "run" / "checkpoints").latest()


def test_a_killed_rank_is_started_again(tmp_path, whole):
    kill = [0, 13, [1], "self", SIGKILL]
    code, stderr = launch(tmp_path, f"{command(tmp_path)} --sharding full", kill, restarts=1)
    assert code == 0, stderr
    assert stderr == ["fastdiff: rank 0 has lost another, which must have ended\n", ""]
    same(tmp_path / "run", whole)


def test_a_killed_job_and_a_killed_rank(tmp_path, whole):
    """Resumed on other ranks, which share the model otherwise."""
    code, _ = launch(tmp_path, f"{command(tmp_path)} --sharding full", [0, 13, [0, 1], "job", SIGKILL])
    assert code == -SIGKILL
    assert saved(tmp_path) == 10
    with pytest.raises(FileNotFoundError, match="no weights yet, which a run writes when it ends or stops"):
        load(str(tmp_path / "run"), torch.device("cpu"))
    on = f"train --out {tmp_path / 'run'} --resume --sharding none"
    code, stderr = launch(tmp_path, on, [0, 23, [0], "self", SIGKILL])
    assert code == 1
    assert stderr[1].endswith("fastdiff: rank 1 has lost another, which must have ended\n")
    assert "Traceback" not in stderr[1]
    assert saved(tmp_path) in (10, 20)
    goes_on(tmp_path)
    same(tmp_path / "run", whole)


def test_signals(tmp_path, whole):
    """To a rank, after which torchrun starts them again; and to torchrun, after which it does not."""
    failures = [0, 13, [1], "self", SIGUSR1], [1, 23, [0], "agent", SIGTERM]
    code, stderr = launch(tmp_path, f"{command(tmp_path)} --sharding full", *failures, restarts=1)
    assert code != 0
    line = f"stopped and saved; go on with: fastdiff train --out {tmp_path / 'run'} --resume\n"
    assert stderr[0].count(line) == 2
    assert "Traceback" not in stderr[0] + stderr[1]
    assert saved(tmp_path) == 24
    goes_on(tmp_path)
    same(tmp_path / "run", whole)


def test_what_does_not_fit(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_TEST_FOLDER", str(tmp_path))
    begin(tmp_path)
    (tmp_path / "other.txt").write_text("0123456789" * 100)
    torchrun.launch(FILE, 2, "what_does_not_fit")
    for arguments, late in (("--resume --dim 32", 0), ("--resume --lr 0", 2)):  # after all that a run makes, or before
        code, (first, other) = launch(
            tmp_path, f"train --out {tmp_path / 'run'} --sharding full {arguments}", late=late
        )
        assert code == 1
        assert first.startswith("fastdiff: " + arguments[11:13])
        assert first.count("\n") == 1
        assert other == ""
    assert saved(tmp_path) == 40
    goes_on(tmp_path)
