"""`fastdiff train`."""

import dataclasses
import os
import shlex
import shutil
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastdiff.checks import check_choice
from fastdiff.cli.options import Device, device_of, half_of, read_run, show
from fastdiff.data.shards import Shards, is_tokens
from fastdiff.data.sources import NUM_BYTES, Text, TokenSource, load_documents
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.training import LOSSES, Record, TrainConfig
from fastdiff.training.presets import COND_DIM, PRESETS

_RESULTS = {
    "loss": "training loss, nats per {unit}",
    "bits_per_token": "held-out bits per {unit}, ± 95%",
    "validation_loss": "held-out loss, nats per {unit}, ± 95%",
}
_LENGTH = 128
_DEFAULTS = {f.name: f.default for c in (ModelConfig, TrainConfig) for f in dataclasses.fields(c)}


def _setting(name: str, text: str) -> Any:
    """An option that is None unless given, so that a resumed run can keep its own settings."""
    return typer.Option(help=text, show_default=str(_DEFAULTS[name]))


def _flag(name: str, text: str) -> Any:
    return typer.Option(f"--{name}/--no-{name}", help=text, show_default=str(_DEFAULTS[name]))


def train(
    out: Annotated[Path, typer.Option(help="run folder to write")],
    data: Annotated[
        str | None, typer.Option(help="'stdlib', a text file or a folder; one of `tokenize` too", show_default="stdlib")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    preset: Annotated[str | None, typer.Option(help=f"sizes and settings to begin with: {', '.join(PRESETS)}")] = None,
    length: Annotated[int | None, typer.Option(help="tokens in a sequence", show_default=str(_LENGTH))] = None,
    dim: Annotated[int | None, _setting("dim", "width of the model")] = None,
    depth: Annotated[int | None, _setting("depth", "blocks of the model")] = None,
    heads: Annotated[int | None, _setting("heads", "attention heads")] = None,
    loss: Annotated[str | None, _setting("loss", ", ".join(LOSSES))] = None,
    block_length: Annotated[
        int | None, _setting("block_length", "tokens of a block, of block diffusion; 0: no blocks")
    ] = None,
    times: Annotated[str | None, _setting("times", "noise levels: stratified or importance")] = None,
    complementary: Annotated[bool | None, _flag("complementary", "each sequence twice, under complements")] = None,
    steps: Annotated[int | None, _setting("steps", "optimiser steps")] = None,
    batch_size: Annotated[int | None, _setting("batch_size", "rows in a step")] = None,
    accumulation: Annotated[int | None, _setting("accumulation", "parts a batch is cut into")] = None,
    lr: Annotated[float | None, _setting("lr", "learning rate")] = None,
    warmup: Annotated[int | None, _setting("warmup", "steps over which it rises")] = None,
    lr_schedule: Annotated[str | None, _setting("lr_schedule", "what follows: constant or cosine")] = None,
    lr_final: Annotated[float | None, _setting("lr_final", "share of it that cosine ends with")] = None,
    weight_decay: Annotated[float | None, _setting("weight_decay", "of AdamW")] = None,
    grad_clip: Annotated[float | None, _setting("grad_clip", "largest norm of the gradient")] = None,
    ema: Annotated[float | None, _setting("ema", "decay of the averaged weights")] = None,
    dtype: Annotated[str | None, _setting("dtype", "float32 or bfloat16")] = None,
    sharding: Annotated[str | None, _setting("sharding", "of the model over ranks: none, full or hybrid")] = None,
    shards: Annotated[int | None, _setting("shards", "ranks that share a hybrid copy; 0 for a machine's")] = None,
    recompute: Annotated[bool | None, _flag("recompute", "run blocks again in backward, to keep less")] = None,
    compile: Annotated[bool | None, _flag("compile", "blocks by torch.compile")] = None,
    eval_every: Annotated[int | None, _setting("eval_every", "steps between evaluations, 0 for none")] = None,
    eval_sequences: Annotated[int | None, _setting("eval_sequences", "held-out sequences in one")] = None,
    eval_samples: Annotated[int | None, _setting("eval_samples", "network passes for each of them")] = None,
    save_every: Annotated[int | None, _setting("save_every", "steps between checkpoints")] = None,
    keep: Annotated[int | None, _setting("keep", "newest checkpoints that stay")] = None,
    keep_every: Annotated[int | None, _setting("keep_every", "and those of every so many steps; 0 for none")] = None,
    track: Annotated[str | None, _setting("track", "records to: none, tensorboard or wandb")] = None,
    seed: Annotated[int | None, _setting("seed", "of weights, batches and noise")] = None,
    device: Device = None,
) -> None:
    """Train a model on bytes, or on tokens that `fastdiff tokenize` wrote.

    Under torchrun (-m fastdiff train) on all its ranks, to the same numbers. Ctrl-C, SIGTERM and SIGUSR1 save; --resume
    goes on to the numbers of an unbroken run.
    """
    given = {name: value for name, value in locals().items() if value is not None}
    from fastdiff.training import Stopped
    from fastdiff.training import train as run_training

    first, local = os.environ.get("RANK", "0") == "0", os.environ.get("LOCAL_RANK", "0")
    place = device_of(device or (f"cuda:{local}" if torch.cuda.is_available() else None))
    if resume and preset is not None:
        raise ValueError(f"preset: the run in {out} has its own sizes, got {preset!r}")
    saved = read_run(out) if resume else {**_begun(preset), "data": {"path": "stdlib"}}
    config = TrainConfig(**{**saved["training"], **_pick(given, TrainConfig)})
    data = given.get("data", saved["data"]["path"])
    length = given.get("length", saved["model"].get("max_length", _LENGTH))
    if resume and saved["model"]["max_length"] != length:
        raise ValueError(f"length: the run in {out} has {saved['model']['max_length']}, got {length}")

    source, sections = _source(data, out, length, config.seed)
    absorbing, conditioned = config.loss != "dse-uniform", config.sees_noise
    shape = {"num_states": source.num_tokens + absorbing, "max_length": length, "cond_dim": COND_DIM * conditioned}
    torch.manual_seed(config.seed)
    model = DiffusionTransformer(ModelConfig(**{**saved["model"], **shape, **_pick(given, ModelConfig)}))
    last: Record = {}
    model.to(place)
    stop: Stopped | None = None
    try:
        run_training(config, model, source, out=out, resume=resume, callback=last.update, sections=sections)
    except Stopped as signal:
        stop = signal
    if first:
        _keep_tokenizer(source, out)
    if stop is not None:
        if first:
            command = shlex.join(["fastdiff", "train", "--out", str(out), "--resume"])
            typer.echo(f"stopped and saved; go on with: {command}", err=True)
        raise typer.Exit(128 + stop.args[0])
    if not first:
        return
    unit = "byte" if source.num_tokens == NUM_BYTES else "token"
    rows = {"steps": f"{config.steps}", "parameters": f"{sum(p.numel() for p in model.parameters()):,}"}
    for name, form in _RESULTS.items():
        title = form.format(unit=unit)
        if name in last:
            rows[title] = f"{last[name]:.3f}"
        if name + "_stderr" in last:
            rows[title] += f" ± {half_of(last[name + '_stderr'], len(source.validation(config.eval_sequences))):.3f}"
    show(f"run in {out}", rows)


def _begun(preset: str | None) -> dict[str, dict[str, Any]]:
    """What a run that has saved nothing begins with, in the place of what it saved."""
    if preset is None:
        return {"model": {}, "training": {}}
    check_choice("preset", preset, tuple(PRESETS))
    return {name: dataclasses.asdict(part) for name, part in PRESETS[preset]._asdict().items()}


def _source(data: str, out: Path, length: int, seed: int) -> tuple[TokenSource, dict[str, dict[str, Any]]]:
    """What to train on, and what config.json says of it."""
    path = data if data == "stdlib" else str(Path(data).resolve())
    sections: dict[str, dict[str, Any]] = {"data": {"path": path}}
    if not is_tokens(path):
        return Text(load_documents(data, out), length, seed=seed), sections
    source = Shards(path, length, seed=seed)
    return source, sections | {"tokenizer": source.tokens.settings["tokenizer"] | {"num_tokens": source.num_tokens}}


def _keep_tokenizer(source: TokenSource, out: Path) -> None:
    """The tokenizer's files into the run, so that it can be evaluated wherever it is moved."""
    files = source.tokens.tokenizer_folder if isinstance(source, Shards) else None
    if files is not None:
        shutil.rmtree(out / "tokenizer", ignore_errors=True)
        shutil.copytree(files, out / "tokenizer")


def _pick(given: dict[str, Any], config: type) -> dict[str, Any]:
    return {f.name: given[f.name] for f in dataclasses.fields(config) if f.name in given}
