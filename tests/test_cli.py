import builtins
import importlib.metadata
import json
import math
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fastdiff import backends, cli, data, sample
from fastdiff.generation.block_cache import BlockCache
from fastdiff.model import DiffusionTransformer
from fastdiff.noise.blocks import block_causal

SMALL = "--length 16 --dim 16 --depth 1 --heads 2 --batch-size 4 --steps 4 --warmup 2"
EVALUATION = "--eval-every 2 --eval-sequences 4 --eval-samples 15"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to work in, with a text of 2000 bytes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    (tmp_path / "text.txt").write_text("".join(f"line {i} of the text\n" for i in range(100)))
    return tmp_path


def invoke(command: str, *more: str) -> str:
    result = CliRunner().invoke(cli.app, [*command.split(), *more], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def fail(capsys, monkeypatch, command: str) -> str:
    """Run as the installed command would, expect exit code 2 and one line on stderr, which is returned."""
    monkeypatch.setattr(sys, "argv", ["fastdiff", *command.split()])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("fastdiff: ")
    assert error.count("\n") == 1
    return error


UNTIMED = {"tokens_per_second": 0, "memory": 0}


def records(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_end_to_end(folder):
    shown = invoke(f"train --data text.txt --out run {SMALL} {EVALUATION}")
    assert "training loss" in shown
    assert "held-out bits per byte" in shown
    assert [r["step"] for r in records(folder / "run")] == [1, 2, 2, 3, 4, 4]

    for proposal in ("stratified", "systematic", "uniform", "harmonic"):
        shown = invoke(f"eval run --num-samples 16 --num-sequences 4 --proposal {proposal} --json new/out.json")
        assert f"windows of 16 tokens, time-free likelihood, {proposal}" in shown
        (row,) = json.loads((folder / "new" / "out.json").read_text()).values()
        assert (row["pieces"], row["bytes"], row["tokens"], row["network_passes"]) == (4, 64, 64, 64)
        assert 7 < row["bits_per_byte"] < 8.5  # hardly trained
        for name, digits in {"nll": 1, "bits_per_byte": 4, "perplexity_per_token": 3}.items():
            low, high = row[name + "_interval"]
            assert low < row[name] < high
            assert f"{row[name]:.{digits}f}" in shown
        assert row["perplexity_per_token"] == pytest.approx(2 ** row["bits_per_byte"])
        assert row["perplexity_per_word"] == pytest.approx(math.exp(row["nll"] / row["words"]))


def test_a_run_in_blocks(folder, capsys, monkeypatch):
    """It is evaluated and sampled in its blocks, which nothing tells but the run."""
    invoke(f"train --data text.txt --out run {SMALL} --eval-every 0 --block-length 4")
    shown = invoke("eval run --num-samples 15 --num-sequences 4 --json out.json")
    assert "block by block, stratified, blocks of 4" in shown
    (row,) = json.loads((folder / "out.json").read_text()).values()
    assert (row["likelihood"], row["block_length"], row["network_passes"]) == ("block", 4, 60)
    assert row["nll_interval"] == [row["nll"]] * 2  # enumerated

    model, cache = DiffusionTransformer.from_pretrained("run"), []
    monkeypatch.setattr(DiffusionTransformer, "cache", lambda *given: cache.append(given[1:]) or BlockCache(*given))
    text = invoke("sample run --sampler random --prompt line").rstrip("\n")
    assert cache[0][:3] == (1, 4, 256)
    options = dict(length=16, prompt=torch.tensor([*b"line"]), sampler="random", block_length=4, block_causal=True)
    drawn = sample(
        (lambda xt: model.body(xt, sees=block_causal(xt.shape[1], 4)), model.lm_head), mask_index=256, **options
    )
    assert text == bytes(drawn[0].tolist()).decode(errors="replace").rstrip("\n")

    error = fail(capsys, monkeypatch, "eval run --likelihood margin")
    assert "likelihood: expected 'time-free', the only one of a block model, got 'margin'" in error
    assert "block_length: expected the block model's, 4, or None, got 8" in fail(
        capsys, monkeypatch, "sample run --block-length 8"
    )


def test_eval_of_several_texts(folder):
    invoke(f"train --data text.txt --out run {SMALL} --eval-every 0")
    (folder / "texts").mkdir()
    for name, text in {"a.txt": "x" * 40, "b.txt": "yz" * 30, "short.txt": "y"}.items():
        (folder / "texts" / name).write_text(text)
    (folder / "c.txt").write_text("z" * 16)
    invoke("eval run --data texts --data c.txt --num-samples 16 --json out.json")
    rows = json.loads((folder / "out.json").read_text())
    assert {name: row["pieces"] for name, row in rows.items()} == {"texts/a.txt": 2, "texts/b.txt": 3, "c.txt": 1}
    assert rows["c.txt"]["bits_per_byte_sd_between_pieces"] is None
    invoke("eval run --data texts --cut documents --num-samples 16 --json out.json")
    rows = json.loads((folder / "out.json").read_text())
    assert {name[6:]: row["bytes"] for name, row in rows.items()} == {"a.txt": 40, "b.txt": 60, "short.txt": 1}


def test_eval_at_a_tolerance(folder, capsys, monkeypatch):
    """Of the whole text: pilots of all four pieces, and then each anew."""
    invoke(f"train --data text.txt --out run {SMALL} --eval-every 0")

    def evaluated(more):
        invoke(f"eval run --num-samples 16 --num-sequences 4 --json out.json {more}")
        (row,) = json.loads((folder / "out.json").read_text()).values()
        low, high = row["bits_per_byte_interval"]
        return (high - low) / 2, row["network_passes"]

    half, passes = evaluated("")
    assert passes == 4 * 16
    assert evaluated("--tolerance 100") == (half, 8 * 16)
    narrow, more = evaluated(f"--tolerance {half / 3}")
    assert narrow <= half / 3
    assert more > 4 * (16 + 24 + 24)
    assert "tolerance: expected a positive number" in fail(capsys, monkeypatch, "eval run --tolerance 0")


def test_samples(folder):
    invoke(f"train --data text.txt --out run {SMALL} --eval-every 0")
    texts = invoke("sample run --num-samples 2 --steps 4 --length 9 --seed 3 --prompt", "näh")
    assert texts.count("näh") == 2
    assert texts == invoke("sample run --num-samples 2 --steps 4 --length 9 --seed 3 --prompt", "näh")


def test_samples_in_files(folder, capsys, monkeypatch):
    invoke(f"train --data text.txt --out run {SMALL} --eval-every 0")
    command = "sample run --num-samples 3 --steps 2 --length 9 --prompt line"
    texts = invoke(command)[:-1].split("\n----------\n")
    assert [text[:4] for text in texts] == ["line"] * 3
    assert invoke(f"{command} --out new/texts.jsonl") == ""
    lines = Path("new/texts.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"text": text} for text in texts]
    invoke(f"{command} --out texts.txt")
    assert Path("texts.txt").read_text() == "\n----------\n".join(texts) + "\n"
    assert "out: expected a file, but new is a folder" in fail(capsys, monkeypatch, f"{command} --out new")


def test_infill_and_how_it_came_about(folder):
    invoke(f"train --data text.txt --out run {SMALL} --eval-every 0")
    shown = invoke("sample run --sampler confidence --block-length 5 --show --infill", "ab{9}\nä{1}")
    views = [line[6:] for line in shown.split("\n")[:8]]
    assert [line[:6].strip() for line in shown.split("\n")[:8]] == ["0", "1", "3", "4", "6", "7", "9", "10"]
    assert views[0] == "ab·········↵ä·"
    assert [view.count("·") for view in views] == [10, 9, 7, 6, 4, 3, 1, 0]
    assert all(view.startswith("ab") for view in views)
    assert "\n".join(shown.split("\n")[8:]) == invoke(
        "sample run --sampler confidence --block-length 5 --infill", "ab{9}\nä{1}"
    )
    assert invoke("sample run --infill", "as it is\n") == "as it is\n\n"


@pytest.mark.parametrize("options", ["", "--top-k 1", "--top-p 1e-9", "--temperature 0"])
def test_samplers(folder, options):
    invoke(f"train --data text.txt --out run {SMALL} --eval-every 0")
    texts = {invoke(f"sample run --sampler entropy --seed {seed} {options}") for seed in range(3)}
    assert len(texts) == (1 if options else 3)


def test_resume_equals_an_unbroken_run(folder):
    invoke(f"train --data text.txt --out unbroken {SMALL} {EVALUATION}")
    invoke(f"train --data text.txt --out run {SMALL} {EVALUATION} --steps 2")
    invoke("train --out run --resume --steps 4")
    timeless = [[r | UNTIMED for r in records(folder / run)] for run in ("unbroken", "run")]
    assert timeless[0] == timeless[1]


def test_a_falling_learning_rate(folder, capsys, monkeypatch):
    schedule = "--lr-schedule cosine --lr-final 0.25"
    invoke(f"train --data text.txt --out run {SMALL} {schedule} --eval-every 0")
    assert [r["lr"] for r in records(folder / "run")] == pytest.approx([0.0005, 0.001, 0.000625, 0.00025])
    error = fail(capsys, monkeypatch, "train --out run --resume --steps 5")
    assert "steps: the run in run has 4, got 5" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_and_saves(folder, monkeypatch, number):
    sequences = data.Text.sequences

    def interrupted(self, start, stop):
        if start == 8:  # of the third step
            signal.raise_signal(number)
        return sequences(self, start, stop)

    with monkeypatch.context() as patch:
        patch.setattr(data.Text, "sequences", interrupted)
        result = CliRunner().invoke(cli.app, f"train --data text.txt --out run {SMALL} --eval-every 0".split())
    assert result.exit_code == 128 + number
    assert "stopped and saved; go on with: fastdiff train --out run --resume" in result.stderr
    invoke("train --out run --resume")
    assert [r["step"] for r in records(folder / "run")] == [1, 2, 3, 4]


@pytest.mark.parametrize("files", [1, 19])
def test_a_run_in_its_data_folder_is_no_data(folder, files):
    """Nor are other runs: 19 files would be 20 or more, which are split in another way."""
    (folder / "text.txt").rename(folder / "0.txt")
    for i in range(1, files):
        (folder / f"{i}.txt").write_text(f"another text, number {i}, " * 20)
    invoke(f"train --data . --out unbroken {SMALL} {EVALUATION}")
    invoke(f"train --data . --out runs/mine {SMALL} {EVALUATION} --steps 2")
    invoke("train --out runs/mine --resume --steps 4")
    timeless = [[r | UNTIMED for r in records(folder / run)] for run in ("unbroken", "runs/mine")]
    assert timeless[0] == timeless[1]
    numbers = set()
    for run in ("unbroken", "runs/mine"):
        invoke(f"eval {run} --num-samples 16 --num-sequences 4 --json .hidden/out.json")
        numbers.add((folder / ".hidden" / "out.json").read_text())
    assert len(numbers) == 1


def test_a_run_knows_its_data(folder, capsys, monkeypatch):
    (folder / "texts").mkdir()
    (folder / "text.txt").rename(folder / "texts" / "a.txt")
    invoke(f"train --data texts --out run {SMALL} --eval-every 0")
    files = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    invoke("eval run --num-samples 16 --num-sequences 4")
    (folder / "texts" / "b.txt").write_text("added " * 100)
    for name in ("", "--data texts"):
        assert "data: " in (error := fail(capsys, monkeypatch, f"eval run {name}"))
        assert "texts has changed since run was trained on it" in error
    other = folder / "texts" / "b.txt"
    for changed in ("", f"--data {other}"):
        error = fail(capsys, monkeypatch, f"train --out run --resume {changed}")
        assert "run: this run was trained on other data, or on another split of it" in error
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == files
    invoke(f"eval run --data {other} --num-samples 16 --num-sequences 1")
    other.unlink()
    numbers = []
    for name in ("texts", "moved"):  # what was held out is, wherever it lies
        Path("texts").rename(name)
        invoke(f"eval run --data {name} --num-samples 16 --num-sequences 1 --json out.json")
        ((text, row),) = json.loads(Path("out.json").read_text()).items()
        assert text == f"held-out part of {name}"
        numbers.append(row)
    assert numbers[0] == numbers[1]
    invoke("train --out run --resume --data moved --steps 5")


def test_files_left_out_are_counted(folder, capsys, monkeypatch):
    (folder / "texts").mkdir()
    (folder / "text.txt").rename(folder / "texts" / "a.txt")
    (folder / "texts" / "b.bin").write_bytes(b"\xff\xfe")
    monkeypatch.setattr(sys, "argv", f"fastdiff train --data texts --out run {SMALL} --eval-every 0".split())
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert exited.value.code == 0
    error = (
        "fastdiff: data: of 2 files in texts, 1 that are not UTF-8 text and 0 that are not regular files are left out\n"
    )
    assert capsys.readouterr().err == error


@pytest.mark.parametrize("loss", ["dse-absorb", "dse-uniform", "gidd"])
def test_score_entropy_runs(folder, capsys, monkeypatch, loss):
    shown = invoke(f"train --data text.txt --out run {SMALL} {EVALUATION} --loss {loss}")
    assert ("held-out bits per byte" if loss == "dse-absorb" else "held-out loss") in shown
    samplers = {"dse-absorb": ("tweedie", "euler", "confidence"), "dse-uniform": ("tweedie", "euler")}
    for sampler in samplers.get(loss, ("tweedie",)):
        shown = invoke(f"sample run --sampler {sampler} --steps 3 --length 8 --prompt ab --show")
        assert "\n   3  ab" in shown
        assert "\n   4  ab" not in shown
        assert "\nab" in shown
        assert shown.startswith("   0  ab······" if loss == "dse-absorb" else "   0  ab")
    assert "bits per byte" in invoke("eval run --num-samples 15 --num-sequences 4 --json out.json")
    (row,) = json.loads((folder / "out.json").read_text()).values()
    assert 7 < row["bits_per_byte"] < 8.5  # which knows nothing of 256 bytes
    if loss != "dse-absorb":
        assert row["likelihood"] == "bound"
        failed = fail(capsys, monkeypatch, "eval run --tolerance 1")
        assert "tolerance: not for the bound of uniform noise, got 1" in failed
        failed = fail(capsys, monkeypatch, "eval run --likelihood margin")
        assert "likelihood: expected one of 'time-free', 'integral', got 'margin'" in failed


def test_data_of_a_run_is_found_from_elsewhere(folder, monkeypatch):
    invoke(f"train --data text.txt --out run {SMALL} --eval-every 0")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert "bits per byte" in invoke("eval ../run --num-samples 15 --num-sequences 4")


def test_part_of_the_training_data_is_said_to_be_that(folder):
    (folder / "texts").mkdir()
    (folder / "text.txt").rename(folder / "texts" / "a.txt")
    (folder / "texts" / "b.txt").write_text("another text " * 100)
    invoke(f"train --data texts --out run {SMALL} --eval-every 0")
    with pytest.warns(UserWarning, match="texts/a.txt is in the folder that run was trained on, and not held out"):
        assert "│ texts/a.txt " in invoke("eval run --data texts/a.txt --num-samples 15 --num-sequences 4")


def test_version(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fastdiff", "--version"])
    with pytest.raises(SystemExit) as exited:
        runpy.run_module("fastdiff", run_name="__main__")
    assert exited.value.code == 0
    assert capsys.readouterr().out == f"fastdiff {importlib.metadata.version('fastdiff-kernels')}\n"


def test_doctor(monkeypatch):
    monkeypatch.setattr(backends, "report", lambda: [("cpu", True, "fine"), ("cuda", False, "no GPU")])
    shown = invoke("doctor")
    for text in ("python", importlib.metadata.version("torch"), "numpy", "triton", "fine", "no GPU"):
        assert text in shown


def test_user_errors_are_one_line(folder, capsys, monkeypatch):
    def expect(command: str, text: str) -> None:
        assert text in fail(capsys, monkeypatch, command)

    expect("train --data nowhere.txt --out run", "there is no 'nowhere.txt'")
    expect(f"train --data text.txt --out run {SMALL} --loss dce", "loss: expected one of")
    expect(f"train --data text.txt --out run {SMALL} --length 9999", "length: expected at most")
    expect(f"train --data text.txt --out run {SMALL} --heads 3", "dim: expected a multiple of 2 x heads = 6")
    expect(f"train --data text.txt --out run {SMALL} --device abacus", "device: 'abacus' cannot be used here: ")
    expect(f"train --data text.txt --out run {SMALL} --device meta", "device: 'meta' cannot be used here: ")
    if not torch.cuda.is_available():
        expect(f"train --data text.txt --out run {SMALL} --device cuda", "device: 'cuda' cannot be used here: ")
    expect(f"train --data text.txt --out run {SMALL} --length 0", "length: expected at least 1, got 0")
    expect(f"train --data text.txt --out run {SMALL} --seed {2**63}", "seed: expected a number below 2^63")
    expect(f"train --data text.txt --out run {SMALL} --length 60", "eval_every: expected 2 held-out sequences")
    (folder / "random.bin").write_bytes(b"\xff" * 2000)
    expect(f"train --data random.bin --out run {SMALL}", "data: expected UTF-8 text, found none in random.bin")
    expect(f"train --data . --out . {SMALL}", "data: expected text from elsewhere than the run's own folder")
    expect("train --out run --resume", "no such file: run/config.json")
    expect("eval run", "no such file: run/config.json")
    assert not (folder / "run").exists()

    invoke(f"train --data text.txt --out run {SMALL} --eval-every 0")
    expect(f"train --data text.txt --out run {SMALL}", "holds a run already")
    expect("train --out run --resume --lr 0.5", "lr: the run in run has 0.001, got 0.5")
    expect("train --out run --resume --length 17", "length: the run in run has 16, got 17")
    expect("train --out run --resume --steps 3", "steps: the run in run has done 4, got 3")
    expect("eval run --num-sequences -1", "num_sequences: expected at least 1, or 0 for all, got -1")
    expect("eval run --length 17", "length: expected 1 to 16 tokens, got 17")
    expect("eval run --cut lines", "cut: expected one of")
    expect("eval run --context 3", "context: expected 0, or with cut 'sliding'")
    expect("eval run --cut sliding --context 16", "less than a window's 16, got 16")
    expect(f"eval run --seed {2**63}", "seed: expected a number of 64 bits")
    expect("eval run --json run", "json: expected a file, but run is a folder")
    expect("eval run --proposal best --num-samples 15", "proposal: expected one of")
    expect("eval run --likelihood best --num-samples 15", "likelihood: expected one of 'time-free', 'integral'")
    for option in ("--proposal uniform", "--tolerance 1"):
        expect(f"eval run --likelihood integral {option}", ": not for the integral over time")
    for option in ("--proposal uniform", "--tolerance 1", "--num-samples 9"):
        expect(f"eval run --likelihood confidence {option}", ": not for one order, confidence, got")
    expect("eval run --likelihood entropy --tokens-per-step 0", "tokens_per_step: expected at least 1, got 0")
    expect("eval run --likelihood entropy --block-length 0", "block_length: expected at least 1, got 0")
    for option in ("--tokens-per-step 2", "--block-length 4"):
        expect(f"eval run {option}", ": not for time-free likelihood, got")
    expect("sample run --prompt 0123456789abcdefg", "prompt: expected 1 to 16 tokens, got 17")
    expect("sample run --prompt a --infill b{3}", "prompt, infill: expected one of the two")
    expect("sample run --infill b{99}", "infill: expected 1 to 16 tokens, got 100")
    expect("sample run --sampler best", "sampler: expected one of")
    expect("sample run --sampler margin --block-length 3", "block_length: expected a divisor of the 16 positions")
    expect("sample run --length 99", "length: expected 1 to 16 tokens, got 99")
    expect("sample run --length 3 --prompt abcd", "prompt: expected 1 to 3 tokens, got 4")
    expect(f"sample run --seed {-(2**63) - 1}", "seed: expected a number of 64 bits")
    records = (folder / "run" / "metrics.jsonl").read_bytes()
    (folder / "run" / "metrics.jsonl").write_text("garbage\n")
    expect("train --out run --resume", "run/metrics.jsonl: line 1 is not a record")
    (folder / "run" / "metrics.jsonl").write_bytes(records)
    (*_, part) = (folder / "run" / "checkpoints").glob("*/*.distcp")
    part.write_bytes(b"half")
    expect("train --out run --resume", f"{part.name}: damaged or cut short")
    whole = (folder / "run" / "model.safetensors").read_bytes()
    (folder / "run" / "model.safetensors").write_bytes(b"half")
    expect("sample run", "model.safetensors: not weights, damaged or cut short")
    (folder / "run" / "model.safetensors").write_bytes(whole)
    config = json.loads((folder / "run" / "config.json").read_text())
    (folder / "run" / "config.json").write_text(json.dumps({"model": config["model"]}))
    expect("eval run", "config.json: expected the training and data of a `fastdiff train` run")
    expect("train --out run --resume", "config.json: expected the training and data of a `fastdiff train` run")


def test_missing_extras(monkeypatch, capsys):
    real = builtins.__import__

    def without_typer(name, *arguments, **named):
        if name == "typer":
            raise ImportError("No module named 'typer'")
        return real(name, *arguments, **named)

    monkeypatch.setattr(builtins, "__import__", without_typer)
    monkeypatch.delitem(sys.modules, "fastdiff.cli")
    with pytest.raises(SystemExit) as exited:
        importlib.import_module("fastdiff.cli")
    assert exited.value.code == 2
    assert capsys.readouterr().err == (
        "fastdiff: No module named 'typer'; install what the command needs: pip install rich safetensors typer\n"
    )


def test_import_needs_no_extras():
    code = "import sys, fastdiff; print([m for m in ('typer', 'rich', 'safetensors') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
    assert result.stderr == ""


def test_commands_that_do_not_train_do_not_wait_for_its_imports():
    """torch.distributed.tensor and the compiler, which take longer than all else of this package."""
    code = (
        "import sys, fastdiff.cli; print([m for m in ('torch._dynamo', 'sympy', 'transformers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
