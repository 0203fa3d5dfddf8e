"""From files to tokens, and the commands that use what comes out."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenized import EOS, TEXTS, contents, write_jsonl, written
from typer.testing import CliRunner

from fastdiff import cli
from fastdiff.data.shards import TokenFolder, is_held_out
from fastdiff.data.texts import Bytes, load_tokenizer, tokens_of
from fastdiff.data.tokenizing import tokenize
from fastdiff.loading import load


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
