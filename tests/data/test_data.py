import argparse
import hashlib
import os
import random
import socket

import pytest
import torch

from fastdiff.data import Table, Text, decode, encode, load_documents
from fastdiff.data.sources import as_bytes, even_windows

DOCUMENTS = [random.Random(d).randbytes(100) for d in range(40)]  # no 4 bytes occur twice
TOKENS = torch.tensor([[0, 1], [2, 3], [4, 5]])


def grams(windows: torch.Tensor, n: int = 8) -> set[bytes]:
    return {bytes(row[i : i + n].tolist()) for row in windows for i in range(len(row) - n + 1)}


def test_sequences_are_windows_of_the_text_and_functions_of_the_index():
    source = Text(DOCUMENTS, 16, seed=3)
    found = source.sequences(7, 12)
    assert found.shape == (5, 16)
    assert found.dtype == torch.int64
    text = bytes(source.train_bytes.tolist())
    assert all(bytes(row.tolist()) in text for row in found)
    assert torch.equal(found, Text(DOCUMENTS, 16, seed=3).sequences(7, 12))
    assert torch.equal(found[1:3], source.sequences(8, 10))
    assert not torch.equal(found, source.sequences(12, 17))
    assert not torch.equal(found, Text(DOCUMENTS, 16, seed=4).sequences(7, 12))
    assert source.sequences(7, 7).shape == (0, 16)


@pytest.mark.parametrize("far", [2**24, 2**32, 2**56, 2**63 - 11])
def test_far_sequences_are_others(far):
    for source in (Text(DOCUMENTS, 16), Table(torch.arange(10_000).view(-1, 1), num_tokens=10_000)):
        there = source.sequences(far, far + 10)
        assert torch.equal(there[3:5], source.sequences(far + 3, far + 5))
        assert (there == source.sequences(0, 10)).all(1).sum() == 0


@pytest.mark.parametrize("source", [Text(DOCUMENTS, 16), Table(TOKENS, num_tokens=6)])
def test_bad_indices(source):
    with pytest.raises(ValueError, match="start: expected at least 0, got -1"):
        source.sequences(-1, 2)
    with pytest.raises(ValueError, match="stop: expected at least 3, got 2"):
        source.sequences(3, 2)


def test_every_window_can_be_drawn():
    source = Text([bytes(range(200))], 8, held_out=0.1)  # 180 bytes to train on: 173 windows
    starts = source.sequences(0, 4000)[:, 0]
    assert starts.min() == 0
    assert starts.max() == 172


class Vast:
    """A text of so many bytes that asks for no memory: what it gives are the places asked for."""

    device = torch.device("cpu")

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, places: torch.Tensor) -> torch.Tensor:
        return places


@pytest.mark.parametrize("starts", [173, 3 * 2**30, 2**32, 5 * 2**32, 2**40 + 1, 2**62])
def test_windows_of_a_text_of_any_size_are_drawn_everywhere(starts):
    source = Text(DOCUMENTS, 8)
    source.train_bytes = Vast(starts + 7)
    drawn = source.sequences(0, 20_000)[:, 0]
    assert drawn.min() >= 0
    assert drawn.max() < starts
    assert (torch.histc(drawn.double() / starts, 10, 0, 1) / 2000 - 1).abs().max() < 0.12
    assert (drawn % 2).double().mean().item() == pytest.approx(0.5, abs=0.02)  # between those that 32 bits reach, too


def test_the_last_window_of_a_vast_text_can_be_drawn(monkeypatch):
    source = Text(DOCUMENTS, 8)
    source.train_bytes = Vast(5 * 2**32 + 7)
    for draw, start in ((0, 0), (2**32 - 1, 5 * 2**32 - 1)):
        monkeypatch.setattr("fastdiff.data.sources.draw32", lambda *names, draw=draw: torch.full((2, 1), draw))
        assert source.sequences(0, 1)[0].tolist() == list(range(start, start + 8))


@pytest.mark.parametrize("documents", [DOCUMENTS, DOCUMENTS[:3], DOCUMENTS[:1]], ids=["many", "few", "one"])
def test_split_does_not_leak(documents):
    source = Text(documents, 4, held_out=0.25)
    train, validation = bytes(source.train_bytes.tolist()), bytes(source.validation_bytes.tolist())
    assert sorted(train + validation) == sorted(b"".join(documents))
    assert 0.2 <= len(validation) / sum(map(len, documents)) <= 0.3
    drawn, held_out = source.sequences(0, 20_000), source.validation(1000)
    assert len(grams(drawn, 4)) > 0.9 * (len(train) - 4 * len(documents))
    assert not grams(drawn, 4) & grams(held_out, 4)


