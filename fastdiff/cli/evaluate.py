"""`fastdiff eval`."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from fastdiff.cli.options import Device, MaskIndex, Named, TokenizerOf, Trust, check_seed, device_of, half_of, read_run
from fastdiff.data import Text, TokenSource, load_documents, load_named_documents
from fastdiff.likelihood import forget, likelihoods, ranks, row
from fastdiff.loading import load
from fastdiff.model import write_atomically
from fastdiff.shards import Shards, TokenFolder, is_tokens
from fastdiff.texts import CUTS, Piece, pieces, tokens_of

_MOST_TEXT = 2**26  # bytes of the held-out documents of a folder of tokens, evenly spread


def evaluate(
    model: Named,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="'stdlib', a text file or a folder, of tokens too (their held-out texts); may be given several times",
            show_default="the run's own",
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
    check_seed(seed)
    if num_sequences < 0:
        raise ValueError(f"num_sequences: expected at least 1, or 0 for all, got {num_sequences}")
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        if json_file.is_dir():
            raise ValueError(f"json: expected a file, but {json_file} is a folder")
    with ranks() as (rank, local):
        place = device_of(device or (f"cuda:{local}" if torch.cuda.is_available() else None))
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
    config = None if run is None else read_run(run)
    if config is None and not data:
        raise ValueError(f"data: expected texts, for {model} has none of its own")
    for name in data or [config["data"]["path"]]:  # type: ignore[index]
        own = config is not None and config["data"]["path"] in (name, str(Path(name).resolve()))
        if is_tokens(name):
            if config is not None and own:
                source = Shards(name, config["model"]["max_length"], seed=config["training"]["seed"])
                _check_same(name, source, run, config)
            yield f"held-out part of {name}", list(TokenFolder(name).held_out_documents(_MOST_TEXT))
        elif config is not None and not whole:
            text = Text(load_documents(name, run), config["model"]["max_length"], seed=config["training"]["seed"])
            if own:
                _check_same(name, text, run, config)
            yield f"held-out part of {name}", [bytes(text.validation_bytes.tolist())]
        else:
            parts: dict[str, list[bytes]] = {}
            for part, document in load_named_documents(name, run):
                parts.setdefault(part, []).append(document)
            yield from parts.items()


def _check_same(name: str, source: TokenSource, run: Path | None, config: dict[str, Any]) -> None:
    if source.fingerprint != config["source"]["fingerprint"]:
        raise ValueError(f"data: {name} has changed since {run} was trained on it, and so has its held-out part")


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
            "one piece" if spread is None else f"{half_of(spread / math.sqrt(n), n):.4f}",
            f"{found['perplexity_per_token']:.3f}",
            f"{found['perplexity_per_word']:.4g}",
        )
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _masking(row: dict[str, Any]) -> float:
    """Half of the 95% interval of a text's bits per byte that masking leaves open."""
    low, high = row["bits_per_byte_interval"]
    return (high - low) / 2
