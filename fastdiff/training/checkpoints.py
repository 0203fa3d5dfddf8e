"""Checkpoints of a training run on any number of ranks.

A checkpoint is a folder step-N in the format of `torch.distributed.checkpoint`, with extra.json and checksums.json. It
is written as step-N.part and renamed when all ranks have finished; step-N.old is one being deleted. What a killed
writer has left of the two, the next save removes.
"""

import json
import os
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from fastdiff.checks import check_integer
from fastdiff.files import naming, write_atomically
from fastdiff.processes import agree, is_distributed

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")  # one process is meant


class Checkpoints:
    """The checkpoints in a folder, which all ranks share.

    Every method is called on every rank; without a process group, by the one process. An error of one rank is raised
    on all. A copy of what is saved stays in memory. A checkpoint holds pickles: load none that you do not trust.

    Args:
        folder: made by the first save.
        keep: how many of the newest are kept, 1 or more.
        keep_every: those of steps that it divides are kept as well; 0 for none.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2, keep_every: int = 0) -> None:
        self._folder = Path(folder)
        self._keep = check_integer("keep", keep, 1)
        self._keep_every = check_integer("keep_every", keep_every, 0)
        # Not training's group, for both are used at the same time.
        self._group = dist.new_group(backend="gloo") if is_distributed() else None
        self._rank = 0 if self._group is None else self._group.rank()
        self._ranks = 1 if self._group is None else self._group.size()
        cuda = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(cuda, False, False, cuda))  # the copy is done when it returns
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._saving: Future[None] | None = None

    def save(self, step: int, state: Mapping[str, dict], extra: Mapping[str, Any]) -> None:
        """Copy the state and write it in the background. The save before is waited for, and its error raised.

        Args:
            step: later than any that is there.
            state: state_dicts by name, of tensors, DTensors and what pickles. A plain tensor or an object is taken to
                be the same on every rank. Names that are the same on any number of ranks come from `get_state_dict`
                of `torch.distributed.checkpoint.state_dict`.
            extra: what JSON holds.

        Raises:
            ValueError: a step that is not later.
            TypeError: an extra that JSON does not hold.
            OSError: of the save before, with the file's name; what it wrote is gone, and checkpoints before it stay.
        """
        self.wait()
        path, content, staged = self._path(step), json.dumps(extra).encode(), {}
        agree(self._group, lambda: staged.update(self._stage(step, state)))
        self._saving = self._thread.submit(self._write, path, staged, content)

    def wait(self) -> None:
        """Wait for the save in progress, and raise its error."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def latest(self) -> int | None:
        """The newest step, once the save in progress has ended; None if there is none."""
        self.wait()
        return agree(self._group, lambda: max(self._steps(), default=None))[0]

    def load(self, step: int, state: dict[str, dict]) -> dict[str, Any]:
        """Read a checkpoint into the tensors of `state`, on any number of ranks, and replace its other values.

        Args:
            step: one that is there.
            state: as for `save`; parts of the checkpoint that it leaves out are not read.

        Returns:
            What was saved as `extra`.

        Raises:
            FileNotFoundError: there is no such checkpoint, or one of its files is missing.
            ValueError: a file is damaged or cut short, or a tensor is missing, left over, or of another shape or type.
        """
        self.wait()
        path = self._path(step)
        agree(self._group, lambda: self._check(path))
        with _as_itself():
            dcp.load(state, storage_reader=dcp.FileSystemReader(path), planner=_Exact(path), process_group=self._group)
        return json.loads((path / "extra.json").read_bytes())

    def extra(self, step: int) -> dict[str, Any]:
        """What was saved as `extra`; of the rest nothing is read. Errors are those of `load`."""
        self.wait()
        path = self._path(step)
        agree(self._group, lambda: self._check(path, ["extra.json"]))
        return json.loads((path / "extra.json").read_bytes())

    def _path(self, step: int) -> Path:
        return self._folder / f"step-{check_integer('step', step, 0):08}"

    def _steps(self) -> list[int]:
        names = [path.name.removeprefix("step-") for path in self._folder.glob("step-*")]
        return sorted(int(name) for name in names if name.isdecimal())

    def _stage(self, step: int, state: Mapping[str, dict]) -> dict[str, dict]:
        newest = max(self._steps(), default=-1)
        if step <= newest:
            raise ValueError(f"step: expected one after {newest}, the newest in {self._folder}, got {step}")
        return self._stager.stage(dict(state))  # type: ignore[return-value]

    def _write(self, path: Path, state: dict[str, dict], extra: bytes) -> None:
        part = path.with_suffix(".part")
        try:
            agree(self._group, lambda: self._begin(part))
            writer = dcp.FileSystemWriter(part)
            writer.fs = _NamingFileSystem()
            with _as_itself():
                dcp.save(state, storage_writer=writer, process_group=self._group)
            checksums = agree(self._group, lambda: _checksums(part.glob(f"__{self._rank}_*")))
            agree(self._group, lambda: self._finish(path, part, checksums, extra))
        except Exception:
            if self._rank == 0:
                shutil.rmtree(part, ignore_errors=True)
            raise

    def _begin(self, part: Path) -> None:
        if self._rank == 0:
            for leftover in (*self._folder.glob("step-*.part"), *self._folder.glob("step-*.old")):
                shutil.rmtree(leftover)
            part.mkdir(parents=True)

    def _finish(self, path: Path, part: Path, checksums: list[dict[str, int]], extra: bytes) -> None:
        if self._rank != 0:
            return
        write_atomically(part / "extra.json", extra)
        checksums.append(_checksums([part / ".metadata", part / "extra.json"]))
        merged = {name: value for some in checksums for name, value in some.items()}
        write_atomically(part / "checksums.json", json.dumps(merged).encode())
        _sync(part)
        part.rename(path)
        _sync(self._folder)
        for step in self._steps()[: -self._keep]:
            if not self._keep_every or step % self._keep_every:
                old = self._path(step)
                shutil.rmtree(old.rename(old.with_suffix(".old")))

    def _check(self, path: Path, names: list[str] | None = None) -> None:
        """Reads some files, or this rank's share of all."""
        if not path.is_dir():
            raise FileNotFoundError(f"no such checkpoint: {path}")
        file = path / "checksums.json"
        try:
            checksums = json.loads(file.read_bytes())
            wanted = {name: checksums[name] for name in names or sorted(checksums)[self._rank :: self._ranks]}
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"{file}: damaged or cut short") from error
        for name, value in wanted.items():
            if _checksums([path / name]) != {name: value}:
                raise ValueError(f"{path / name}: damaged or cut short")


