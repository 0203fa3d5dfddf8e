"""Training: losses, noise, options, records, and what is refused."""

import errno
import json
import math
import resource
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_runs import SETTINGS, TOKENS, losses, make, on_disk, run, same_weights, source

from fastdiff.data import Table
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.training import LOSSES, SCHEDULE, TrainConfig, noise


def contents(folder) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- learning --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in ("dse-uniform", "gidd")])
def test_untrained_loss(loss):
    """A model that knows nothing loses log 4 wherever it looks; the weighted number of masks varies by 1.2 at most."""
    (record,) = run(loss=loss, steps=1, batch_size=4000)[1]
    assert record["loss"] == pytest.approx(math.log(4), rel=4 * 1.2 / 4000**0.5)


@pytest.mark.parametrize("loss", LOSSES)
def test_learning(loss):
    averaged, records = run(loss=loss, steps=150, batch_size=32, ema=0.9, eval_every=150, eval_samples=15)
    first, last = sum(losses(records)[:5]) / 5, sum(losses(records)[-50:]) / 50
    assert last < 0.75 * first
    held_out = records[-1].get("bits_per_token", records[-1].get("validation_loss"))
    assert 0 < held_out < 1.5  # 3 sequences of 4 tokens: the truth is log2(3) / 4 = 0.4 bits
    assert not any(p.requires_grad for p in averaged.parameters())


@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in ("dse-uniform", "gidd")])
def test_losses_estimate_one_quantity(loss):
    """All bound the same likelihood, so a model that loses 1 nat at each mask loses 1 nat a token."""
    x0 = torch.randint(0, 4, (4000, 4), generator=torch.Generator().manual_seed(0))
    xt, sigma, weight = noise(x0, loss, 5, seed=1, step=0)[1:4]
    masked = (xt == 4).sum(1).double()
    assert ((xt == 4) | (xt == x0)).all()
    if loss == "dse-absorb":
        weight = weight / torch.expm1(sigma)
    per_token = masked * weight.double() / 4
    assert abs(per_token.mean().item() - 1) <= 4 * per_token.std().item() / len(x0) ** 0.5
    assert torch.equal(xt, noise(x0, loss, 5, seed=1, step=0).xt)
    assert not torch.equal(xt, noise(x0, loss, 5, seed=1, step=1).xt)


def test_noise_counts():
    x0 = torch.zeros(4, 4, dtype=torch.int64)
    xt, _, weight = noise(x0, "dce-k", 5, seed=0, step=0)[1:4]
    assert (xt == 4).sum(1).tolist() == [1, 3, 2, 4]  # one in each stratum, and none of two neighbours has few
    assert weight.tolist() == [4, 4 / 3, 2, 1]
    harmonic = noise(x0, "dce-harmonic", 5, seed=0, step=0).weight
    assert harmonic.tolist() == pytest.approx([1 + 1 / 2 + 1 / 3 + 1 / 4] * 4)


@pytest.mark.parametrize("loss", LOSSES)
def test_noise_is_named_by_the_row_of_the_batch(loss):
    x0 = torch.randint(0, 4, (12, 5), generator=torch.Generator().manual_seed(0))
    whole = noise(x0, loss, 5, seed=1, step=2)
    for first, n in ((0, 4), (4, 8), (11, 1)):
        part = noise(x0[first : first + n], loss, 5, seed=1, step=2, first=first, batch_size=12)
        for of_part, of_whole in zip(part[:4], whole[:4], strict=True):
            assert torch.equal(of_part, of_whole[first : first + n])


@pytest.mark.parametrize("n", [6, 8, 64, 96, 1000])
def test_parts_of_a_batch_have_as_many_masks(n):
    """Each quarter of the rows has strata from all over: masks of a rank are off its share by less than two rows."""
    masks = (noise(torch.zeros(n, n, dtype=torch.int64), "dce-k", 2, seed=0, step=0).xt == 1).sum(1)
    assert sorted(masks.tolist()) == list(range(1, n + 1))
    for part in masks.chunk(4):
        assert abs(part.float().mean() - (n + 1) / 2) * len(part) < 2 * n


def test_conditionals_follow_the_number_of_masks():
    model = make("dse-absorb")
    asked = []
    model.body = lambda xt, sigma: asked.append(sigma)
    model.conditionals(4, SCHEDULE.total_noise)[0](torch.tensor([[4, 4, 4, 4], [0, 4, 1, 2]]))
    alpha = torch.exp(-asked[0])
    torch.testing.assert_close(alpha, torch.tensor([1e-3, 1 - 0.999 / 4]))


@pytest.mark.parametrize("loss", ["dce-k", "dse-absorb", "dse-uniform", "gidd"])
def test_a_large_vocabulary_changes_nothing_but_memory(loss, monkeypatch):
    logits = losses(run(loss=loss)[1])
    monkeypatch.setattr("fastdiff.training.objectives.LARGE_VOCABULARY", 2)
    model, shapes = make(loss), set()
    model.register_forward_hook(lambda model, tokens, output: shapes.add(tuple(output.shape)))
    assert losses(run(loss=loss, model=model)[1]) == pytest.approx(logits, rel=1e-4)
    assert shapes == {(1, 4, model.config.num_states)}  # in the place of the logits of 4 x 4 tokens


