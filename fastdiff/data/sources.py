"""Tokens to train and evaluate on: byte-level text, or a table of sequences.

A training sequence is a pure function of (seed, index), so that a resumed run, and one on other ranks, sees what an
unbroken one would have seen.
"""

import hashlib
import os
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from fastdiff.checks import check_integer, check_tokens
from fastdiff.philox import Purpose, draw32, scaled, uniform

NUM_BYTES = 256
_FEW = 20  # so few documents are split inside each, more of them between documents
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}


class TokenSource(Protocol):
    """What `fastdiff.training.train` reads: int64 tokens in [0, num_tokens), in sequences of one length."""

    num_tokens: int

    @property
    def fingerprint(self) -> str:
        """Another one wherever a training sequence, or what is held out, is another."""
        ...

    def sequences(self, start: int, stop: int) -> Tensor:
        """Sequences start..stop-1 of an endless order, [stop - start, L] on the CPU: the same whenever asked for."""
        ...

    def validation(self, n: int) -> Tensor:
        """At most n sequences that no training sequence holds, [<= n, L]."""
        ...


class Text:
    """Windows of `length` bytes from documents, split so that no held-out byte is ever trained on.

    Exact duplicates are dropped first. From 20 documents on, whole ones are held out, in the order of a hash
    of their content, until they make up `held_out` of the bytes. Of fewer documents each gives up its tail.

    Args:
        documents: the texts, as bytes, in an order that does not vary.
        length: bytes in a window.
        held_out: share of the bytes to keep for validation, in (0, 1).
        seed: names the training sequences.

    Raises:
        ValueError: no text at all, or less than `length` bytes in a part.
    """

    num_tokens = NUM_BYTES

    def __init__(self, documents: list[bytes], length: int, *, held_out: float = 0.05, seed: int = 0) -> None:
        if length < 1:
            raise ValueError(f"length: expected at least 1, got {length}")
        if not 0 < held_out < 1:
            raise ValueError(f"held_out: expected a share in (0, 1), got {held_out}")
        documents = [d for d in dict.fromkeys(documents) if d]
        if not documents:
            raise ValueError("documents: expected text, got none or only empty ones")
        train, validation = _split(documents, held_out)
        self.length, self.seed = length, seed
        self.train_bytes = as_bytes(train, length, "training")
        self.validation_bytes = as_bytes(validation, length, "held-out")

    @property
    def fingerprint(self) -> str:
        """A hash of the two parts, the length and the seed."""
        return _fingerprint((self.length, self.seed), self.train_bytes, self.validation_bytes)

    def sequences(self, start: int, stop: int) -> Tensor:
        """Windows at uniform places of the training text, int64 [stop - start, length]."""
        starts = len(self.train_bytes) - self.length + 1
        index, pair = indices(start, stop), torch.tensor([[0], [1]], device="cpu")
        coarse, fine = draw32(self.seed, Purpose.DATA, 0, index, 0, pair)
        between = -(-starts >> 32)  # 32 bits reach every start of 4 GiB; of a longer text, one in so many
        return _windows(self.train_bytes, scaled(coarse, starts) + scaled(fine, between), self.length)

    def validation(self, n: int) -> Tensor:
        """At most n windows of the held-out text, as `even_windows` gives them."""
        return even_windows(self.validation_bytes, self.length, n)