class _Exact(dcp.DefaultLoadPlanner):
    """Refuses tensors of another model, where the plain planner leaves some out and converts others."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def create_local_plan(self) -> dcp.LoadPlan:
        saved = self.metadata
        assert saved is not None
        places = saved.planner_data  # the keys that lead to each value
        parts = self.original_state_dict
        found = {name: _kind(value) for name, value in saved.state_dict_metadata.items() if places[name][0] in parts}
        expected = {name: _kind(value) for name, value in self.state_dict.items()}
        for name in sorted(found.keys() | expected.keys()):
            there, wanted = found.get(name, "none"), expected.get(name, "none")
            if there != wanted:
                raise ValueError(f"{name}: expected {wanted}, but {self._path} has {there}")
        return super().create_local_plan()


class _NamingFileSystem(FileSystem):
    """Errors of the system name the file."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[IO[bytes]]:  # type: ignore[override]
        with naming(Path(path)):
            try:
                with super().create_stream(path, mode) as stream:
                    yield stream  # type: ignore[misc]
            except RuntimeError as error:  # torch.save's, which ends its archive after an error of the system
                raise error.__context__ or error from None


@contextmanager
def _as_itself() -> Iterator[None]:
    """The first error of a rank, out of the one that `torch.distributed.checkpoint` makes of all."""
    try:
        yield
    except dcp.CheckpointException as wrapped:
        error, _ = next(iter(wrapped.failures.values()))
        raise error from None


def _checksums(files: Iterator[Path] | list[Path]) -> dict[str, int]:
    found = {}
    for path in files:
        found[path.name] = 0
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found[path.name] = zlib.crc32(block, found[path.name])
    return found


def _sync(folder: Path) -> None:
    """Makes renames in a folder last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, TensorStorageMetadata):
        return f"{value.properties.dtype} {tuple(value.size)}"
    return "an object"
