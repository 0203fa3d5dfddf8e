"""Workers, kills at any moment, and full disks leave the same bytes."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tokenized import TEXTS, contents, write_jsonl, written

from fastdiff.data.shards import Shards, TokenFolder, alone
from fastdiff.data.tokenizing import tokenize

pytestmark = pytest.mark.slow

COMMAND = "tokenize --data texts.jsonl --tokenizer {} --held-out 0.2 --shard-bytes 40000 --out {} --workers {}"


def test_workers_do_not_count(folder, bpe):
    for out, workers in (("one", 1), ("two", 2)):
        tokenize(["texts.jsonl"], out, bpe, held_out=0.2, shard_bytes=2000, workers=workers)
    assert contents(folder / "one") == contents(folder / "two")
    assert "00005/train.npy" in contents(folder / "one")


def members(group: int) -> list[int]:
    """Processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_killed_again_and_again_it_gives_the_same_bytes(folder, bpe):
    write_jsonl(folder / "texts.jsonl", [f"{text} {k}" for k in range(60) for text in TEXTS])
    tokenize(["texts.jsonl"], "whole", bpe, held_out=0.2, shard_bytes=40_000)
    shards = len(TokenFolder("whole").shards)
    out, counts = folder / "out", []
    for kill in range(3):
        workers = 1 + kill % 2
        process = subprocess.Popen(
            [sys.executable, "-m", "fastdiff", *COMMAND.format(bpe, "out", workers).split()], start_new_session=True
        )
        seen = len(list(out.glob("*/shard.json")))
        while process.poll() is None and len(list(out.glob("*/shard.json"))) < seen + 2 + kill:
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        end = time.monotonic() + 20
        while members(process.pid):  # its workers end by themselves
            assert time.monotonic() < end
            time.sleep(0.01)
        counts.append(len([path for path in out.glob("*/shard.json") if path.parent.suffix != ".part"]))
        assert not (out / "manifest.json").exists()
        with pytest.raises(FileNotFoundError, match="which is begun and not complete"):
            Shards(out, 16)
    assert counts == sorted(set(counts))  # what was done is kept
    assert counts[-1] < shards
    kept = {path: path.stat().st_mtime_ns for path in out.glob("0*/shard.json")}
    tokenize(["texts.jsonl"], out, bpe, held_out=0.2, shard_bytes=40_000)
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items() if ".part" not in str(path))
    assert contents(out) == contents(folder / "whole")


def test_a_killed_worker_is_told_in_one_line(folder, bpe):
    write_jsonl(folder / "texts.jsonl", [f"{text} {k}" for k in range(60) for text in TEXTS])
    process = subprocess.Popen(
        [sys.executable, "-m", "fastdiff", *COMMAND.format(bpe, "out", 2).split()],
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((folder / "out").glob("*.part/train.npy")):
        time.sleep(0.001)
    (part, *_) = (folder / "out").glob("*.part/train.npy")
    os.kill(int(part.parent.name.split(".")[1]), signal.SIGKILL)
    _, error = process.communicate()
    assert process.returncode == 2
    assert error.splitlines()[-1].startswith("fastdiff: a worker was killed, perhaps for want of memory")


def test_a_full_disk_keeps_what_is_done(folder):
    write_jsonl(folder / "more.jsonl", ["short", "x" * 100_000])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
        with pytest.raises(OSError, match=r"File too large: 'out/00002\S+train\.npy'"):
            tokenize(["texts.jsonl", "more.jsonl"], "out", held_out=0, shard_bytes=30_000, format="by name")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["00000", "00001", "plan.json"]
    tokenize(["texts.jsonl", "more.jsonl"], "out", held_out=0, shard_bytes=30_000)
    assert len(written(folder / "out")[0]) == 302


def test_one_writer_at_a_time(folder):
    with alone(folder / "out"), pytest.raises(BlockingIOError, match="out: another process is writing to out"):
        tokenize(["texts.jsonl"], "out")
    tokenize(["texts.jsonl"], "out")


def test_a_folder_of_something_else_is_left_alone(folder, bpe):
    for name in ("out/tokenizer/mine.json", "out/00000.1.part/mine"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text("mine")
    before = contents(folder / "out")
    with pytest.raises(ValueError, match=r"out: expected a new folder or one of tokens, but out holds 00000\.1\.part"):
        tokenize(["texts.jsonl"], "out", bpe)
    assert contents(folder / "out") == before


def test_a_kill_before_the_first_shard(folder, bpe, monkeypatch):
    """Between any two of its first writes."""
    tokenize(["texts.jsonl"], "whole", bpe)
    monkeypatch.setattr("fastdiff.data.shards._remove_parts", lambda folder: None)  # a kill removes nothing
    for function in ("saved_hash", "write_atomically", "parts"):
        with monkeypatch.context() as patch:
            patch.setattr(f"fastdiff.data.tokenizing.{function}", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                tokenize(["texts.jsonl"], function, bpe)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    for function in ("saved_hash", "write_atomically", "parts"):
        tokenize(["texts.jsonl"], function, bpe)
        assert contents(folder / function) == contents(folder / "whole")
