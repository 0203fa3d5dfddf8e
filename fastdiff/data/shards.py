"""Tokens on disk, in shards that are mapped into memory and not read: the format, its writer and its reader.

A folder holds manifest.json, written last; tokenizer/, the tokenizer's own files, unless tokens are bytes; and the
shards 00000, 00001, ..., each a folder of NumPy arrays with shard.json:

    train.npy      documents to train on, one after the other, each with an end of text behind it if there is one:
                   uint8, uint16 or uint32, the first that holds the vocabulary
    held_out.npy   the documents that are held out, likewise
    text.npy       the held-out documents as they were: bytes of UTF-8
    *_ends.npy     of each of the three, where each document ends, int64
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from fastdiff.checks import check_integer
from fastdiff.data.permutation import permute
from fastdiff.data.sources import indices
from fastdiff.files import naming, write_atomically

STREAMS = ("train", "held_out", "text")
FORMAT = "fastdiff tokens, version 1"
_SIDES = 2**64  # of a document's hash


def dtype_for(num_tokens: int) -> np.dtype:
    """The smallest type of ids in [0, num_tokens)."""
    return np.dtype("u1" if num_tokens <= 2**8 else "<u2" if num_tokens <= 2**16 else "<u4")


def is_held_out(document: bytes, share: float) -> bool:
    """Which side a document is on: its content alone decides, and no other document."""
    return int.from_bytes(hashlib.sha256(document).digest()[:8], "big") < share * _SIDES


class _Array:
    """A .npy file of one dimension that grows."""

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        self.path, self.dtype, self.size = path, dtype, 0
        self.file: BinaryIO = path.open("w+b")
        self._header()

    def append(self, values: np.ndarray) -> None:
        self.size += len(values)
        with naming(self.path):
            self.file.write(values.astype(self.dtype).tobytes())

    def close(self) -> str:
        """Finishes the file, and its hash."""
        with naming(self.path):
            self.file.seek(0)
            self._header()  # room is left in it for any number of digits
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        return file_hash(self.path)

    def _header(self) -> None:
        shape = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.size,)}
        npy.write_array_header_1_0(self.file, shape)


class ShardWriter:
    """What `writing` gives: documents go into one shard."""

    def __init__(self, folder: Path, num_tokens: int) -> None:
        self.num_tokens, self.left_out = num_tokens, 0
        types = {"train": dtype_for(num_tokens), "held_out": dtype_for(num_tokens), "text": np.dtype("u1")}
        self.arrays = {name: _Array(folder / f"{name}.npy", dtype) for name, dtype in types.items()}
        self.ends = {name: _Array(folder / f"{name}_ends.npy", np.dtype("<i8")) for name in types}

    def add(self, document: bytes, tokens: np.ndarray, held_out: bool) -> None:
        """A document and its tokens.

        Raises:
            ValueError: an id that is not in the vocabulary.
        """
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < self.num_tokens:
            raise ValueError(f"tokenizer: expected ids in [0, {self.num_tokens}), got {tokens.min()} to {tokens.max()}")
        self._append("held_out" if held_out else "train", tokens)
        if held_out:
            self._append("text", np.frombuffer(document, np.uint8))

    def close(self) -> dict[str, Any]:
        """What shard.json says of the shard."""
        arrays = {array.path.name: array for array in (*self.arrays.values(), *self.ends.values())}
        hashes = {name: array.close() for name, array in arrays.items()}
        sizes = {name: array.size for name, array in arrays.items()}
        return {"sizes": sizes, "sha256": hashes, "left_out": self.left_out}

    def _append(self, stream: str, values: np.ndarray) -> None:
        self.arrays[stream].append(values)
        self.ends[stream].append(np.array([self.arrays[stream].size]))


@contextmanager
def writing(folder: Path, name: str, num_tokens: int, plan: str) -> Iterator[ShardWriter]:
    """A shard that is there, whole, when the block has ended without an error, or not at all."""
    part = folder / f"{name}.{os.getpid()}.part"
    part.mkdir()
    try:
        writer = ShardWriter(part, num_tokens)
        yield writer
        told = {"plan": plan, **writer.close()}
        write_atomically(part / "shard.json", json.dumps(told, indent=1).encode() + b"\n")
        part.rename(folder / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Locks a folder of tokens, or a new one, for one writer at a time; parts are removed before and after.

    Raises:
        BlockingIOError: it is locked.
        ValueError: a folder of something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"out: another process is writing to {folder}") from None
        except OSError:
            pass  # a file system without locks
        others = [path.name for path in folder.iterdir() if path.name not in ("plan.json.part", "tokenizer.part")]
        if others and not is_tokens(folder):
            raise ValueError(f"out: expected a new folder or one of tokens, but {folder} holds {min(others)}")
        _remove_parts(folder)
        try:
            yield
        finally:
            _remove_parts(folder)
    finally:
        os.close(place)


def _remove_parts(folder: Path) -> None:
    """Removes what writers have left."""
    for part in folder.glob("*.part"):
        shutil.rmtree(part) if part.is_dir() else part.unlink()


def read_shard(folder: Path, plan: str) -> dict[str, Any]:
    """What shard.json says, of a shard of this plan."""
    try:
        told = json.loads((folder / "shard.json").read_text())
        found = told.pop("plan")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder / 'shard.json'}: missing or damaged: {error}") from None
    if found != plan:
        raise ValueError(f"{folder}: a shard of other files, or of another tokenizer or share")
    return told


def write_manifest(folder: Path, settings: dict[str, Any], sources: list[Any], shards: dict[str, Any]) -> None:
    """manifest.json, which makes a folder of shards complete.

    Args:
        settings: tokenizer {"name", "fingerprint"}, num_tokens, eos (an id or None) and held_out (a share).
        sources: what the tokens were made of.
        shards: what `read_shard` gives, of each.
    """
    manifest = {"format": FORMAT, "fingerprint": _fingerprint(settings, shards), "settings": settings}
    totals = {name: sum(shard["sizes"][f"{name}.npy"] for shard in shards.values()) for name in STREAMS}
    documents = {name: sum(shard["sizes"][f"{name}_ends.npy"] for shard in shards.values()) for name in STREAMS}
    manifest |= {"sizes": totals, "documents": documents, "sources": sources, "shards": shards}
    write_atomically(folder / "manifest.json", json.dumps(manifest, indent=1).encode() + b"\n")


def _fingerprint(settings: dict[str, Any], shards: dict[str, Any]) -> str:
    """Of the tokens and how they were made, not of where they came from."""
    tokenizer = settings["tokenizer"]["fingerprint"]
    told = [{**settings, "tokenizer": tokenizer}, [shard["sha256"] for shard in shards.values()]]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def is_tokens(folder: str | os.PathLike) -> bool:
    """Whether a folder is one of tokens, complete or not yet."""
    for path in (Path(folder) / "manifest.json", Path(folder) / "plan.json"):
        if path.is_file():
            with path.open("rb") as file:
                if FORMAT.encode() in file.read(100):
                    return True
    return False


class TokenFolder:
    """A folder of tokens, open: what it says, and its streams.

    Raises:
        FileNotFoundError: not a folder of tokens, or not complete.
        ValueError: a manifest that is damaged, a shard that is missing or not as long as it says.
    """

    def __init__(self, folder: str | os.PathLike) -> None:
        self.folder = Path(folder)
        path = self.folder / "manifest.json"
        if not path.is_file():
            begun = ", which is begun and not complete: run `fastdiff tokenize` again" * is_tokens(folder)
            raise FileNotFoundError(f"data: expected a folder of tokens, but there is no {path}{begun}")
        try:
            told = json.loads(path.read_text())
            self.settings, self.shards, self.fingerprint = told["settings"], told["shards"], told["fingerprint"]
            if told["format"] != FORMAT or self.fingerprint != _fingerprint(self.settings, self.shards):
                raise ValueError("changed, or of another version")
            self.num_tokens = self.settings["num_tokens"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: damaged: {error}") from None
        for name, shard in self.shards.items():
            for array, size in shard["sizes"].items():
                self._check_size(self.folder / name / array, size)

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where the tokenizer's files are; None where tokens are bytes."""
        return None if self.settings["tokenizer"]["name"] == "bytes" else self.folder / "tokenizer"

    @cached_property
    def train(self) -> "Stream":
        return Stream(self, "train")

    @cached_property
    def held_out(self) -> "Stream":
        return Stream(self, "held_out")

    @cached_property
    def text(self) -> "Stream":
        return Stream(self, "text")

    def held_out_documents(self, most: int) -> Iterator[bytes]:
        """The held-out documents as text, evenly spread if there are more than `most` bytes of them."""
        step = max(1, -(-self.text.size // most))
        return (self.text.document(k).tobytes() for k in range(0, self.text.num_documents, step))

    def check(self) -> None:
        """Reads all, and raises a ValueError that names the first file that is not what was written."""
        for name, shard in self.shards.items():
            for array, expected in shard["sha256"].items():
                if file_hash(self.folder / name / array) != expected:
                    raise ValueError(f"{self.folder / name / array}: not what was written: its sha256 is another")

    def _check_size(self, path: Path, size: int) -> None:
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise ValueError(f"{path}: missing, but the manifest has it") from None
        stream = path.stem.removesuffix("_ends")
        width = 8 if path.stem.endswith("_ends") else 1 if stream == "text" else dtype_for(self.num_tokens).itemsize
        if found != _HEADER + size * width:
            raise ValueError(f"{path}: expected {_HEADER + size * width} bytes, got {found}: cut short or changed")


_HEADER = 128  # bytes in front of a .npy file's values


class Stream:
    """Documents of all shards, one after the other."""

    def __init__(self, tokens: TokenFolder, name: str) -> None:
        self.folders = [tokens.folder / shard for shard in tokens.shards]
        self.name = name
        sizes = [[shard["sizes"][f"{name}{part}.npy"] for shard in tokens.shards.values()] for part in ("", "_ends")]
        self.begins, self._documents = (np.cumsum([0, *size], dtype=np.int64) for size in sizes)
        self.size, self.num_documents = int(self.begins[-1]), int(self._documents[-1])
        self._open: dict[Path, np.ndarray] = {}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Values start..stop-1, from as many shards as hold them."""
        parts = []
        while start < stop:
            shard = int(np.searchsorted(self.begins, start, "right")) - 1
            end = min(stop, int(self.begins[shard + 1]))
            begin = int(self.begins[shard])
            parts.append(self._array(shard, self.name)[start - begin : end - begin])
            start = end
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def document(self, k: int) -> np.ndarray:
        """The k-th document."""
        shard = int(np.searchsorted(self._documents, k, "right")) - 1
        k -= int(self._documents[shard])
        ends = self._array(shard, f"{self.name}_ends")
        return self._array(shard, self.name)[ends[k - 1] if k else 0 : ends[k]]

    def windows(self, positions: Tensor, length: int) -> Tensor:
        """Disjoint windows by number, [n] -> int64 [n, length]."""
        found = torch.empty(len(positions), length, dtype=torch.int64, device="cpu")
        rows = found.numpy()
        for row, position in zip(rows, positions.tolist(), strict=True):
            row[:] = self.read(position * length, (position + 1) * length)
        return found

    def _array(self, shard: int, name: str) -> np.ndarray:
        path = self.folders[shard] / f"{name}.npy"
        if path not in self._open:
            self._open[path] = np.asarray(np.load(path, mmap_mode="r"))  # of a memmap, slices take longer
        return self._open[path]


class Shards:
    """Windows of `length` tokens of a folder that `fastdiff tokenize` wrote, a `TokenSource`.

    Training documents follow one another and are cut into disjoint windows; no window holds a token of a held-out
    document. Each is seen once an epoch, in another order each epoch; the order is computed and not stored. A rest
    at the end that is shorter than a window is not seen.

    Args:
        folder: of the tokens.
        length: tokens in a window.
        seed: names the orders.

    Raises:
        FileNotFoundError, ValueError: as `TokenFolder`; fewer training tokens than a window has.
    """

    def __init__(self, folder: str | os.PathLike, length: int, *, seed: int = 0) -> None:
        self.tokens, self.length, self.seed = TokenFolder(folder), check_integer("length", length, 1), seed
        self.num_tokens = self.tokens.num_tokens
        self.num_windows = self._available("train")

    @property
    def fingerprint(self) -> str:
        """A hash of the folder's, the length and the seed."""
        return hashlib.sha256(repr((self.tokens.fingerprint, self.length, self.seed)).encode()).hexdigest()

    def sequences(self, start: int, stop: int) -> Tensor:
        """Training windows start..stop-1 of the endless order, int64 [stop - start, length]."""
        index = indices(start, stop)
        position = permute(index % self.num_windows, self.num_windows, seed=self.seed, epoch=index // self.num_windows)
        return self.tokens.train.windows(position, self.length)

    def validation(self, n: int) -> Tensor:
        """At most n windows of the held-out documents, evenly spread, int64 [<= n, length]."""
        available = self._available("held_out")
        n = min(check_integer("n", n, 1), available)
        return self.tokens.held_out.windows(torch.arange(n, device="cpu") * available // n, self.length)

    def _available(self, stream: str) -> int:
        size = getattr(self.tokens, stream).size
        if size < self.length:
            part = {"train": "training", "held_out": "held-out"}[stream]
            raise ValueError(f"length: expected at most the {size} tokens of the {part} text, got {self.length}")
        return size // self.length
