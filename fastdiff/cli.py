"""The `fastdiff` command: train, eval, sample, doctor."""

import dataclasses
import importlib.metadata
import itertools
import json
import math
import platform
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch

from fastdiff import backends
from fastdiff.data import NUM_BYTES, Text, as_bytes, decode, encode, even_windows, load_documents, load_named_documents
from fastdiff.estimators import NLLEstimate, dse_nll, time_free_nll
from fastdiff.estimators.estimate import student_t
from fastdiff.graphs import Absorbing, Uniform
from fastdiff.model import DiffusionTransformer, ModelConfig, read_config, write_atomically
from fastdiff.sampling import sample as draw_samples
from fastdiff.training import LOSSES, SCHEDULE, Record, Stopped, TrainConfig, time_free
from fastdiff.training import train as run_training
from fastdiff.unmasking import SAMPLERS, TIMED

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    print(f"fastdiff: {error}; install what the command needs: pip install rich safetensors typer", file=sys.stderr)
    raise SystemExit(2) from None

app = typer.Typer(
    help="Train, score and sample small discrete-diffusion language models on bytes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, backends.BackendUnavailable)
_RESULTS = {
    "loss": "training loss, nats per byte",
    "bits_per_token": "held-out bits per byte, ± 95%",
    "validation_loss": "held-out loss, nats per byte, ± 95%",
}
_LENGTH = 128
_FRAMES = 8  # lines in which a text comes about
_DEFAULTS = {f.name: f.default for c in (ModelConfig, TrainConfig) for f in dataclasses.fields(c)}

Run = Annotated[Path, typer.Argument(help="run folder of `fastdiff train`")]
Device = Annotated[str | None, typer.Option(help="torch device", show_default="cuda if there is one, else cpu")]


def _setting(name: str, text: str) -> Any:
    """An option that is None unless given, so that a resumed run can keep its own settings."""
    return typer.Option(help=text, show_default=str(_DEFAULTS[name]))


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="run folder to write")],
    data: Annotated[str | None, typer.Option(help="'stdlib', a text file or a folder", show_default="stdlib")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    length: Annotated[int | None, typer.Option(help="bytes in a sequence", show_default=str(_LENGTH))] = None,
    dim: Annotated[int | None, _setting("dim", "width of the model")] = None,
    depth: Annotated[int | None, _setting("depth", "blocks of the model")] = None,
    heads: Annotated[int | None, _setting("heads", "attention heads")] = None,
    loss: Annotated[str | None, _setting("loss", ", ".join(LOSSES))] = None,
    steps: Annotated[int | None, _setting("steps", "optimiser steps")] = None,
    batch_size: Annotated[int | None, _setting("batch_size", "sequences in a step")] = None,
    accumulation: Annotated[int | None, _setting("accumulation", "parts a batch is cut into")] = None,
    lr: Annotated[float | None, _setting("lr", "learning rate")] = None,
    warmup: Annotated[int | None, _setting("warmup", "steps over which it rises")] = None,
    weight_decay: Annotated[float | None, _setting("weight_decay", "of AdamW")] = None,
    grad_clip: Annotated[float | None, _setting("grad_clip", "largest norm of the gradient")] = None,
    ema: Annotated[float | None, _setting("ema", "decay of the averaged weights")] = None,
    dtype: Annotated[str | None, _setting("dtype", "float32 or bfloat16")] = None,
    eval_every: Annotated[int | None, _setting("eval_every", "steps between evaluations, 0 for none")] = None,
    eval_sequences: Annotated[int | None, _setting("eval_sequences", "held-out sequences in one")] = None,
    eval_samples: Annotated[int | None, _setting("eval_samples", "network passes for each of them")] = None,
    save_every: Annotated[int | None, _setting("save_every", "steps between checkpoints")] = None,
    seed: Annotated[int | None, _setting("seed", "of weights, batches and noise")] = None,
    device: Device = None,
) -> None:
    """Train a model on bytes. Ctrl-C and SIGTERM save; --resume goes on to the numbers of an unbroken run."""
    given = {name: value for name, value in locals().items() if value is not None}
    place = _device(device)
    saved = _read_run(out) if resume else {"model": {}, "training": {}, "data": {"path": "stdlib"}}
    config = TrainConfig(**{**saved["training"], **_pick(given, TrainConfig)})
    data = given.get("data", saved["data"]["path"])
    length = saved["model"].get("max_length", given.get("length", _LENGTH))
    if given.get("length", length) != length:
        raise ValueError(f"length: the run in {out} has {length}, got {given['length']}")

    source = Text(load_documents(data, out), length, seed=config.seed)
    absorbing, conditioned = config.loss != "dse-uniform", config.loss.startswith("dse")
    shape = {"num_states": NUM_BYTES + absorbing, "max_length": length, "sigma_conditioned": conditioned}
    torch.manual_seed(config.seed)
    model = DiffusionTransformer(ModelConfig(**{**saved["model"], **shape, **_pick(given, ModelConfig)}))
    sections = {"data": {"path": data if data == "stdlib" else str(Path(data).resolve())}}
    last: Record = {}
    model.to(place)
    try:
        run_training(config, model, source, out=out, resume=resume, callback=last.update, sections=sections)
    except Stopped as stopped:
        command = shlex.join(["fastdiff", "train", "--out", str(out), "--resume"])
        typer.echo(f"stopped and saved; go on with: {command}", err=True)
        raise typer.Exit(128 + stopped.args[0]) from None
    rows = {"steps": f"{config.steps}", "parameters": f"{sum(p.numel() for p in model.parameters()):,}"}
    for name, title in _RESULTS.items():
        if name in last:
            rows[title] = f"{last[name]:.3f}"
        if name + "_stderr" in last:
            rows[title] += f" ± {_half(last[name + '_stderr'], len(source.validation(config.eval_sequences))):.3f}"
    _show(f"run in {out}", rows)