class Table:
    """Sequences drawn independently, with given probabilities, from the rows of a table.

    Args:
        tokens: [N, L] int64 sequences.
        num_tokens: size of the alphabet; ids lie in [0, num_tokens).
        probs: [N] probabilities of the rows, up to a factor; None for equal ones.
        held_out: [M, L] sequences for validation; None if there are none.
        seed: names the training sequences.
    """

    def __init__(
        self,
        tokens: Tensor,
        *,
        num_tokens: int,
        probs: Tensor | None = None,
        held_out: Tensor | None = None,
        seed: int = 0,
    ) -> None:
        for name, value in (("tokens", tokens), ("held_out", held_out)):
            if value is not None:
                _check_table(name, value, num_tokens)
        tokens, held_out = tokens.cpu().long(), None if held_out is None else held_out.cpu().long()
        if probs is None:
            probs = torch.ones(len(tokens), dtype=torch.float64, device="cpu")
        if probs.shape != tokens.shape[:1] or not (probs >= 0).all() or not 0 < probs.sum() < torch.inf:
            raise ValueError(f"probs: expected {len(tokens)} numbers >= 0 with a finite sum > 0, got {probs}")
        cumulative = probs.cpu().double().cumsum(0)
        self.tokens, self.num_tokens, self.held_out, self.seed = tokens, num_tokens, held_out, seed
        self._cumulative = cumulative / cumulative[-1]

    @property
    def fingerprint(self) -> str:
        """A hash of the rows, their probabilities and the seed."""
        held_out = self.tokens[:0] if self.held_out is None else self.held_out
        return _fingerprint((self.num_tokens, self.seed), self.tokens, self._cumulative, held_out)

    def sequences(self, start: int, stop: int) -> Tensor:
        """Rows drawn with the given probabilities, int64 [stop - start, L]."""
        u = uniform(self.seed, Purpose.DATA, 0, indices(start, stop), 0, 0)
        return self.tokens[torch.searchsorted(self._cumulative, u, right=True)]

    def validation(self, n: int) -> Tensor:
        """The first n held-out rows, int64 [<= n, L]."""
        if self.held_out is None:
            raise ValueError("held_out: expected validation sequences, got None")
        return self.held_out[:n]


def load_documents(data: str | os.PathLike, run: str | os.PathLike | None = None) -> list[bytes]:
    """The documents that `data` names, in an order that does not vary; a warning counts the files left out.

    Args:
        data: "stdlib" for the source and the documentation topics of the running interpreter's standard
            library, its tests left out; else a text file, or a folder whose UTF-8 files count unless hidden or
            in the folder of a run.
        run: a run folder that may not look like one yet.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: no UTF-8 text in it, or the run folder itself.
    """
    return [content for _, content in load_named_documents(data, run)]


def load_named_documents(data: str | os.PathLike, run: str | os.PathLike | None = None) -> list[tuple[str, bytes]]:
    """The same, each with its path, or with "stdlib"."""
    if data == "stdlib":
        return [("stdlib", content) for content in _standard_library()]
    files = data_files(data, run)
    regular = [file for file in files if file.is_file()]  # no broken links, and no pipes, which might never end
    contents = ((str(file), file.read_bytes()) for file in regular)
    documents = [(name, content) for name, content in contents if is_text(content)]
    if not any(content for _, content in documents):
        raise ValueError(f"data: expected UTF-8 text, found none in {data}")
    if len(documents) < len(files):
        no_text, no_files = len(regular) - len(documents), len(files) - len(regular)
        warnings.warn(
            f"data: of {len(files)} files in {data}, {no_text} that are not UTF-8 text and {no_files} that are not "
            "regular files are left out",
            stacklevel=3,
        )
    return documents


def data_files(data: str | os.PathLike, run: str | os.PathLike | None = None) -> list[Path]:
    """A file, or the files below a folder that are neither hidden nor of a run, in an order that does not vary."""
    if not os.path.exists(data):
        raise FileNotFoundError(f"data: expected 'stdlib', a text file or a folder, but there is no {str(data)!r}")
    if run is not None and os.path.realpath(run) == os.path.realpath(data):
        raise ValueError(f"data: expected text from elsewhere than the run's own folder, got {data}")
    root = Path(data)
    if not root.is_dir():
        return [root]
    own = None if run is None else root / os.path.relpath(os.path.realpath(run), os.path.realpath(root))

    def wanted(path: Path) -> bool:
        return not path.name.startswith(".") and path != own and not (path / "metrics.jsonl").exists()

    return _files(root, wanted)


