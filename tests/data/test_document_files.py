"""Documents of files in every format."""

import bz2
import gzip
import json
import lzma
import sys
from pathlib import Path

import pytest
from tokenized import TEXTS

from fastdiff.data.documents import documents, parts
from fastdiff.data.tokenizing import tokenize


def packed(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    write = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(write(content))


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz"])
@pytest.mark.parametrize("most", [1, 50, 10**6])
def test_documents_of_every_format(tmp_path, suffix, most):
    lines = "\n".join(TEXTS).encode() + b"\r\n\n"
    records = "".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, ""]).encode()
    for name, format, content in (
        ("a.txt", "by name", lines),
        ("a.txt", "lines", lines),
        ("a.ndjson", "by name", records),
        ("a.json", "jsonl", records),
    ):
        path = tmp_path / (name + suffix)
        packed(path, content)
        cut = parts([(path, path.stat().st_size)], format, most)
        found = [document for spans in cut for span in spans for document in documents(span, "text")]
        assert found == ([lines] if format == "by name" and name == "a.txt" else [text.encode() for text in TEXTS])
        assert len(cut) == 1 or not suffix


def test_parts_are_of_about_the_size_asked_for():
    files = [(Path(f"{k}.txt"), size) for k, size in enumerate([40, 40, 40, 1000, 1])]
    sizes = [[span.stop - span.start for span in part] for part in parts(files, "by name", 100)]
    assert sizes == [[40, 40], [40], [1000], [1]]
    sizes = [[span.stop - span.start for span in part] for part in parts(files, "lines", 100)]
    assert sum(map(sum, sizes)) == 1121
    assert max(map(sum, sizes)) == 100


def test_zstandard(tmp_path):
    zstd = pytest.importorskip("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")
    records = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(zstd.compress(records[:999]) + zstd.compress(records[999:]))  # two frames
    ((span,),) = parts([(path, 9)], "by name", 10**6)
    assert list(documents(span, "text")) == [text.encode() for text in TEXTS]
    path.write_bytes(zstd.compress(records)[:-9])
    with pytest.raises(ValueError, match=r"a\.jsonl\.zst: Compressed file ended before"):
        list(documents(span, "text"))


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [*TEXTS, None, ""], "n": list(range(302))})
    parquet.write_table(table, path, row_group_size=70)
    ((span,),) = parts([(path, 9)], "by name", 10**6)
    assert list(documents(span, "text")) == [text.encode() for text in TEXTS]
    with pytest.raises(ValueError, match=r"a\.parquet: field: expected one of its columns text, n, got 'body'"):
        list(documents(span, "body"))
    with pytest.raises(ValueError, match=r"a\.parquet: n: expected text, got int"):
        list(documents(span, "n"))


@pytest.mark.parametrize(
    ("name", "module", "text"),
    [("a.parquet", "pyarrow", "pip install pyarrow"), ("a.jsonl.zst", "backports", "pip install backports.zstd")],
)
def test_what_is_not_installed_is_named(folder, monkeypatch, name, module, text):
    for missing in (module, module + ".parquet", module + ".zstd", "compression"):
        monkeypatch.setitem(sys.modules, missing, None)
    (folder / name).write_bytes(b"whatever")
    with pytest.raises(ImportError, match=text):
        tokenize([name], "out")
    assert sorted(p.name for p in (folder / "out").iterdir()) == ["plan.json"]


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl: byte 14: expected a JSON object with 'text', got"),
        ("a.jsonl", b'{"body": "a"}', r"a\.jsonl: byte 0: expected a JSON object with 'text', got '\{\"body"),
        ("a.jsonl", b"[1]", r"a\.jsonl: byte 0: expected a JSON object"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl: byte 0: text: expected text, got int"),
        ("a.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], r"a\.txt\.gz: Compressed file ended before"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz: Not a gzipped file"),
        ("a.txt.xz", lzma.compress(b"text" * 99)[:-9], r"a\.txt\.xz: Compressed file ended before"),
        ("a.txt.bz2", bz2.compress(b"text" * 99)[:-9], r"a\.txt\.bz2: Compressed file ended before"),
        ("a.txt", b"\xff\xfe", r"data: expected UTF-8 text to train on, found none in a\.txt"),
        ("a.txt", b"", r"data: expected text, found none in a\.txt"),
    ],
)
def test_damaged_files_are_named(folder, name, content, text):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=text):
        tokenize([name], "out")
    assert not (folder / "out" / "manifest.json").exists()