@app.command("eval")
def evaluate(
    run: Run,
    data: Annotated[
        list[str] | None, typer.Option(help="as for train; may be given several times", show_default="the run's own")
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="all of texts that were not trained on, and each file of a folder apart")
    ] = False,
    num_sequences: Annotated[int, typer.Option(help="windows of each text, evenly spread")] = 64,
    num_samples: Annotated[int, typer.Option(help="network passes for each of them")] = 64,
    tolerance: Annotated[
        float | None,
        typer.Option(help="bits per byte: as many passes as each text's interval should take to be within +- this"),
    ] = None,
    proposal: Annotated[str, typer.Option(help="stratified, systematic, uniform or harmonic")] = "stratified",
    seed: Annotated[int, typer.Option(help="of the masks")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the numbers")] = None,
    device: Device = None,
) -> None:
    """Likelihood of texts: nats, bits per byte and perplexity, with 95% intervals of what masking leaves open.

    For a model of the uniform graph it is the bound that the integral over its noise gives.
    """
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance: expected a positive number of bits per byte, got {tolerance}")
    _check_seed(seed)
    if num_sequences < 1:
        raise ValueError(f"num_sequences: expected at least 1, got {num_sequences}")
    model, config = _load(run, device)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        if json_file.is_dir():
            raise ValueError(f"json: expected a file, but {json_file} is a folder")
    loss = config["training"]["loss"]
    if loss == "dse-uniform" and (tolerance is not None or proposal != "stratified"):
        raise ValueError("tolerance, proposal: not for a model of the uniform graph, integrated over its noise")
    length, rows = model.config.max_length, {}
    for name, text in _texts(data or [config["data"]["path"]], run, config, whole):
        x0 = even_windows(text, length, num_sequences).to(model.lm_head.weight.device)
        if loss == "dse-uniform":
            estimate = dse_nll(
                model,
                x0,
                graph=Uniform(model.config.num_states),
                schedule=SCHEDULE,
                parametrization="scale_by_sigma",
                num_samples=num_samples,
                seed=seed,
            )
        else:
            mask_index = model.config.num_states - 1
            # errors of the windows add up in squares
            nats = None if tolerance is None else tolerance * math.log(2) * x0.numel() / math.sqrt(len(x0))
            estimate = time_free_nll(
                time_free(model, mask_index),
                x0,
                mask_index=mask_index,
                num_samples=num_samples,
                tolerance=nats,
                proposal=proposal,
                seed=seed,
            )
        rows[name] = _row(estimate)
    _show_rows(rows, f"{run}, windows of {length} bytes, {proposal}")
    if missed := [name for name, row in rows.items() if tolerance is not None and _masking(row) > tolerance]:
        typer.echo(f"wider than ± {tolerance} bits per byte: {', '.join(missed)}; try more --num-samples", err=True)
    if json_file is not None:
        write_atomically(json_file, json.dumps(rows, indent=1).encode() + b"\n")