def indices(start: int, stop: int) -> Tensor:
    """Global indices start..stop-1 of training sequences, int64."""
    start = check_integer("start", start, 0)
    return torch.arange(start, check_integer("stop", stop, start), device="cpu")


def is_text(content: bytes) -> bool:
    """Whether it is UTF-8 without zeros."""
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False


def as_bytes(documents: list[bytes], length: int, part: str = "whole") -> Tensor:
    """Documents one after the other, uint8 [number of bytes], `length` of them or more; `part` names them."""
    text = b"".join(documents)
    if len(text) < length:
        raise ValueError(f"length: expected at most the {len(text)} bytes of the {part} text, got {length}")
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def even_windows(text: Tensor, length: int, n: int) -> Tensor:
    """At most n disjoint windows, evenly spread over a text of bytes: uint8 [N] -> int64 [<= n, length]."""
    if n < 1:
        raise ValueError(f"n: expected at least 1 window, got {n}")
    available = len(text) // length
    n = min(n, available)
    return _windows(text, torch.arange(n, device=text.device) * available // n * length, length)


def encode(text: str) -> Tensor:
    """The UTF-8 bytes of a text, int64 [number of bytes]."""
    return torch.tensor(list(text.encode()), dtype=torch.int64, device="cpu")


def decode(tokens: Tensor) -> str:
    """The text of [L] byte tokens; what is not UTF-8 shows as the replacement character."""
    return bytes(tokens.tolist()).decode(errors="replace")


def _split(documents: list[bytes], held_out: float) -> tuple[list[bytes], list[bytes]]:
    if len(documents) < _FEW:
        cuts = [len(d) - round(held_out * len(d)) for d in documents]
        pairs = list(zip(documents, cuts, strict=True))
        return [d[:cut] for d, cut in pairs], [d[cut:] for d, cut in pairs]
    validation, room = set(), held_out * sum(map(len, documents))
    for document in sorted(documents, key=lambda d: hashlib.sha256(d).digest()):
        if room <= 0:
            break
        validation.add(document)
        room -= len(document)
    return [d for d in documents if d not in validation], [d for d in documents if d in validation]


def _windows(text: Tensor, starts: Tensor, length: int) -> Tensor:
    return text[starts.unsqueeze(1) + torch.arange(length, device=text.device)].long()


def _standard_library() -> list[bytes]:
    from pydoc_data.topics import topics  # documentation as prose; its source file is the same text, escaped

    root = Path(sysconfig.get_path("stdlib"))
    files = _files(root, lambda path: path.name not in _NOT_LIBRARY)
    topics_file = root / "pydoc_data" / "topics.py"
    sources = [f.read_bytes() for f in files if f.suffix == ".py" and f != topics_file]
    return sources + [topics[name].encode() for name in sorted(topics)]


def _files(root: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    """Files below root, sorted, that are wanted with all folders above them; other folders are not entered."""
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if wanted(Path(parent, name))]
        found += [file for name in names if wanted(file := Path(parent, name))]
    return sorted(found, key=lambda f: f.relative_to(root).as_posix())


def _fingerprint(settings: tuple[int, ...], *tensors: Tensor) -> str:
    digest = hashlib.sha256(repr((settings, [tensor.shape for tensor in tensors])).encode())
    for tensor in tensors:
        digest.update(tensor.contiguous().cpu().numpy().data)
    return digest.hexdigest()


def _check_table(name: str, tokens: Tensor, num_tokens: int) -> None:
    check_tokens(name, tokens, None)
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise ValueError(f"{name}: expected shape [N, L], neither of them 0, got {tuple(tokens.shape)}")
    if tokens.min() < 0 or tokens.max() >= num_tokens:
        raise ValueError(
            f"{name}: expected ids in [0, {num_tokens}), got {tokens.min().item()} to {tokens.max().item()}"
        )
