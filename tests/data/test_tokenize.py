"""From files to tokens: formats, workers, kills at any moment, and the commands that use what comes out."""

import bz2
import gzip
import json
import lzma
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fastdiff import cli
from fastdiff.data.documents import documents, parts
from fastdiff.data.shards import Shards, TokenFolder, alone, is_held_out
from fastdiff.data.texts import Bytes, load_tokenizer, tokens_of
from fastdiff.data.tokenizing import tokenize
from fastdiff.loading import load

WORDS = ["sea", "ship", "ümlaut", "north", "wind", "\N{SNOWMAN}", "harbour"]
TEXTS = [" ".join(random.Random(k).choices(WORDS, k=5 + k % 40)) + f" {k}" for k in range(300)]
EOS = "<|endoftext|>"


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """A tokenizer.json, byte-level BPE as GPT-2's, trained on the texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(7)  # which a tokenizer.json may hold, and which must not count
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with the texts as JSONL."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    write_jsonl(tmp_path / "texts.jsonl", TEXTS)
    return tmp_path


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"id": k, "text": text}) + "\n" for k, text in enumerate(texts)))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def written(folder: Path) -> tuple[list[bytes], list[bytes]]:
    """Documents of bytes: to train on, and held out."""
    tokens = TokenFolder(folder)
    both = (tokens.train, tokens.held_out)
    return tuple([s.document(k).astype(np.uint8).tobytes() for k in range(s.num_documents)] for s in both)


# -- documents in files ----------------------------------------------------------------------------------


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


# -- tokens ----------------------------------------------------------------------------------------------


def test_bytes(folder):
    tokens = tokenize(["texts.jsonl"], "out", held_out=0.2, shard_bytes=3000)
    assert len(tokens.shards) > 5
    train, held_out = written(folder / "out")
    assert train == [text.encode() for text in TEXTS if not is_held_out(text.encode(), 0.2)]
    assert held_out == [text.encode() for text in TEXTS if is_held_out(text.encode(), 0.2)]
    assert list(tokens.held_out_documents(2**20)) == held_out


@pytest.mark.parametrize("eos", [EOS, None])
def test_tokens_of_a_tokenizer(folder, bpe, eos):
    tokens = tokenize(["texts.jsonl"], "out", bpe, eos=eos, held_out=0.2, shard_bytes=3000)
    assert tokens.settings["num_tokens"] == 300
    assert tokens.settings["eos"] == (None if eos is None else 0)
    own = load_tokenizer(str(folder / "out" / "tokenizer"))
    for stream, side in ((tokens.train, False), (tokens.held_out, True)):
        wanted = [tokens_of(own, d).ids for d in (t.encode() for t in TEXTS) if is_held_out(d, 0.2) == side]
        assert stream.num_documents == len(wanted)
        assert stream.read(0, stream.size).tolist() == torch.cat(wanted).tolist()
        assert stream.document(3).tolist() == wanted[3].tolist()
        assert len(wanted[3]) > 8  # not truncated


def test_a_tokenizer_of_python(folder):
    """One that is no `tokenizers` file, without an EOS of its own but with ids beyond its length."""
    transformers = pytest.importorskip("transformers")
    transformers.ByT5Tokenizer().save_pretrained("byt5")
    tokens = tokenize(["texts.jsonl"], "out", "byt5", held_out=0.2)
    first = next(text for text in TEXTS if not is_held_out(text.encode(), 0.2))
    assert tokens.train.document(0).tolist() == [byte + 3 for byte in first.encode()] + [1]


def test_folders_compressed_files_and_what_is_no_text(folder):
    data = folder / "data"
    (data / "sub").mkdir(parents=True)
    (data / "a.txt").write_text("first")
    (data / "b.txt.gz").write_bytes(gzip.compress(b"second"))
    (data / "sub" / "c.jsonl").write_text('{"text": "third"}\n{"text": "\\ud800"}\n')
    (data / "image.png").write_bytes(b"\x89PNG\xff")
    (data / ".hidden").write_text("no")
    (data / "empty").touch()
    for _ in range(2):  # its own folder, there already the second time, is no data
        with pytest.warns(UserWarning, match="data: 2 documents that are not UTF-8 text are left out"):
            tokenize([data, data / "a.txt"], data / "out", held_out=0)
        assert written(data / "out") == ([b"first", b"second", b"third"], [])


def test_added_documents_keep_sides(folder):
    write_jsonl(folder / "more.jsonl", [*TEXTS[::7], *(f"another text, {k}" for k in range(200))])
    tokenize(["texts.jsonl"], "before", held_out=0.2)
    tokenize(["more.jsonl", "texts.jsonl"], "after", held_out=0.2)
    (train, held_out), (more_train, more_held_out) = written(folder / "before"), written(folder / "after")
    assert set(train) < set(more_train)
    assert set(held_out) < set(more_held_out)
    assert not set(more_train) & set(more_held_out)  # and duplicates are on one side


# -- workers and kills -----------------------------------------------------------------------------------


def test_workers_do_not_count(folder, bpe):
    for out, workers in (("one", 1), ("two", 2)):
        tokenize(["texts.jsonl"], out, bpe, held_out=0.2, shard_bytes=2000, workers=workers)
    assert contents(folder / "one") == contents(folder / "two")
    assert "00005/train.npy" in contents(folder / "one")


COMMAND = "tokenize --data texts.jsonl --tokenizer {} --held-out 0.2 --shard-bytes 40000 --out {} --workers {}"


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


@pytest.mark.parametrize("change", ["data", "held_out", "tokenizer", "shard_bytes", "eos"])
def test_a_folder_is_of_one_plan(folder, bpe, change):
    tokenize(["texts.jsonl"], "out", bpe)
    before = contents(folder / "out")
    names = {"held_out": "settings", "tokenizer": "settings", "eos": "settings", "data": "files"}
    options = {"held_out": 0.5, "shard_bytes": 99, "eos": EOS, "tokenizer": "bytes"}
    if change == "data":
        (folder / "texts.jsonl").write_text('{"text": "other"}')
    more = {change: options[change]} if change in options else {}
    with pytest.raises(ValueError, match=f"out: out was begun with other {names.get(change, change)}; choose another"):
        tokenize(["texts.jsonl"], "out", **({"tokenizer": bpe} | more))
    assert contents(folder / "out") == before


def test_a_folder_without_a_shard_may_be_begun_again(folder, bpe):
    with pytest.raises(ValueError, match="expected a JSON object with 'body'"):
        tokenize(["texts.jsonl"], "out", bpe, field="body")
    tokenize(["texts.jsonl"], "out", bpe, eos=EOS)
    tokenize(["texts.jsonl"], "other", bpe, eos=EOS)
    assert contents(folder / "out") == contents(folder / "other")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"held_out": 1.0}, r"held_out: expected a share in \[0, 1\), got 1.0"),
        ({"workers": 0}, "workers: expected at least 1, got 0"),
        ({"shard_bytes": 0}, "shard_bytes: expected at least 1, got 0"),
        ({"format": "csv"}, "format: expected one of 'by name', 'text', 'lines', 'jsonl', 'parquet', got 'csv'"),
        ({"tokenizer": "nowhere.json"}, r"tokenizer: found none in nowhere\.json"),
        ({"tokenizer": "./nowhere"}, r"tokenizer: found none in \./nowhere"),
        ({"eos": "<eos>"}, "eos: expected none, for bytes have none, got '<eos>'"),
    ],
)
def test_bad_options(folder, options, text):
    with pytest.raises(ValueError, match=text):
        tokenize(["texts.jsonl"], "out", **options)


def test_an_end_that_is_no_token(folder, bpe):
    with pytest.raises(ValueError, match=r"eos: expected a token of \S+, got '<eos>'"):
        tokenize(["texts.jsonl"], "out", bpe, eos="<eos>")


# -- commands --------------------------------------------------------------------------------------------


def invoke(command: str, *more: str) -> str:
    result = CliRunner().invoke(cli.app, [*command.split(), *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


SMALL = "--length 16 --dim 16 --depth 1 --heads 2 --batch-size 4 --warmup 2 --eval-sequences 4 --eval-samples 8"


@pytest.mark.parametrize("of", ["bytes", "bpe"])
def test_end_to_end(folder, bpe, of):
    tokenizer = f"--tokenizer {bpe} --eos {EOS}" if of == "bpe" else ""
    shown = invoke(f"tokenize --data texts.jsonl --out tokens --held-out 0.2 --workers 1 {tokenizer}")
    assert "of 300 documents" not in shown
    assert f"{TokenFolder('tokens').train.size:,} tokens" in shown
    assert "as they were written" in invoke("tokenize --check --out tokens")
    shown = invoke(f"train --data tokens --out run --steps 4 --eval-every 2 {SMALL}")
    assert f"held-out bits per {'token' if of == 'bpe' else 'byte'}" in shown
    invoke("train --out run --resume --steps 6")

    shutil.copytree("tokens", "elsewhere")
    Path("run").rename("moved")  # the run has all that it needs
    invoke("eval moved --data elsewhere --num-samples 8 --num-sequences 4 --json out.json")
    (row,) = json.loads((folder / "out.json").read_text()).values()
    assert row["pieces"] == 4
    assert row["tokens"] == 64
    assert row["bytes"] == 64 if of == "bytes" else row["bytes"] > 80
    assert "the wind" in invoke("sample moved --steps 4 --length 12 --prompt", "the wind")
    loaded = load("moved", torch.device("cpu"))
    assert isinstance(loaded.tokenizer, Bytes) == (of == "bytes")
    if of == "bpe":
        for file in Path("moved", "tokenizer").iterdir():
            file.write_text(file.read_text() + " ")
        with pytest.raises(ValueError, match="moved/tokenizer: not the tokenizer that this run was trained with"):
            load("moved", torch.device("cpu"))


def test_eval_of_a_folder_that_has_changed(folder):
    invoke("tokenize --data texts.jsonl --out tokens --held-out 0.2 --workers 1")
    invoke(f"train --data tokens --out run --steps 2 --eval-every 0 {SMALL}")
    shutil.rmtree("tokens")
    invoke("tokenize --data texts.jsonl --out tokens --held-out 0.3 --workers 1")
    with pytest.raises(ValueError, match="tokens has changed since run was trained on it"):
        invoke("eval run")
