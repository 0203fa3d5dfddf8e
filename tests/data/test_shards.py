"""Folders of tokens: what is written is read, nothing held out is trained on, and damage is found."""

import json
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.data.shards import (
    Shards,
    TokenFolder,
    dtype_for,
    is_held_out,
    is_tokens,
    read_shard,
    write_manifest,
    writing,
)
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.training import TrainConfig, train

SETTINGS = {"tokenizer": {"name": "bytes", "fingerprint": "bytes"}, "num_tokens": 256, "eos": None, "held_out": 0.25}
DOCUMENTS = [random.Random(d).randbytes(random.Random(d).randrange(1, 60)) for d in range(120)]


def write(folder: Path, shards: list[list[bytes]], num_tokens: int = 256, share: float = 0.25) -> TokenFolder:
    """Documents as tokens of bytes, times num_tokens // 256."""
    told = SETTINGS | {"num_tokens": num_tokens, "held_out": share}
    for k, documents in enumerate(shards):
        with writing(folder, f"{k:05}", num_tokens, "a plan") as shard:
            for document in documents:
                tokens = np.frombuffer(document, np.uint8).astype(np.int64) * (num_tokens // 256)
                shard.add(document, tokens, is_held_out(document, share))
    names = [f"{k:05}" for k in range(len(shards))]
    write_manifest(folder, told, [["somewhere", 1]], {name: read_shard(folder / name, "a plan") for name in names})
    return TokenFolder(folder)


def sides(documents: list[bytes], share: float = 0.25) -> tuple[bytes, bytes]:
    train, held_out = ([d for d in documents if is_held_out(d, share) == side] for side in (False, True))
    return b"".join(train), b"".join(held_out)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, [DOCUMENTS[:50], [], DOCUMENTS[50:51], DOCUMENTS[51:]])
    return tmp_path


