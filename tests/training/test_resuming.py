"""Runs that stop, are killed or signalled go on as if they had not been."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training_runs import losses, make, on_disk, run, same_weights

from fastdiff.data import Table
from fastdiff.model import DiffusionTransformer
from fastdiff.training import Stopped, noise
from fastdiff.training.checkpoints import Checkpoints

TIMES = {"tokens_per_second": 0, "memory": 0}


def test_a_falling_rate_resumed_equals_unbroken(tmp_path, monkeypatch):
    unbroken, expected = run(tmp_path / "a", lr_schedule="cosine")
    sequences = Table.sequences

    def interrupted(self, start, stop):
        if start == 12:  # of the fourth step
            signal.raise_signal(signal.SIGINT)
        return sequences(self, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Table, "sequences", interrupted)
        with pytest.raises(Stopped):
            run(tmp_path / "b", lr_schedule="cosine")
    resumed, rest = run(tmp_path / "b", lr_schedule="cosine", resume=True, model=make(seed=9))
    assert 0 < len(rest) < 6
    assert same_weights(resumed, unbroken)
    assert [r | TIMES for r in on_disk(tmp_path / "b")] == [r | TIMES for r in expected]


@pytest.mark.parametrize("loss", ["dce-k", "dse-uniform"])
def test_resumed_run_equals_unbroken_run(tmp_path, loss):
    unbroken, expected = run(tmp_path / "a", loss=loss, eval_every=2, eval_samples=15)
    run(tmp_path / "b", loss=loss, eval_every=2, eval_samples=15, steps=3)
    resumed, rest = run(tmp_path / "b", loss=loss, eval_every=2, eval_samples=15, resume=True, model=make(loss, seed=9))
    assert len(losses(rest)) == 3
    assert same_weights(resumed, unbroken)
    assert [r | TIMES for r in on_disk(tmp_path / "b")] == [r | TIMES for r in expected]


def test_records_after_the_checkpoint_are_dropped(tmp_path):
    _, expected = run(tmp_path / "a")
    run(tmp_path / "b", steps=3)
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:  # steps after the checkpoint, the last cut short
        file.write('{"step": 4, "loss": 0.5}\n{"step": 5, "lo')
    run(tmp_path / "b", resume=True)
    assert [r["step"] for r in on_disk(tmp_path / "b")] == [1, 2, 3, 4, 5, 6]
    assert losses(on_disk(tmp_path / "b")) == losses(expected)


def test_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    class Killed(Exception):
        pass

    def kill(record):
        if record["step"] == 5:
            raise Killed

    unbroken, expected = run(tmp_path / "a")
    with pytest.raises(Killed):
        run(tmp_path / "b", save_every=2, callback=kill)
    assert not (tmp_path / "b" / "model.safetensors").exists()  # which is written at the end alone
    resumed, rest = run(tmp_path / "b", save_every=2, resume=True)
    assert losses(rest) == losses(expected)[4:]
    assert losses(on_disk(tmp_path / "b")) == losses(expected)
    assert same_weights(resumed, unbroken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("where", ["callback", "within the step"])
def test_a_signal_saves_and_resumes(tmp_path, monkeypatch, where, number):
    def interrupting(*args, step, **names):
        if where == "within the step" and step == 2:
            signal.raise_signal(number)
        return noise(*args, step=step, **names)

    def interrupt(record):
        if where == "callback" and record["step"] == 3:
            signal.raise_signal(number)

    unbroken, expected = run(tmp_path / "a")
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    monkeypatch.setattr("fastdiff.training.trainer.noise", interrupting)
    with pytest.raises(Stopped) as stopped:
        run(tmp_path / "b", callback=interrupt)
    assert stopped.value.args == (number,)
    done = {"callback": 4, "within the step": 3}[where]  # a step is finished, and ranks agree in the next one
    assert [r["step"] for r in on_disk(tmp_path / "b")] == list(range(1, done + 1))
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == handlers
    resumed, rest = run(tmp_path / "b", resume=True)
    assert losses(rest) == losses(expected)[done:]
    assert same_weights(resumed, unbroken)


@pytest.mark.parametrize("checkpoint", [1, 2])
def test_a_signal_while_a_checkpoint_is_written_loses_nothing(tmp_path, monkeypatch, checkpoint):
    saved, save = [], Checkpoints.save

    def interrupted(self, step, *args):
        saved.append(step)
        if len(saved) == checkpoint:
            signal.raise_signal(signal.SIGINT)
        save(self, step, *args)

    monkeypatch.setattr("fastdiff.training.checkpoints.Checkpoints.save", interrupted)
    with pytest.raises(Stopped):
        run(tmp_path, steps=4, save_every=2)
    assert saved == {1: [2, 3], 2: [2, 4]}[checkpoint]
    averaged, rest = run(tmp_path, steps=4, resume=True)
    assert len(rest) == {1: 1, 2: 0}[checkpoint]
    assert same_weights(averaged, run(steps=4)[0])


def test_a_killed_process_leaves_no_lock_and_its_last_checkpoint(tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from training_runs import *
run({str(tmp_path)!r}, save_every=2, callback=lambda r: r["step"] == 5 and os.kill(os.getpid(), signal.SIGKILL))
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    _, expected = run()
    _, rest = run(tmp_path, resume=True)
    assert len(rest) in (2, 4)  # the second checkpoint may have been in the writing
    assert losses(rest) == losses(expected)[-len(rest) :]
    assert losses(on_disk(tmp_path)) == losses(expected)


def test_two_runs_do_not_share_a_folder(tmp_path):
    refused = []

    def second(record):
        for resume in (False, True) if record["step"] == 3 else (False,):  # the first checkpoint is there
            with pytest.raises(BlockingIOError, match=r"out: another run is writing to \S+") as error:
                run(tmp_path, resume=resume, lr=0.5)
            refused.append(error)

    first, records = run(tmp_path, steps=3, save_every=1, callback=second)
    assert len(refused) == 4
    assert on_disk(tmp_path) == records
    assert same_weights(DiffusionTransformer.from_pretrained(tmp_path), first)