def test_duplicates_do_not_leak():
    again = [d for d in DOCUMENTS for _ in range(3)]
    once, thrice = Text(DOCUMENTS, 16), Text(again, 16)
    assert torch.equal(once.train_bytes, thrice.train_bytes)
    assert torch.equal(once.validation_bytes, thrice.validation_bytes)


def test_content_decides_the_split():
    source, turned = Text(DOCUMENTS, 16), Text(DOCUMENTS[::-1], 16)
    assert sorted(source.validation_bytes.tolist()) == sorted(turned.validation_bytes.tolist())
    first = min(DOCUMENTS, key=lambda d: hashlib.sha256(d).digest())
    assert first in bytes(source.validation_bytes.tolist())


def test_one_file_gives_up_its_tail():
    source = Text([bytes(range(200))], 8, held_out=0.1)
    assert source.validation_bytes.tolist() == list(range(180, 200))
    assert source.validation(99)[:, 0].tolist() == [180, 188]


def test_validation_windows_are_disjoint_and_spread():
    text = torch.arange(100, dtype=torch.uint8)
    assert even_windows(text, 10, 99)[:, 0].tolist() == list(range(0, 100, 10))
    assert even_windows(text, 10, 3)[:, 0].tolist() == [0, 30, 60]
    with pytest.raises(ValueError, match="n: expected at least 1 window, got 0"):
        even_windows(text, 10, 0)


@pytest.mark.parametrize(
    ("documents", "length", "held_out", "text"),
    [
        ([], 8, 0.1, "documents: expected text, got none"),
        ([b"", b""], 8, 0.1, "documents: expected text, got none"),
        ([b"short"], 8, 0.1, "length: expected at most the 5 bytes of the training text, got 8"),
        ([b"x" * 100], 8, 0.05, "length: expected at most the 5 bytes of the held-out text, got 8"),
        (DOCUMENTS, 0, 0.1, "length: expected at least 1, got 0"),
        (DOCUMENTS, 8, 1.0, r"held_out: expected a share in \(0, 1\), got 1.0"),
    ],
)
def test_bad_text(documents, length, held_out, text):
    with pytest.raises(ValueError, match=text):
        Text(documents, length, held_out=held_out)


def test_too_short_whole_text():
    with pytest.raises(ValueError, match="length: expected at most the 4 bytes of the whole text, got 5"):
        as_bytes([b"ab", b"cd"], 5)


def test_files_and_folders(tmp_path):
    (tmp_path / "b.txt").write_bytes(b"second")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.md").write_text("fïrst")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("no")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / "zeros.bin").write_bytes(b"a\0b")
    with pytest.warns(
        UserWarning, match=r"data: of 4 files in \S+, 2 that are not UTF-8 text and 0 that are not regular"
    ):
        assert load_documents(tmp_path) == ["fïrst".encode(), b"second"]
    assert load_documents(str(tmp_path / "b.txt")) == [b"second"]


def test_what_is_no_regular_file_is_left_out_and_counted(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "broken.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")  # to read it would be to wait for ever
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        with pytest.warns(
            UserWarning, match=r"of 5 files in \S+, 0 that are not UTF-8 text and 3 that are not regular"
        ):
            assert load_documents(tmp_path) == [b"text", b"text"]
    with pytest.raises(ValueError, match="data: expected UTF-8 text, found none in"):
        load_documents(tmp_path / "pipe")


