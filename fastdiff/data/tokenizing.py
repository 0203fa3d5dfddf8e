"""From files to a folder of tokens, by worker processes that may be killed at any time.

Files are cut into parts, and each part becomes a shard, whole or not at all. What the parts are is written first, in
plan.json, and depends on neither the workers nor on what has been done: started again, only missing shards are made.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastdiff.checks import check_integer
from fastdiff.data.documents import Span, documents, parts
from fastdiff.data.shards import (
    FORMAT,
    TokenFolder,
    alone,
    is_held_out,
    read_shard,
    write_manifest,
    writing,
)
from fastdiff.data.sources import data_files, is_text
from fastdiff.data.texts import Bytes, load_tokenizer, saved_hash
from fastdiff.files import write_atomically
from fastdiff.progress import progress

_TOGETHER = 2**20  # bytes of documents that a tokenizer is given at once


def tokenize(
    data: Iterable[str | os.PathLike],
    out: str | os.PathLike,
    tokenizer: str = "bytes",
    *,
    format: str = "by name",
    field: str = "text",
    eos: str | None = None,
    held_out: float = 0.01,
    shard_bytes: int = 2**26,
    workers: int = 1,
    trust_remote_code: bool = False,
) -> TokenFolder:
    """Tokens of files in a folder, for `fastdiff.data.Shards`. Killed, and called again, it goes on where it was.

    Args:
        data: files and folders.
        out: the folder to write.
        tokenizer: "bytes", a tokenizer.json of `tokenizers`, or a folder or name as transformers takes it.
        format: how documents lie in files; see `fastdiff.data.documents.parts`.
        field: of JSONL and Parquet, what holds the text.
        eos: the token behind each document; None for the tokenizer's own, if it has one.
        held_out: share of the documents to keep for validation, in [0, 1). A document's content decides.
        shard_bytes: bytes of files for one shard, where a file can be cut: lines and JSONL that are not compressed.
        workers: processes.
        trust_remote_code: run the code that comes with a tokenizer.

    Raises:
        BlockingIOError: another process is writing to the folder.
        FileNotFoundError: no such data.
        ImportError: what reads a file, or the tokenizer, is not installed.
        OSError: a full disk; what is done is kept.
        ValueError: nothing to train on; a damaged file; a folder begun from other files or with other settings, or of
            something else.
    """
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out: expected a share in [0, 1), got {held_out}")
    check_integer("shard_bytes", shard_bytes, 1)
    check_integer("workers", workers, 1)
    folder = Path(out)
    data = list(data)
    files = _files(data, folder)
    with alone(folder):
        settings = _settings(folder, tokenizer, eos, trust_remote_code) | {"held_out": held_out}
        plan: dict[str, Any] = {"written": FORMAT, "settings": settings, "format": format, "field": field}
        plan |= {"shard_bytes": shard_bytes, "files": files}
        digest = _agreed(folder, plan)
        spans = parts([(Path(path), size) for path, size, _ in files], format, shard_bytes)
        names = [f"{k:05}" for k in range(len(spans))]
        missing = [k for k, name in enumerate(names) if not (folder / name).exists()]
        job = _Job(folder, settings, digest, field, trust_remote_code)
        making = _done(job, [(names[k], spans[k]) for k in missing], min(workers, len(missing)))
        with progress(len(names), "shards") as advance, closing(making):
            advance(len(names) - len(missing))
            for _ in making:
                advance(1)
        shards = {name: read_shard(folder / name, digest) for name in names}
        _check_amount(shards, data)
        write_manifest(folder, settings, [[path, size] for path, size, _ in files], shards)
    return TokenFolder(folder)


def _files(data: Iterable[str | os.PathLike], out: Path) -> list[list[Any]]:
    """Paths, sizes and times of what is not empty, each file once."""
    found = dict.fromkeys(file.resolve() for one in data for file in data_files(one, out))
    told = [(file, file.stat()) for file in found if file.is_file()]
    files = [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in told if stat.st_size]
    if not files:
        raise ValueError(f"data: expected text, found none in {', '.join(map(str, data))}")
    return files


def _settings(folder: Path, name: str, eos: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """What tokens depend on. The tokenizer's files are in tokenizer.part then: what they say is what counts."""
    if name == "bytes":
        if eos is not None:
            raise ValueError(f"eos: expected none, for bytes have none, got {eos!r}")
        return {"tokenizer": {"name": name, "fingerprint": name}, "num_tokens": 256, "eos": None}
    loaded = load_tokenizer(name, trust_remote_code)
    if eos is not None:
        if eos not in loaded.get_vocab():
            raise ValueError(f"eos: expected a token of {name}, got {eos!r}")
        loaded.eos_token = eos
    part = folder / "tokenizer.part"
    loaded.save_pretrained(part)
    saved = load_tokenizer(str(part), trust_remote_code)
    num_tokens = max(len(saved), *(id + 1 for id in saved.get_vocab().values()))
    told = {"name": name, "fingerprint": saved_hash(part)}
    return {"tokenizer": told, "num_tokens": num_tokens, "eos": saved.eos_token_id}


