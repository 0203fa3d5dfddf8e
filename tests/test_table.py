"""`fastdiff table`: numbers of `fastdiff eval`, beside published ones, and that nothing done is lost."""

import json
import re

import pytest
from test_likelihood import TEXT, invoke, published, rows, tokenizer_folder  # noqa: F401
from typer.testing import CliRunner

from fastdiff import cli
from fastdiff.loading import Loaded

COMMAND = "table table.json --json out.json --markdown out.md"


@pytest.fixture
def asked(published, tmp_path):  # noqa: F811
    """A table of one model, twice, on two texts, and what is asked in it."""
    mask_index = int(published.split()[3])
    (tmp_path / "other.txt").write_text(TEXT[100:])
    model = dict(model="mdlm:mdlm", mask_index=mask_index)
    asked = dict(
        num_samples=8,
        texts={"WikiText2": dict(data=["text.txt"]), "PTB": dict(data=["text.txt", "other.txt"], cut="documents")},
        models={
            "free": dict(model, published="SEDD Absorb small"),
            "integral": dict(model, likelihood="integral", num_samples=6, published={"PTB": 7.5}),
        },
    )
    (tmp_path / "table.json").write_text(json.dumps(asked))
    return asked


def test_cells_are_those_of_eval(asked, tmp_path):
    shown = invoke(COMMAND)
    found, mask_index = rows(), asked["models"]["free"]["mask_index"]
    for name, kind, num_samples in (("free", "time-free", 8), ("integral", "integral", 6)):
        assert found[name]["texts"]["WikiText2"]["likelihood"] == kind
        scored = f"mdlm:mdlm --mask-index {mask_index} --data text.txt"
        invoke(f"eval {scored} --num-samples {num_samples} --likelihood {kind} --json e.json")
        (expected,) = rows("e.json").values()
        cell = found[name]["texts"]["WikiText2"]
        assert {key: cell[key] for key in expected} == expected
    assert found["free"]["texts"]["WikiText2"]["published"] == 41.84
    assert found["integral"]["texts"]["PTB"]["published"] == 7.5
    assert found["integral"]["texts"]["WikiText2"]["published"] is None
    for text in (shown, (tmp_path / "out.md").read_text()):
        assert re.search(r"free +[|│] +\d+\.\d\d ± \d+\.\d\d / 41\.84 +[|│] +\d+\.\d\d ± \d+\.\d\d / 114\.24", text)
        assert "arXiv:2310.16834" in text
        assert "integral on PTB: documents of 6 tokens, the integral over time, as published" in text


def test_a_table_that_is_killed_goes_on(asked, monkeypatch, tmp_path):
    calls, estimate = [], Loaded.estimate

    def counted(self, *arguments, **options):
        calls.append(1)
        if len(calls) > last:
            raise KeyboardInterrupt
        return estimate(self, *arguments, **options)

    monkeypatch.setattr(Loaded, "estimate", counted)
    last = 999
    invoke(COMMAND)
    whole, n = rows(), len(calls)
    (tmp_path / "out.json").unlink()
    calls.clear()
    last = n - 2
    CliRunner().invoke(cli.app, COMMAND.split())
    assert not (tmp_path / "out.json").exists()
    calls.clear()
    last = 999
    invoke(COMMAND)
    assert (rows(), len(calls)) == (whole, 2)
    assert not (tmp_path / "out.json.0").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(texts=[]), "table.json: expected an object of models and texts"),
        (dict(model={}), "table.json: expected .*; see model"),
        (dict(texts={"a": {}}), "table.json: expected .* always data; see data"),
        (
            dict(models={"a": dict(model="mdlm:mdlm", published="GPT-9")}),
            "published: expected .*SEDD Absorb small.*GPT-9",
        ),
    ],
)
def test_files_that_say_something_else(asked, tmp_path, change, message):
    asked |= change
    for said in asked["models"].values():
        said.setdefault("mask_index", 3)
    (tmp_path / "table.json").write_text(json.dumps(asked))
    with pytest.raises(ValueError, match=message):
        raise CliRunner().invoke(cli.app, COMMAND.split()).exception