def test_runs_are_not_text(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for run in ("runs/own", "runs/other"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "config.json").write_text("{}")
    (tmp_path / "runs" / "other" / "metrics.jsonl").touch()
    assert load_documents(tmp_path, tmp_path / "runs" / "own") == [b"text"]
    assert load_documents(tmp_path, tmp_path / "runs" / "new") == [b"text", b"{}"]
    assert load_documents(tmp_path / "runs" / "own", tmp_path / "runs") == [b"{}"]
    with pytest.raises(ValueError, match="data: expected text from elsewhere than the run's own folder"):
        load_documents(tmp_path, tmp_path / "runs" / "..")


def test_fingerprints_tell_what_is_drawn_and_held_out():
    documents = [bytes(range(200))]
    texts = [
        Text(documents, 8),
        Text(documents, 9),
        Text(documents, 8, seed=1),
        Text(documents, 8, held_out=0.1),
        Text([*documents, b"x" * 200], 8),
    ]
    rows = torch.tensor([[0, 1], [1, 0]])
    tables = [
        Table(rows, num_tokens=2),
        Table(rows, num_tokens=3),
        Table(rows.flip(0), num_tokens=2),
        Table(rows.view(1, 4), num_tokens=2),
        Table(rows, num_tokens=2, seed=1),
        Table(rows, num_tokens=2, held_out=rows),
        Table(rows, num_tokens=2, probs=torch.tensor([1.0, 2.0])),
    ]
    assert len({source.fingerprint for source in (*texts, *tables)}) == 12
    assert Text(documents * 2, 8).fingerprint == texts[0].fingerprint
    assert Table(rows.int(), num_tokens=2, probs=torch.tensor([2.0, 2.0])).fingerprint == tables[0].fingerprint


def test_missing_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="data: expected 'stdlib', a text file or a folder"):
        load_documents(tmp_path / "nowhere.txt")
    with pytest.raises(FileNotFoundError, match="there is no ''"):
        load_documents("")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "random.bin").write_bytes(b"\x89\xff")
    for nothing in (tmp_path, tmp_path / "empty.txt", tmp_path / "random.bin"):
        with pytest.raises(ValueError, match="data: expected UTF-8 text, found none in"):
            load_documents(nothing)


def test_standard_library():
    documents = load_documents("stdlib")
    assert len(b"".join(documents)) > 3_000_000
    with open(argparse.__file__, "rb") as file:
        assert file.read() in documents
    assert any(d.startswith(b"The standard type hierarchy") for d in documents)  # a documentation topic
    assert load_documents("stdlib") == documents


def test_standard_library_leaves_out_tests_and_packages(tmp_path, monkeypatch):
    wanted = ["abc.py", "json/decoder.py"]
    for name in [
        *wanted,
        "test/a.py",
        "json/tests/b.py",
        "site-packages/c.py",
        "pydoc_data/topics.py",
        "d.txt",
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    documents = load_documents("stdlib")
    assert documents[:2] == [name.encode() for name in wanted]
    assert all(len(d) > 100 for d in documents[2:])  # the topics


def test_encode_decode():
    assert encode("aé").tolist() == [97, 195, 169]
    assert decode(encode("naïve ✓")) == "naïve ✓"
    assert decode(torch.tensor([97, 195])) == "a�"


def test_table_draws_by_probability():
    source = Table(TOKENS, num_tokens=6, probs=torch.tensor([2.0, 0.0, 6.0]), seed=1)
    drawn = source.sequences(0, 4000)
    assert set(map(tuple, drawn.tolist())) == {(0, 1), (4, 5)}
    assert abs((drawn[:, 0] == 0).double().mean().item() - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert torch.equal(drawn[:10], source.sequences(0, 10))
    assert not torch.equal(drawn, source.sequences(4000, 8000))
    assert set(Table(TOKENS, num_tokens=6).sequences(0, 100)[:, 0].tolist()) == {0, 2, 4}


def test_table_validation():
    assert torch.equal(Table(TOKENS, num_tokens=6, held_out=TOKENS[1:]).validation(1), TOKENS[1:2])
    with pytest.raises(ValueError, match="held_out: expected validation sequences"):
        Table(TOKENS, num_tokens=6).validation(1)


@pytest.mark.parametrize(
    ("tokens", "changes", "error", "text"),
    [
        (TOKENS.float(), {}, TypeError, "tokens: expected int64 or int32"),
        (TOKENS[0], {}, ValueError, r"tokens: expected shape \[N, L\]"),
        (TOKENS[:0], {}, ValueError, r"tokens: expected shape \[N, L\]"),
        (TOKENS, {"num_tokens": 5}, ValueError, r"tokens: expected ids in \[0, 5\), got 0 to 5"),
        (TOKENS, {"held_out": TOKENS - 1}, ValueError, r"held_out: expected ids in \[0, 6\), got -1 to 4"),
        (TOKENS, {"probs": torch.ones(2)}, ValueError, "probs: expected 3 numbers"),
        (TOKENS, {"probs": torch.tensor([1.0, -1.0, 1.0])}, ValueError, "probs: expected 3 numbers"),
        (TOKENS, {"probs": torch.zeros(3)}, ValueError, "probs: expected 3 numbers"),
        (TOKENS, {"probs": torch.tensor([1.0, torch.inf, 1.0])}, ValueError, "probs: expected 3 numbers"),
    ],
)
def test_bad_table(tokens, changes, error, text):
    with pytest.raises(error, match=text):
        Table(tokens, **({"num_tokens": 6} | changes))