def test_accumulation_changes_nothing():
    _, whole = run(steps=3)
    _, parts = run(steps=3, accumulation=2)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


def test_warmup_clipping_and_averaging():
    model = make()
    before = {name: p.clone() for name, p in model.named_parameters()}
    averaged, records = run(model=model, steps=1, warmup=100, lr=0.1, weight_decay=0, ema=0.5, grad_clip=1e-3)
    assert records[0]["grad_norm"] > 0.1  # as it was before clipping
    raw = dict(model.named_parameters())["output_layer.linear.weight"]
    moved = (raw - before["output_layer.linear.weight"]).abs().max().item()
    assert moved == pytest.approx(0.1 / 100, rel=1e-3)  # Adam's first step is lr, here a hundredth of it
    expected = torch.lerp(before["output_layer.linear.weight"], raw, 1 - 1 / 10)  # (1 + 0) / (10 + 0) < 0.5
    torch.testing.assert_close(averaged.lm_head.weight, expected)


def test_bfloat16():
    _, exact = run(steps=2)
    model = make()
    _, records = run(model=model, steps=2, dtype="bfloat16", eval_every=2)
    assert losses(records) == pytest.approx(losses(exact), rel=0.02)
    assert losses(records)[1] != losses(exact)[1]
    assert model.lm_head.weight.dtype == torch.float32


# -- checkpoints -----------------------------------------------------------------------------------------


def test_learning_rates():
    config = TrainConfig(steps=8, warmup=4, lr=0.8)
    assert [config.lr_at(step) for step in range(8)] == pytest.approx([0.2, 0.4, 0.6, *[0.8] * 5])
    config = TrainConfig(steps=8, warmup=4, lr=0.8, lr_schedule="cosine", lr_final=0.5)
    falling = [0.6 + 0.2 * math.cos(math.pi * done) for done in (0.25, 0.5, 0.75, 1)]
    assert [config.lr_at(step) for step in range(8)] == pytest.approx([0.2, 0.4, 0.6, 0.8, *falling])
    config = TrainConfig(steps=2, warmup=0, lr=0.8, lr_schedule="cosine", lr_final=0)
    assert [config.lr_at(step) for step in range(2)] == pytest.approx([0.4, 0])