def _texts(data: list[str], run: Path, config: dict[str, Any], whole: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Names of texts and their bytes."""
    length, trained_on = config["model"]["max_length"], config["data"]["path"]
    for name in data:
        if not whole:
            text = Text(load_documents(name, run), length, seed=config["training"]["seed"])
            own = trained_on in (name, str(Path(name).resolve()))
            if own and text.fingerprint != config["source"]["fingerprint"]:
                raise ValueError(
                    f"data: {name} has changed since {run} was trained on it, and so has its held-out part"
                )
            yield f"held-out part of {name}", text.validation_bytes
        else:
            parts: dict[str, list[bytes]] = {}
            for part, document in load_named_documents(name, run):
                parts.setdefault(part, []).append(document)
            longer = {part: documents for part, documents in parts.items() if sum(map(len, documents)) >= length}
            for part, documents in (longer or parts).items():  # of files shorter than a window the first is an error
                yield part, as_bytes(documents, length)


def _row(estimate: NLLEstimate) -> dict[str, Any]:
    """Numbers of one text, ready for JSON."""
    pooled, bits = estimate.pooled(), estimate.bits_per_token
    nll, n = pooled.nll.item(), pooled.num_tokens.item()
    low, high = (bound.item() for bound in pooled.interval())
    return {
        "windows": len(bits),
        "bytes": n,
        "network_passes": pooled.num_forwards.item(),
        "nll": nll,
        "nll_interval": [low, high],
        "bits_per_byte": nll / n / math.log(2),
        "bits_per_byte_interval": [bound / n / math.log(2) for bound in (low, high)],
        "perplexity": math.exp(nll / n),
        "perplexity_interval": [math.exp(bound / n) for bound in (low, high)],
        "bits_per_byte_sd_between_windows": bits.std().item() if len(bits) > 1 else None,
    }


def _show_rows(rows: dict[str, dict[str, Any]], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in (
        "text",
        "windows",
        "passes",
        "nats",
        "bits per byte",
        "± masking, 95%",
        "perplexity",
        "± between windows, 95%",
    ):
        table.add_column(column, justify="left" if column == "text" else "right")
    for name, row in rows.items():
        spread = row["bits_per_byte_sd_between_windows"]
        table.add_row(
            name,
            f"{row['windows']}",
            f"{row['network_passes']}",
            f"{row['nll']:.1f}",
            f"{row['bits_per_byte']:.4f}",
            f"{_masking(row):.4f}",
            f"{row['perplexity']:.3f}",
            "one window" if spread is None else f"{_half(spread / math.sqrt(row['windows']), row['windows']):.4f}",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


def _masking(row: dict[str, Any]) -> float:
    """Half of the 95% interval of a text's bits per byte that masking leaves open."""
    low, high = row["bits_per_byte_interval"]
    return (high - low) / 2


def _half(stderr: float, n: int) -> float:
    """Half of the 95% interval of a mean over n values."""
    return student_t(0.95, torch.tensor(n - 1.0)).item() * stderr


@app.command()
def sample(
    run: Run,
    prompt: Annotated[str, typer.Option(help="text to go on from")] = "",
    infill: Annotated[str | None, typer.Option(help="text with {n} where n bytes are to be filled in")] = None,
    length: Annotated[
        int | None, typer.Option(help="bytes, with the prompt", show_default="all the model takes")
    ] = None,
    sampler: Annotated[str, typer.Option(help=", ".join(SAMPLERS))] = "tweedie",
    steps: Annotated[int | None, typer.Option(help="steps", show_default="as many as bytes to draw")] = None,
    block_length: Annotated[int | None, typer.Option(help="for the last four samplers; else one block")] = None,
    guidance: Annotated[float, typer.Option(help="classifier-free; 0 is none")] = 0.0,
    temperature: Annotated[float, typer.Option(help="below 1: more likely bytes; 0: the likeliest")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="draw from so many likeliest bytes")] = None,
    top_p: Annotated[float | None, typer.Option(help="draw from the likeliest bytes of so much probability")] = None,
    num_samples: Annotated[int, typer.Option(help="texts to draw")] = 1,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    show: Annotated[bool, typer.Option("--show", help="also how each text came about")] = False,
    device: Device = None,
) -> None:
    """Draw texts: whole ones, after a prompt, or where an infill leaves room."""
    _check_seed(seed)
    model, saved = _load(run, device)
    config, loss = model.config, saved["training"]["loss"]
    if length is not None:
        _check_bytes("length", length, config.max_length)
    if prompt:
        _check_bytes("prompt", len(prompt.encode()), length or config.max_length)
    graph = (Uniform if loss == "dse-uniform" else Absorbing)(config.num_states)
    # scores of the absorbing graph hold its conditionals, for the samplers that ask for these
    by_score = loss == "dse-uniform" or (loss == "dse-absorb" and sampler in TIMED)
    drawn = draw_samples(
        model if by_score else time_free(model, config.num_states - 1),
        num_samples=num_samples,
        length=config.max_length if length is None and infill is None else length,
        steps=steps,
        graph=graph,
        parametrization="scale_by_sigma" if by_score else "logits",
        sampler=sampler,
        prompt=encode(prompt) if prompt else None,
        infill=None if infill is None else _blanks(infill, config.max_length),
        block_length=block_length,
        guidance=guidance,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        return_trajectory=True,
    )
    for text, trajectory in zip(drawn.tokens, drawn.trajectory.unbind(1), strict=True):
        if show:
            for step in torch.linspace(0, len(trajectory) - 1, min(_FRAMES, len(trajectory))).round().int().tolist():
                typer.echo(f"{step:4}  {_dotted(trajectory[step], graph.mask_index)}")
        typer.echo(decode(text))


