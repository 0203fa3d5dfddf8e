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
from fastdiff.data import NUM_BYTES, Text, load_documents, load_named_documents
from fastdiff.estimators.estimate import student_t
from fastdiff.likelihood import forget, likelihoods, ranks, row
from fastdiff.loading import load
from fastdiff.model import DiffusionTransformer, ModelConfig, read_config, write_atomically
from fastdiff.published import KINDS
from fastdiff.sampling import sample as draw_samples
from fastdiff.texts import CUTS, Piece, Tokenizer, pieces, tokens_of
from fastdiff.training import LOSSES, Record, Stopped, TrainConfig
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

Named = Annotated[str, typer.Argument(help=f"run folder, or KIND:PATH of a published model: {', '.join(KINDS)}, hf")]
TokenizerOf = Annotated[
    str | None, typer.Option(help="its folder or name, as transformers takes it", show_default="the model's folder")
]
MaskIndex = Annotated[int | None, typer.Option(help="the mask's id", show_default="what the model says")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the model")]
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
    model: Named,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="'stdlib', a text file or a folder; may be given several times", show_default="the run's own"
        ),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="of a run: texts that were not trained on, whole, and each file apart")
    ] = False,
    cut: Annotated[str, typer.Option(help=", ".join(CUTS))] = "windows",
    context: Annotated[int, typer.Option(help="tokens of a sliding window that are given, not scored")] = 0,
    num_sequences: Annotated[int, typer.Option(help="pieces of each text, evenly spread; 0 for all")] = 64,
    num_samples: Annotated[int, typer.Option(help="network passes for each of them")] = 64,
    tolerance: Annotated[
        float | None,
        typer.Option(help="bits per byte: as many passes as each text's interval should take to be within +- this"),
    ] = None,
    proposal: Annotated[str, typer.Option(help="stratified, systematic, uniform or harmonic")] = "stratified",
    seed: Annotated[int, typer.Option(help="of the masks")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="file for the numbers; a killed evaluation goes on where it was")
    ] = None,
    tokenizer: TokenizerOf = None,
    mask_index: MaskIndex = None,
    length: Annotated[int | None, typer.Option(help="tokens in a piece", show_default="all the model takes")] = None,
    trust_remote_code: Trust = False,
    device: Device = None,
) -> None:
    """Likelihood of texts: nats, bits and perplexity, with 95% intervals of what masking leaves open.

    For a model of the uniform graph it is the bound that the integral over its noise gives. Under torchrun the ranks
    share the pieces.
    """
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance: expected a positive number of bits per byte, got {tolerance}")
    _check_seed(seed)
    if num_sequences < 0:
        raise ValueError(f"num_sequences: expected at least 1, or 0 for all, got {num_sequences}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        if json_file.is_dir():
            raise ValueError(f"json: expected a file, but {json_file} is a folder")
    with ranks() as (rank, local):
        place = _device(device or (f"cuda:{local}" if torch.cuda.is_available() else None))
        scored = load(
            model, place, tokenizer=tokenizer, mask_index=mask_index, length=length, trust_remote_code=trust_remote_code
        )
        uniform = scored.graph.mask_index is None
        if uniform and (tolerance is not None or proposal != "stratified"):
            raise ValueError("tolerance, proposal: not for a model of the uniform graph, integrated over its noise")
        texts = {
            name: [tokens_of(scored.tokenizer, document) for document in documents]
            for name, documents in _texts(model, data, whole)
        }
        short = [name for name, documents in texts.items() if sum(len(d.ids) for d in documents) < scored.length]
        if cut == "windows" and 0 < len(short) < len(texts):
            texts = {name: documents for name, documents in texts.items() if name not in short}
            if rank == 0:
                typer.echo(f"shorter than a window of {scored.length} tokens, left out: {', '.join(short)}", err=True)
        rows, options = {}, dict[str, Any](num_samples=num_samples, seed=seed)
        settings = dict(model=model, files=_versions(model), mask_index=scored.graph.mask_index)
        for name, documents in texts.items():
            found = list(pieces(name, documents, scored.length, cut=cut, context=context, most=num_sequences or None))
            if not uniform:
                options |= dict(proposal=proposal, tolerance=_nats(tolerance, found))
            estimate = likelihoods(scored, found, settings, json_file, **options)
            rows[name] = row(estimate, found)
        if rank == 0:
            _show_rows(rows, f"{model}, {cut} of {scored.length} tokens, {proposal}")
            missed = [name for name, found in rows.items() if tolerance is not None and _masking(found) > tolerance]
            if missed:
                names = ", ".join(missed)
                typer.echo(f"wider than ± {tolerance} bits per byte: {names}; try more --num-samples", err=True)
            if json_file is not None:
                write_atomically(json_file, json.dumps(rows, indent=1).encode() + b"\n")
                forget(json_file)


def _texts(model: str, data: list[str] | None, whole: bool) -> Iterator[tuple[str, list[bytes]]]:
    """Names of texts and their documents; those that a run was trained on without what it saw."""
    run = Path(model) if (Path(model) / "config.json").is_file() and ":" not in model else None
    config = None if run is None else _read_run(run)
    if config is None and not data:
        raise ValueError(f"data: expected texts, for {model} has none of its own")
    for name in data or [config["data"]["path"]]:  # type: ignore[index]
        if config is not None and not whole:
            text = Text(load_documents(name, run), config["model"]["max_length"], seed=config["training"]["seed"])
            own = config["data"]["path"] in (name, str(Path(name).resolve()))
            if own and text.fingerprint != config["source"]["fingerprint"]:
                raise ValueError(
                    f"data: {name} has changed since {run} was trained on it, and so has its held-out part"
                )
            yield f"held-out part of {name}", [bytes(text.validation_bytes.tolist())]
        else:
            parts: dict[str, list[bytes]] = {}
            for part, document in load_named_documents(name, run):
                parts.setdefault(part, []).append(document)
            yield from parts.items()


def _nats(tolerance: float | None, found: list[Piece]) -> float | None:
    """A tolerance for each piece, in nats: their errors add up in squares."""
    if tolerance is None:
        return None
    return tolerance * math.log(2) * sum(piece.bytes for piece in found) / math.sqrt(len(found))


def _versions(model: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a model's files."""
    path = Path(model.partition(":")[2] or model)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def _show_rows(rows: dict[str, dict[str, Any]], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in (
        "text",
        "pieces",
        "passes",
        "nats",
        "bits per byte",
        "± masking, 95%",
        "± between pieces, 95%",
        "perplexity per token",
        "per word",
    ):
        table.add_column(column, justify="left" if column == "text" else "right")
    for name, found in rows.items():
        spread, n = found["bits_per_byte_sd_between_pieces"], found["pieces"]
        table.add_row(
            name,
            f"{n}",
            f"{found['network_passes']}",
            f"{found['nll']:.1f}",
            f"{found['bits_per_byte']:.4f}",
            f"{_masking(found):.4f}",
            "one piece" if spread is None else f"{_half(spread / math.sqrt(n), n):.4f}",
            f"{found['perplexity_per_token']:.3f}",
            f"{found['perplexity_per_word']:.4g}",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _masking(row: dict[str, Any]) -> float:
    """Half of the 95% interval of a text's bits per byte that masking leaves open."""
    low, high = row["bits_per_byte_interval"]
    return (high - low) / 2


def _half(stderr: float, n: int) -> float:
    """Half of the 95% interval of a mean over n values."""
    return student_t(0.95, torch.tensor(n - 1.0)).item() * stderr


@app.command()
def sample(
    model: Named,
    prompt: Annotated[str, typer.Option(help="text to go on from")] = "",
    infill: Annotated[str | None, typer.Option(help="text with {n} where n tokens are to be filled in")] = None,
    length: Annotated[
        int | None, typer.Option(help="tokens (bytes of a run), with the prompt", show_default="all the model takes")
    ] = None,
    sampler: Annotated[str, typer.Option(help=", ".join(SAMPLERS))] = "tweedie",
    steps: Annotated[int | None, typer.Option(help="steps", show_default="as many as tokens to draw")] = None,
    block_length: Annotated[int | None, typer.Option(help="for the last four samplers; else one block")] = None,
    guidance: Annotated[float, typer.Option(help="classifier-free; 0 is none")] = 0.0,
    temperature: Annotated[float, typer.Option(help="below 1: more likely tokens; 0: the likeliest")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="draw from so many likeliest tokens")] = None,
    top_p: Annotated[float | None, typer.Option(help="draw from the likeliest tokens of so much probability")] = None,
    num_samples: Annotated[int, typer.Option(help="texts to draw")] = 1,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    show: Annotated[bool, typer.Option("--show", help="also how each text came about")] = False,
    tokenizer: TokenizerOf = None,
    mask_index: MaskIndex = None,
    trust_remote_code: Trust = False,
    device: Device = None,
) -> None:
    """Draw texts: whole ones, after a prompt, or where an infill leaves room."""
    _check_seed(seed)
    options: dict[str, Any] = dict(tokenizer=tokenizer, mask_index=mask_index, trust_remote_code=trust_remote_code)
    loaded = load(model, _device(device), **options)
    graph, most = loaded.graph, loaded.length
    given = loaded.front + loaded.tokenizer.encode(prompt, add_special_tokens=False)
    if length is not None:
        _check_number("length", length, most)
    if prompt:
        _check_number("prompt", len(given) - len(loaded.front), length or most)
    # scores of the absorbing graph hold its conditionals, for the samplers that ask for these
    by_score = loaded.conditionals is None or (loaded.score is not None and sampler in TIMED)
    network: Any = loaded.score if by_score else loaded.conditionals
    room = None if infill is None else torch.tensor(loaded.front + _blanks(infill, loaded.tokenizer, most))
    drawn = draw_samples(
        network,
        num_samples=num_samples,
        length=None if infill is not None else len(loaded.front) + (length or most),
        steps=steps,
        graph=graph,
        parametrization=loaded.parametrization if by_score else "logits",
        sampler=sampler,
        prompt=torch.tensor(given) if given else None,
        infill=room,
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
                typer.echo(f"{step:4}  {_dotted(trajectory[step].tolist(), graph.mask_index, loaded.tokenizer)}")
        typer.echo(loaded.tokenizer.decode(text.tolist(), skip_special_tokens=True))


def _blanks(text: str, tokenizer: Tokenizer, most: int) -> list[int]:
    """The tokens of a text, and -1 for each of the n tokens that a "{n}" in it stands for; `most` of both."""
    parts = re.split(r"\{(\d+)\}", text)  # texts and numbers by turns
    tokens = [tokenizer.encode(part, add_special_tokens=False) for part in parts[::2]]
    counts = [int(count) for count in parts[1::2]]
    _check_number("infill", sum(counts) + sum(map(len, tokens)), most)
    whole = [*tokens[0]]
    for count, behind in zip(counts, tokens[1:], strict=True):
        whole += [-1] * count + behind
    return whole


def _check_seed(seed: int) -> None:
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a number of 64 bits, got {seed}")


def _check_number(option: str, n: int, most: int) -> None:
    if not 1 <= n <= most:
        raise ValueError(f"{option}: expected 1 to {most} tokens, got {n}")


def _dotted(tokens: list[int], mask_index: int | None, tokenizer: Tokenizer) -> str:
    """Tokens on one line, a dot for each mask."""
    runs = itertools.groupby(tokens, key=lambda token: token == mask_index)
    text = "".join("·" * len(list(run)) if masked else tokenizer.decode(list(run)) for masked, run in runs)
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