def _agreed(folder: Path, plan: dict[str, Any]) -> str:
    """The plan's hash. Where there are shards, they are of this plan; else it is written, and the tokenizer kept."""
    path, own, part = folder / "plan.json", folder / "tokenizer", folder / "tokenizer.part"
    if any(folder.glob("*/shard.json")):
        try:
            begun = json.loads(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path}: damaged: {error}") from None
        for name in plan:
            if begun.get(name) != plan[name]:
                raise ValueError(f"out: {folder} was begun with other {name}; choose another folder")
    else:
        write_atomically(path, json.dumps(plan, indent=1).encode() + b"\n")
        shutil.rmtree(own, ignore_errors=True)
        if part.exists():
            part.rename(own)
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def _check_amount(shards: dict[str, Any], data: Iterable[str | os.PathLike]) -> None:
    documents = sum(shard["sizes"]["text_ends.npy"] for shard in shards.values())
    if not any(shard["sizes"]["train.npy"] for shard in shards.values()):
        places = ", ".join(map(str, data))
        raise ValueError(f"data: expected UTF-8 text to train on, found none in {places}; {documents} are held out")
    if left_out := sum(shard["left_out"] for shard in shards.values()):
        warnings.warn(f"data: {left_out} documents that are not UTF-8 text are left out", stacklevel=3)


class _Job(NamedTuple):
    """What all shards have in common."""

    folder: Path
    settings: dict[str, Any]
    plan: str
    field: str
    trust_remote_code: bool


class _Maker:
    """Makes shards of parts; one for each process."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        name = "bytes" if job.settings["tokenizer"]["name"] == "bytes" else str(job.folder / "tokenizer")
        self.tokenizer = load_tokenizer(name, job.trust_remote_code)

    def make(self, name: str, spans: list[Span]) -> None:
        job = self.job
        with writing(job.folder, name, job.settings["num_tokens"], job.plan) as shard:
            for together in _batches(spans, job.field):
                found = [document for document in together if is_text(document)]
                shard.left_out += len(together) - len(found)
                for document, tokens in zip(found, self._tokens(found), strict=True):
                    shard.add(document, tokens, is_held_out(document, job.settings["held_out"]))

    def _tokens(self, documents: list[bytes]) -> Iterator[np.ndarray]:
        if isinstance(self.tokenizer, Bytes):
            yield from (np.frombuffer(document, np.uint8) for document in documents)
            return
        texts = [document.decode() for document in documents]
        end = [] if self.job.settings["eos"] is None else [self.job.settings["eos"]]
        for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []:
            yield np.array(ids + end, np.int64)


def _batches(spans: list[Span], field: str) -> Iterator[list[bytes]]:
    together, size = [], 0
    for span in spans:
        for document in documents(span, field):
            together.append(document)
            size += len(document)
            if size >= _TOGETHER:
                yield together
                together, size = [], 0
    yield together


def _done(job: _Job, todo: list[tuple[str, list[Span]]], workers: int) -> Generator[None, None, None]:
    """Makes shards, in this process or in others, and yields after each."""
    if workers <= 1:
        maker = _Maker(job)
        for one in todo:
            maker.make(*one)
            yield
        return
    context = multiprocessing.get_context("spawn")
    alive, keeps = context.Pipe(duplex=False)
    with ProcessPoolExecutor(workers, context, _start, (alive, job)) as pool:
        try:
            for future in as_completed([pool.submit(_make, *one) for one in todo]):
                yield future.result()
        except BrokenProcessPool:
            raise OSError("a worker was killed, perhaps for want of memory; what is done is kept") from None
        except BaseException:
            keeps.close()  # or those at work would be waited for
            raise


_worker: list[_Maker] = []  # one, in a worker


def _start(alive: Connection, job: _Job) -> None:
    """In a worker: it ends when the process that started it closes the pipe, or is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with, args=(alive,), daemon=True).start()
    _worker.append(_Maker(job))


def _end_with(alive: Connection) -> None:
    alive.poll(None)
    os._exit(1)


def _make(name: str, spans: list[Span]) -> None:
    _worker[0].make(name, spans)