def _blanks(text: str, most: int) -> torch.Tensor:
    """The bytes of a text, and -1 for each of the n bytes that a "{n}" in it stands for; `most` of both."""
    parts = re.split(r"\{(\d+)\}", text)  # texts and numbers by turns
    _check_bytes("infill", sum(int(p) if i % 2 else len(p.encode()) for i, p in enumerate(parts)), most)
    return torch.cat([torch.full((int(p),), -1) if i % 2 else encode(p) for i, p in enumerate(parts)])


def _check_seed(seed: int) -> None:
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a number of 64 bits, got {seed}")


def _check_bytes(option: str, n: int, most: int) -> None:
    if not 1 <= n <= most:
        raise ValueError(f"{option}: expected 1 to {most} bytes, got {n}")


def _dotted(tokens: torch.Tensor, mask_index: int | None) -> str:
    """Tokens on one line, a dot for each mask."""
    runs = itertools.groupby(tokens.tolist(), key=lambda token: token == mask_index)
    text = "".join("·" * len(list(run)) if masked else decode(torch.tensor(list(run))) for masked, run in runs)
    return "".join(c if c.isprintable() else "↵" if c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


@app.command()
def doctor() -> None:
    """What can run here, and why not the rest."""
    versions = {
        "python": platform.python_version(),
        "fastdiff from": str(Path(backends.__file__).parent),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }
    for package in ("fastdiff-kernels", "torch", "numpy", "triton"):
        versions[package] = _version(package)
    _show("versions", versions)
    table = Table("backend", "available", "detail", title="backends", title_justify="left")
    for name, available, detail in backends.report():
        table.add_row(name, "yes" if available else "no", detail)
    Console().print(table)


def main() -> None:
    """Run the command line; what a user can put right ends as one line on stderr and exit code 2."""
    warnings.showwarning = lambda message, *_: print("fastdiff:", message, file=sys.stderr)
    try:
        app()
    except _USER_ERRORS as error:
        print("fastdiff:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


def _pick(given: dict[str, Any], config: type) -> dict[str, Any]:
    return {f.name: given[f.name] for f in dataclasses.fields(config) if f.name in given}


def _read_run(run: Path) -> dict[str, Any]:
    config = read_config(run)
    try:
        ModelConfig(**config["model"]), TrainConfig(**config["training"])
        config["data"]["path"], config["source"]["fingerprint"]
    except (KeyError, TypeError):
        raise ValueError(f"{run / 'config.json'}: expected the training and data of a `fastdiff train` run") from None
    return config


def _load(run: Path, device: str | None) -> tuple[DiffusionTransformer, dict[str, Any]]:
    """The averaged model of a run, on its device, and what config.json says."""
    config = _read_run(run)
    return DiffusionTransformer.from_pretrained(run).eval().to(_device(device)), config


def _device(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _show(title: str, rows: dict[str, str]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
