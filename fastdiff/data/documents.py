"""Documents in files: plain text, lines, JSONL and Parquet, compressed or not, read by parts of files."""

import bz2
import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fastdiff.checks import check_choice

FORMATS = ("by name", "text", "lines", "jsonl", "parquet")
_BY_NAME = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


class Span(NamedTuple):
    """Bytes start..stop-1 of a file; a line belongs to the span that it begins in."""

    path: Path
    format: str
    start: int
    stop: int


def parts(files: list[tuple[Path, int]], format: str, most: int) -> list[list[Span]]:
    """Files, with their sizes, cut into parts of about `most` bytes; what cannot be cut stays whole.

    Args:
        format: how documents lie in them, one of `FORMATS`. "text": a file is a document. "by name": that of .jsonl,
            .ndjson and .parquet, with .gz, .bz2, .xz or .zst behind it or not, and text otherwise.
    """
    check_choice("format", format, FORMATS)
    found: list[list[Span]] = []
    room = 0
    for span in (span for path, size in files for span in _spans(path, size, format, most)):
        size = span.stop - span.start
        if size > room:
            found.append([])
            room = most
        found[-1].append(span)
        room -= size
    return found


def documents(span: Span, field: str) -> Iterator[bytes]:
    """The documents of a span, UTF-8 if the file is right, none of them empty.

    Raises:
        ImportError: what reads such a file is not installed.
        ValueError: a damaged file, or a record without text in `field`; named.
    """
    read = {"text": _whole, "lines": _lines, "jsonl": _records, "parquet": _rows}[span.format]
    try:
        yield from filter(None, read(span, field))
    except ImportError:
        raise
    except Exception as error:  # each library raises its own
        raise ValueError(f"{span.path}: {error}") from error


def _spans(path: Path, size: int, format: str, most: int) -> Iterator[Span]:
    packed = path.suffix in _COMPRESSED
    if format == "by name":
        format = _BY_NAME.get(path.with_suffix("").suffix if packed else path.suffix, "text")
    step = max(size, 1) if packed or format not in ("lines", "jsonl") else most
    for start in range(0, size, step):
        yield Span(path, format, start, min(size, start + step))


def _whole(span: Span, field: str) -> Iterator[bytes]:
    with _open(span.path) as file:
        yield file.read()


def _lines(span: Span, field: str) -> Iterator[bytes]:
    return (line for _, line in _placed_lines(span))


def _records(span: Span, field: str) -> Iterator[bytes]:
    for place, line in _placed_lines(span):
        if line.strip():
            try:
                text = json.loads(line)[field]
            except (ValueError, KeyError, TypeError, IndexError):
                start = line[:60].decode(errors="replace")
                raise ValueError(f"byte {place}: expected a JSON object with {field!r}, got {start!r}") from None
            yield _text(text, f"byte {place}: {field}")


def _rows(span: Span, field: str) -> Iterator[bytes]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError("Parquet files need pyarrow: pip install pyarrow") from None
    with pyarrow.parquet.ParquetFile(span.path) as file:
        if field not in file.schema_arrow.names:
            raise ValueError(f"field: expected one of its columns {', '.join(file.schema_arrow.names)}, got {field!r}")
        for batch in file.iter_batches(columns=[field]):
            for text in batch.column(0).to_pylist():
                yield _text(text, field)


def _text(value: Any, name: str) -> bytes:
    if value is None:
        return b""
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, got {type(value).__name__}")
    return value.encode(errors="surrogatepass")  # half a pair is no UTF-8, and shows as that


def _placed_lines(span: Span) -> Iterator[tuple[int, bytes]]:
    """Lines without their ends, each with its place in the file, uncompressed."""
    packed = span.path.suffix in _COMPRESSED
    with _open(span.path) as file:
        place = span.start
        if place > 0:
            file.seek(place - 1)
            place += len(file.readline()) - 1
        while (packed or place < span.stop) and (line := file.readline()):
            yield place, line.rstrip(b"\r\n")
            place += len(line)


def _open(path: Path) -> BinaryIO:
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
    return openers.get(path.suffix, open)(path, "rb")


def _open_zstd(path: Path, mode: str) -> BinaryIO:
    try:
        from compression import zstd  # of Python 3.14
    except ImportError:
        try:
            from backports import zstd
        except ImportError:
            raise ImportError(".zst files need backports.zstd: pip install backports.zstd") from None
    return zstd.open(path, mode)