# -- what is read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_tokens", [256, 2**9, 2**16, 2**18])
def test_streams_are_the_documents(tmp_path, num_tokens):
    tokens = write(tmp_path, [DOCUMENTS[:50], [], DOCUMENTS[50:]], num_tokens)
    for stream, text in zip((tokens.train, tokens.held_out), sides(DOCUMENTS), strict=True):
        wanted = np.frombuffer(text, np.uint8).astype(np.int64) * (num_tokens // 256)
        assert stream.read(0, stream.size).tolist() == wanted.tolist()
        assert stream.read(7, 150).tolist() == wanted[7:150].tolist()
    held_out = [d for d in DOCUMENTS if is_held_out(d, 0.25)]
    assert list(tokens.held_out_documents(2**20)) == held_out
    assert [tokens.held_out.document(k).tolist() for k in (0, len(held_out) - 1)] == [
        [byte * (num_tokens // 256) for byte in document] for document in (held_out[0], held_out[-1])
    ]
    array = np.load(tmp_path / "00000" / "train.npy", mmap_mode="r")  # as anyone would
    assert array.dtype == dtype_for(num_tokens)


def test_held_out_documents_are_spread_where_there_are_many(folder):
    tokens = TokenFolder(folder)
    every = list(tokens.held_out_documents(2**20))
    assert list(tokens.held_out_documents(tokens.text.size // 2 + 1)) == every[::2]


@pytest.mark.parametrize("length", [1, 7, 64])
def test_each_window_is_seen_once_an_epoch(folder, length):
    source = Shards(folder, length, seed=3)
    text, _ = sides(DOCUMENTS)
    cut = [text[i : i + length] for i in range(0, len(text) - length + 1, length)]
    n = source.num_windows
    assert n == len(cut)
    epochs = [[bytes(row) for row in source.sequences(k * n, (k + 1) * n).tolist()] for k in range(3)]
    assert all(sorted(epoch) == sorted(cut) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != cut


def test_sequences_are_functions_of_the_index_alone(folder):
    source = Shards(folder, 16, seed=3)
    n = source.num_windows
    found = source.sequences(n - 5, n + 5)  # over the end of an epoch
    assert found.shape == (10, 16)
    assert found.dtype == torch.int64
    assert torch.equal(found[3:7], Shards(folder, 16, seed=3).sequences(n - 2, n + 2))
    assert not torch.equal(found, Shards(folder, 16, seed=4).sequences(n - 5, n + 5))
    assert source.sequences(4, 4).shape == (0, 16)
    far = 2**62 // n * n
    assert len({tuple(row) for row in source.sequences(far, far + n).tolist()}) == n
    with pytest.raises(ValueError, match="stop: expected at least 3, got 2"):
        source.sequences(3, 2)


def test_validation_is_of_held_out_documents_evenly_spread(folder):
    source = Shards(folder, 16)
    _, text = sides(DOCUMENTS)
    available = len(text) // 16
    every = [bytes(row) for row in source.validation(10**9).tolist()]
    assert every == [text[i * 16 : i * 16 + 16] for i in range(available)]
    assert [bytes(row) for row in source.validation(3).tolist()] == [every[k * available // 3] for k in range(3)]
    with pytest.raises(ValueError, match="n: expected at least 1, got 0"):
        source.validation(0)


def test_opening_reads_no_tokens(folder, monkeypatch):
    monkeypatch.setattr(np, "load", None)
    source = Shards(folder, 16)
    assert source.fingerprint != Shards(folder, 17).fingerprint != Shards(folder, 16, seed=1).fingerprint


def test_a_shard_of_more_than_32_bits(tmp_path):
    """A sparse file of 2^34 tokens behind an ordinary shard, with a mark at its end."""
    vast, length = 2**34, 1000
    write(tmp_path, [DOCUMENTS, DOCUMENTS], 2**16)
    with (tmp_path / "00001" / "train.npy").open("r+b") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (vast,)})
        file.truncate(128 + 2 * vast)
        file.seek(128 + 2 * (vast - 3))
        file.write(np.array([7, 8, 9], "<u2").tobytes())
    told = {name: read_shard(tmp_path / name, "a plan") for name in NAMES}
    told["00001"]["sizes"]["train.npy"] = vast
    write_manifest(tmp_path, SETTINGS | {"num_tokens": 2**16}, [], told)
    source = Shards(tmp_path, length)
    stream = source.tokens.train
    assert stream.read(stream.size - 4, stream.size).tolist() == [0, 7, 8, 9]
    last = source.tokens.train.windows(torch.tensor([source.num_windows - 1]), length)
    assert last[0].tolist() == stream.read((source.num_windows - 1) * length, source.num_windows * length).tolist()
    assert source.num_windows == stream.size // length > 2**24
    assert source.sequences(2**40, 2**40 + 4).shape == (4, length)


# -- what is held out ------------------------------------------------------------------------------------


documents = st.lists(st.binary(min_size=8, max_size=40), min_size=1, max_size=60)


@settings(deadline=None, max_examples=30)
@given(documents, st.integers(1, 9), st.integers(0, 2**32))
def test_nothing_held_out_is_trained_on(tmp_path_factory, found, length, seed):
    """Each document's tokens are all its own number, so that a window shows whose they are."""
    folder = tmp_path_factory.mktemp("tokens")
    with writing(folder, "00000", 1000, "a plan") as one, writing(folder, "00001", 1000, "a plan") as two:
        for k, document in enumerate(found):
            tokens = np.full(len(document), k)
            (one, two)[k * 2 // len(found)].add(document, tokens, is_held_out(document, 0.5))
    write_manifest(
        folder, SETTINGS | {"num_tokens": 1000}, [], {name: read_shard(folder / name, "a plan") for name in NAMES}
    )
    tokens, held_out = TokenFolder(folder), {k for k, d in enumerate(found) if is_held_out(d, 0.5)}
    if tokens.train.size >= length:
        source = Shards(folder, length, seed=seed)
        seen = set(source.sequences(0, 2 * source.num_windows).unique().tolist())
        assert not seen & held_out
    if tokens.held_out.size >= length and tokens.train.size >= length:
        assert set(source.validation(10**6).unique().tolist()) <= held_out


NAMES = ("00000", "00001")


@given(st.binary(max_size=30), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_share_holds_out_more(document, a, b):
    assert is_held_out(document, min(a, b)) <= is_held_out(document, max(a, b))
    assert not is_held_out(document, 0)
    assert is_held_out(document, 1)


def test_the_share_is_what_was_asked_for():
    n = 20_000
    count = sum(is_held_out(str(k).encode(), 0.03) for k in range(n))
    assert abs(count / n - 0.03) < 4 * (0.03 * 0.97 / n) ** 0.5


# -- bad input -------------------------------------------------------------------------------------------


def test_lengths_that_do_not_fit(folder):
    train, held_out = map(len, sides(DOCUMENTS))
    with pytest.raises(
        ValueError, match=f"length: expected at most the {train} tokens of the training text, got 10000"
    ):
        Shards(folder, 10_000)
    source = Shards(folder, held_out + 1)
    with pytest.raises(ValueError, match=f"length: expected at most the {held_out} tokens of the held-out text"):
        source.validation(3)
    with pytest.raises(ValueError, match="length: expected at least 1, got 0"):
        Shards(folder, 0)


@pytest.mark.parametrize("array", ["train", "held_out", "text", "train_ends", "held_out_ends", "text_ends"])
def test_a_shard_cut_short_or_longer_or_missing(folder, array):
    path = folder / "00003" / f"{array}.npy"
    whole = path.read_bytes()
    for content in (whole[:-1], whole + b"x", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"{array}.npy: expected {len(whole)} bytes, got {len(content)}"):
            Shards(folder, 16)
    path.unlink()
    with pytest.raises(ValueError, match=f"{array}.npy: missing, but the manifest has it"):
        Shards(folder, 16)


def test_a_changed_byte_is_found_where_hashes_are_checked(folder):
    TokenFolder(folder).check()
    path = folder / "00003" / "train.npy"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"00003/train\.npy: not what was written: its sha256 is another"):
        TokenFolder(folder).check()


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "{}",
        lambda text: "[]",
        lambda text: text.replace('"num_tokens": 256', '"num_tokens": 300'),
        lambda text: text.replace("version 1", "version 2"),
        lambda text: re.sub(r'"train.npy": "\w{64}"', f'"train.npy": "{"0" * 64}"', text),
    ],
)
def test_a_damaged_manifest(folder, change):
    path = folder / "manifest.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=r"manifest\.json: damaged"):
        TokenFolder(folder)


def test_folders_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match="data: expected a folder of tokens, but there is no"):
        TokenFolder(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text('{"name": "a package"}')
    assert not is_tokens(tmp_path)


def test_a_shard_of_another_plan(folder):
    with pytest.raises(ValueError, match="00000: a shard of other files, or of another tokenizer or share"):
        read_shard(folder / "00000", "another plan")
    (folder / "00000" / "shard.json").write_text("{")
    with pytest.raises(ValueError, match=r"00000/shard\.json: missing or damaged"):
        read_shard(folder / "00000", "a plan")


@pytest.mark.parametrize("tokens", [[0, 300], [-1, 2], [256]])
def test_ids_past_the_vocabulary_are_not_written(tmp_path, tokens):
    with (
        pytest.raises(ValueError, match=r"tokenizer: expected ids in \[0, 256\), got"),
        writing(tmp_path, "00000", 256, "a plan") as shard,
    ):
        shard.add(b"ab", np.array(tokens), False)
    assert os.listdir(tmp_path) == []


# -- training --------------------------------------------------------------------------------------------


def test_train_reads_it(folder):
    model = DiffusionTransformer(ModelConfig(num_states=257, max_length=8, dim=16, depth=1, heads=2))
    config = TrainConfig(steps=3, batch_size=4, eval_every=3, eval_sequences=4, eval_samples=3)
    records = []
    train(config, model, Shards(folder, 8), callback=records.append, out=folder / "run")
    assert "bits_per_token" in records[-1]
    told = json.loads((folder / "run" / "config.json").read_text())
    assert told["source"]["fingerprint"] == Shards(folder, 8).fingerprint


def test_the_source_of_the_docs():
    """Of rows, as a dataset of Hugging Face gives them."""

    class Dataset(list):
        _fingerprint = "a hash"

    page = (Path(__file__).parents[2] / "docs" / "training_data.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class Rows" in block]
    names = {}
    exec(code, names)
    rows = Dataset({"input_ids": [k, k]} for k in range(20))
    source = names["Rows"](rows, Dataset(rows[:5]), 20)
    assert sorted(source.sequences(20, 40)[:, 0].tolist()) == list(range(20))
    assert torch.equal(source.sequences(20, 40)[3:5], source.sequences(23, 25))
    model = DiffusionTransformer(ModelConfig(num_states=21, max_length=2, dim=16, depth=1, heads=2))
    train(TrainConfig(steps=2, batch_size=4, eval_every=2, eval_sequences=4, eval_samples=3), model, source)