def test_tensorboard_shows_the_records(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def interrupt(record):
        if record["step"] == 3:
            raise InterruptedError

    settings = {"track": "tensorboard", "save_every": 2, "eval_every": 2, "eval_samples": 3}
    with pytest.raises(InterruptedError):
        run(tmp_path, callback=interrupt, **settings)
    run(tmp_path, resume=True, **settings)
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    records = on_disk(tmp_path)
    assert set(shown.Tags()["scalars"]) == {name for record in records for name in record} - {"step"}
    for name in shown.Tags()["scalars"]:
        expected = {record["step"]: record[name] for record in records if name in record}
        events = shown.Scalars(name)
        assert len(events) == len(expected)
        assert {event.step: event.value for event in events} == pytest.approx(expected)


def test_wandb_is_given_the_records(tmp_path, monkeypatch):
    """By a stand-in of what is called."""
    begun, given = {}, []

    @contextmanager
    def init(**options):
        begun.update(options)
        yield SimpleNamespace(log=lambda record, step: given.append((record, step)))
        begun["over"] = True

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    _, records = run(tmp_path, track="wandb", eval_every=3, eval_samples=3)
    assert given == [(record, record["step"]) for record in records]
    assert (begun["config"]["steps"], begun["dir"], begun["over"]) == (6, tmp_path, True)


@pytest.mark.parametrize("line", ["garbage", "[]", '{"loss": 1.0}', '{"step": "one"}', "\0\0"])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    run(tmp_path, steps=2)
    path = tmp_path / "metrics.jsonl"
    first, second = path.read_text().splitlines()
    whole = f"{first}\n{line}\n{second}\n"
    path.write_text(whole)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not a record"):
        run(tmp_path, resume=True)
    assert path.read_text() == whole


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "metrics.jsonl"])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, name, monkeypatch):
    """A limit on the size of a file stands in for the disk; the system then says as little about the file."""
    sizes = {"metrics.jsonl": 1500, "config.json": 300, "model.safetensors": 5000}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if name != "metrics.jsonl":
        monkeypatch.setattr("fastdiff.training.records.append", lambda record, metrics: None)
        monkeypatch.setattr("fastdiff.training.checkpoints.Checkpoints.save", lambda *args: None)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[name], before[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{tmp_path}/{name}'"):
            run(tmp_path, steps=20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.glob("*.part"))


def test_a_checkpoint_that_was_not_written_is_an_error(tmp_path, monkeypatch):
    """It is written while the run goes on."""

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastdiff.training.checkpoints.dcp.save", full)
    with pytest.raises(OSError, match="No space left on device"):
        run(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        run(tmp_path, resume=True)


def test_what_torchrun_starts_again_goes_on_by_itself(tmp_path, monkeypatch):
    unbroken, _ = run(tmp_path / "a")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    run(tmp_path / "b", steps=3)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert same_weights(run(tmp_path / "b")[0], unbroken)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    with pytest.raises(FileExistsError, match="holds a run already"):
        run(tmp_path / "b")


def test_checkpoints_that_stay(tmp_path):
    run(tmp_path, save_every=1, keep=2, keep_every=3)
    steps = sorted(int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoints").iterdir())
    assert steps == [3, 5, 6]


def test_run_folder(tmp_path):
    averaged, _ = run(tmp_path / "run")
    names = {"config.json", "metrics.jsonl", "model.safetensors", "checkpoints"}
    assert {p.name for p in (tmp_path / "run").iterdir()} == names
    assert same_weights(DiffusionTransformer.from_pretrained(tmp_path / "run"), averaged)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert TrainConfig(**config["training"]) == TrainConfig(**SETTINGS)


def test_what_a_resumed_run_may_not_change(tmp_path):
    run(tmp_path, steps=1)
    with pytest.raises(ValueError, match=r"lr: the run in \S+ has 0.01, got 0.5"):
        run(tmp_path, resume=True, lr=0.5)
    other = DiffusionTransformer(ModelConfig(5, 4, 32, 1, 2))
    with pytest.raises(ValueError, match=r"dim: the run in \S+ has 16, got 32"):
        run(tmp_path, resume=True, model=other)
    with pytest.raises(ValueError, match=r": this run was trained on other data, or on another split"):
        run(tmp_path, resume=True, data=source(seed=1))
    run(tmp_path, steps=2, resume=True)
    files = contents(tmp_path)
    with pytest.raises(ValueError, match=r"steps: the run in \S+ has done 2, got 1"):
        run(tmp_path, steps=1, resume=True)
    assert contents(tmp_path) == files


def test_nothing_to_resume_and_nothing_overwritten(tmp_path):
    with pytest.raises(FileNotFoundError, match="out: expected a run folder to resume, but there is no checkpoint in"):
        run(tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match="out: expected a run folder"):
        run(None, resume=True)
    run(tmp_path, steps=1)
    with pytest.raises(FileExistsError, match=r"out: .* holds a run already"):
        run(tmp_path)


# -- errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"loss": "dce"}, "loss: expected one of 'dce-t'.*got 'dce'"),
        ({"dtype": "float16"}, "dtype: expected one of 'float32', 'bfloat16', got 'float16'"),
        ({"steps": 0}, "steps: expected at least 1, got 0"),
        ({"batch_size": 2.0}, "batch_size: expected an int, got 2.0"),
        ({"seed": 2**63}, r"seed: expected a number below 2\^63, got 9223372036854775808"),
        ({"accumulation": 3}, "batch_size: expected a multiple of accumulation = 3, got 4"),
        ({"lr": 0.0}, "lr: expected a number > 0, got 0.0"),
        ({"lr": math.nan}, "lr: expected a number > 0, got nan"),
        ({"weight_decay": -0.1}, "weight_decay: expected a number >= 0"),
        ({"grad_clip": 0.0}, "grad_clip: expected a number > 0"),
        ({"ema": 1.0}, r"ema: expected a decay in \[0, 1\), got 1.0"),
        ({"eval_sequences": 1}, "eval_sequences: expected at least 2, got 1"),
    ],
)
def test_bad_config(changes, text):
    with pytest.raises((ValueError, TypeError), match=text):
        TrainConfig(**(SETTINGS | changes))


def test_model_that_does_not_fit():
    with pytest.raises(ValueError, match="model: expected num_states = 5, got 4"):
        run(model=make("dse-uniform"))
    with pytest.raises(ValueError, match="model: expected num_states = 4, got 5"):
        run(model=make("dse-absorb"), loss="dse-uniform")
    with pytest.raises(ValueError, match="model: expected cond_dim > 0 for loss 'dse-absorb'"):
        run(model=make(), loss="dse-absorb")


def test_too_little_to_evaluate():
    with pytest.raises(ValueError, match="eval_every: expected 2 held-out sequences or more to evaluate on, got 1"):
        run(eval_every=1, data=Table(TOKENS, num_tokens=4, held_out=TOKENS[:1]))


def test_divergence_stops_with_the_last_checkpoint_whole(tmp_path):
    model = make()

    def poison(record):
        if record["step"] == 3:
            torch.nn.init.constant_(model.lm_head.weight, math.nan)

    with pytest.raises(FloatingPointError, match=r"step 4: loss nan.*try a lower lr"):
        run(tmp_path, model=model, save_every=2, callback=poison)
    averaged, rest = run(tmp_path, steps=2, resume=True)
    assert not rest
    assert same_weights(averaged, run(steps=2)[0])
    assert same_weights(averaged, DiffusionTransformer.from_pretrained(tmp_path))


def test_nothing_is_printed_away_from_a_terminal(capfd):
    run(steps=2)
    assert capfd.readouterr() == ("", "")
