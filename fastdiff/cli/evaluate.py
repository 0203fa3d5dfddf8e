"""`fastdiff eval`."""

import json
import math
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastdiff.cli.models import load_named, no_room
from fastdiff.cli.options import (
    BatchSize,
    Dtype,
    ExcludeMask,
    MaskIndex,
    Named,
    Place,
    Shift,
    TokenizerOf,
    Trust,
    check_file,
    check_seed,
    half_of,
    read_run,
    versions,
)
from fastdiff.data.shards import Shards, TokenFolder, is_tokens
from fastdiff.data.sources import Text, TokenSource, load_named_documents
from fastdiff.data.texts import CUTS, Piece, pieces, tokens_of
from fastdiff.estimators import NLLEstimate
from fastdiff.estimators.corpus import STAGE, enough
from fastdiff.estimators.orders import ORDERS
from fastdiff.files import write_atomically
from fastdiff.likelihood import forget, likelihoods, ranks, row
from fastdiff.loading import Loaded

_MOST_TEXT = 2**26  # bytes of the held-out documents of a folder of tokens, evenly spread
_MOST_SAMPLES = 4096  # of a tolerance
_TITLES = {
    "time-free": "time-free likelihood",
    "block": "block by block",
    "bound": "the bound of uniform noise",
    "integral": "the integral over time, as published",
    **{order: f"one order, {order}" for order in ORDERS},
}
_OPTIONS: dict[str, dict[str, Any]] = {  # what each takes, and what stands for None
    "time-free": dict(num_samples=64, proposal="stratified", tolerance=None),
    "block": dict(num_samples=64, proposal="stratified", tolerance=None),
    "bound": dict(num_samples=64),
    "integral": dict(num_samples=64),
    **{order: dict(tokens_per_step=1, block_length=None) for order in ORDERS},
}


def evaluate(
    model: Named,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="'stdlib', a text file or a folder, of tokens too; may be given several times. Of what a run was "
            "trained on, and of tokens, the held-out part; of others all, each file apart",
            show_default="the run's own",
        ),
    ] = None,
    cut: Annotated[str, typer.Option(help=", ".join(CUTS))] = "windows",
    context: Annotated[int, typer.Option(help="tokens of a sliding window that are given, not scored")] = 0,
    num_sequences: Annotated[int, typer.Option(help="pieces of each text, evenly spread; 0 for all")] = 64,
    num_samples: Annotated[int | None, typer.Option(help="network passes for each of them", show_default="64")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="bits per byte: as many passes as a text's interval of masking takes to be within +- this"),
    ] = None,
    likelihood: Annotated[
        str,
        typer.Option(
            help="time-free; integral, as the model's own codebase prints it; or one order that tokens are revealed "
            f"in: {', '.join(ORDERS)}"
        ),
    ] = "time-free",
    tokens_per_step: Annotated[
        int | None, typer.Option(help="of an order: tokens revealed in a pass", show_default="1")
    ] = None,
    block_length: Annotated[
        int | None, typer.Option(help="of an order: positions of blocks filled one by one", show_default="one block")
    ] = None,
    proposal: Annotated[
        str | None, typer.Option(help="stratified, systematic, uniform or harmonic", show_default="stratified")
    ] = None,
    seed: Annotated[int, typer.Option(help="of the masks")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="file for the numbers; a killed evaluation goes on where it was")
    ] = None,
    tokenizer: TokenizerOf = None,
    mask_index: MaskIndex = None,
    length: Annotated[int | None, typer.Option(help="tokens in a piece", show_default="all the model takes")] = None,
    batch_size: BatchSize = None,
    dtype: Dtype = None,
    shift: Shift = None,
    exclude_mask: ExcludeMask = None,
    trust_remote_code: Trust = False,
    device: Place = None,
) -> None:
    """Likelihood of texts: nats, bits and perplexity, with 95% intervals of what masking leaves open.

    Along one order nothing is left open, and there is no interval. A model of uniform noise, alone or mixed with masks,
    which has no time-free likelihood, gives the bound of its whole integral over noise; a run trained in blocks, the
    likelihood of each block given those before. Under torchrun the ranks share the pieces.
    """
    check_file("json", json_file)
    with ranks() as (rank, local):
        place = device or (f"cuda:{local}" if torch.cuda.is_available() else None)
        named = dict(tokenizer=tokenizer, mask_index=mask_index, length=length, shift=shift, exclude_mask=exclude_mask)
        scored = load_named(model, place, dtype, trust_remote_code=trust_remote_code, **named)
        rows, how = rows_of(
            scored,
            named | dict(model=model),
            _texts(model, data),
            json_file,
            cut=cut,
            context=context,
            num_sequences=num_sequences,
            likelihood=likelihood,
            seed=seed,
            batch_size=batch_size,
            num_samples=num_samples,
            proposal=proposal,
            tolerance=tolerance,
            tokens_per_step=tokens_per_step,
            block_length=block_length,
        )
        if rank == 0:
            _show_rows(rows, f"{model}, {how}")
            missed = [name for name, found in rows.items() if tolerance is not None and _masking(found) > tolerance]
            if missed:
                names = ", ".join(missed)
                typer.echo(f"wider than ± {tolerance} bits per byte: {names}; try more --num-samples", err=True)
            if json_file is not None:
                write_atomically(json_file, json.dumps(rows, indent=1).encode() + b"\n")
                forget(json_file)


def rows_of(
    scored: Loaded,
    named: dict[str, Any],
    texts: Iterable[tuple[str, list[bytes]]],
    kept: Path | None,
    *,
    cut: str = "windows",
    context: int = 0,
    num_sequences: int = 64,
    likelihood: str = "time-free",
    seed: int = 0,
    batch_size: int | None = None,
    tolerance: float | None = None,
    **asked: Any,
) -> tuple[dict[str, dict[str, Any]], str]:
    """Numbers of each text, by its name, and what they are in words; the options are those of `fastdiff eval`.

    Args:
        named: model, and what it was loaded with; kept numbers of others are not used.
    """
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"tolerance: expected a positive number of bits per byte, got {tolerance}")
    check_seed(seed)
    if num_sequences < 0:
        raise ValueError(f"num_sequences: expected at least 1, or 0 for all, got {num_sequences}")
    kind = scored.name_of(likelihood)
    own = _options(kind, asked | dict(tolerance=tolerance))
    own.pop("tolerance", None)  # the whole text's, not an estimate's
    tokens = {name: [tokens_of(scored.tokenizer, document) for document in documents] for name, documents in texts}
    short = [name for name, documents in tokens.items() if sum(len(d.ids) for d in documents) < scored.length]
    if cut == "windows" and 0 < len(short) < len(tokens):
        tokens = {name: documents for name, documents in tokens.items() if name not in short}
        warnings.warn(f"shorter than a window of {scored.length} tokens, left out: {', '.join(short)}", stacklevel=2)
    rows, drawn = {}, kind not in ORDERS
    blocks = dict(block_length=scored.block_length) if kind == "block" else {}
    options = own | dict(likelihood=likelihood, batch_size=batch_size, **(dict(seed=seed) if drawn else {}))
    settings = named | dict(files=versions(named["model"]), mask_index=scored.graph.mask_index)
    settings |= dict(dtype=str(scored.dtype), device=scored.device.type)
    for name, documents in tokens.items():
        found = list(pieces(name, documents, scored.length, cut=cut, context=context, most=num_sequences or None))
        spent = 0
        with no_room(scored.device, scored.num_bytes, "a smaller --batch-size"):
            if tolerance is not None:
                start, nats = options | dict(num_samples=own["num_samples"]), _nats_per_token(tolerance, found)
                options["num_samples"], spent = _passes(scored, found, settings, kept, start, nats)
            estimate = likelihoods(scored, found, settings, kept, **options)
        numbers = row(estimate, found, drawn=drawn)
        numbers["network_passes"] += spent
        rows[name] = dict(likelihood=kind) | ({} if drawn else own) | blocks | numbers
    return rows, f"{cut} of {scored.length} tokens, {_TITLES[kind]}{_how(own | blocks)}"


def _options(kind: str, asked: dict[str, Any]) -> dict[str, Any]:
    """What the likelihood takes, as asked for or by default."""
    for name, value in asked.items():
        if value is not None and name not in _OPTIONS[kind]:
            raise ValueError(f"{name}: not for {_TITLES[kind]}, got {value}")
    return {name: default if asked.get(name) is None else asked[name] for name, default in _OPTIONS[kind].items()}


def _how(options: dict[str, Any]) -> str:
    """The rest of a title."""
    said = dict(proposal="{}", tokens_per_step="{} a step", block_length="blocks of {}")
    return "".join(f", {said[name].format(value)}" for name, value in options.items() if name in said and value)


def _texts(model: str, data: list[str] | None) -> Iterator[tuple[str, list[bytes]]]:
    """Names of texts and their documents; of those that a run was trained on, what it did not see."""
    run = Path(model) if (Path(model) / "config.json").is_file() and ":" not in model else None
    config = None if run is None else read_run(run)
    if config is None and not data:
        raise ValueError(f"data: expected texts, for {model} has none of its own")
    for name in data or [config["data"]["path"]]:  # type: ignore[index]
        if is_tokens(name):
            if config is not None and _is_own(name, config):
                source = Shards(name, config["model"]["max_length"], seed=config["training"]["seed"])
                _check_same(name, source, run, config)
            yield f"held-out part of {name}", list(TokenFolder(name).held_out_documents(_MOST_TEXT))
            continue
        documents = load_named_documents(name, run)
        held_out = None if config is None else _held_out([text for _, text in documents], name, run, config)
        if held_out is not None:
            yield f"held-out part of {name}", [held_out]
        else:
            yield from _by_name(documents).items()


def _is_own(name: str, config: dict[str, Any]) -> bool:
    return config["data"]["path"] in (name, str(Path(name).resolve()))


def _held_out(documents: list[bytes], name: str, run: Path | None, config: dict[str, Any]) -> bytes | None:
    """What a run held out of documents, if it was trained on them, wherever they lie now."""
    own = _is_own(name, config)
    try:
        text = Text(documents, config["model"]["max_length"], seed=config["training"]["seed"])
    except ValueError:  # too short to have been trained on
        if own:
            raise
        return None
    if own:
        _check_same(name, text, run, config)
    if text.fingerprint == config["source"]["fingerprint"]:
        return bytes(text.validation_bytes.tolist())
    if name != "stdlib" and Path(name).resolve().is_relative_to(config["data"]["path"]):
        warnings.warn(f"data: {name} is in the folder that {run} was trained on, and not held out", stacklevel=3)
    return None


def _by_name(documents: list[tuple[str, bytes]]) -> dict[str, list[bytes]]:
    found: dict[str, list[bytes]] = {}
    for name, document in documents:
        found.setdefault(name, []).append(document)
    return found


def _check_same(name: str, source: TokenSource, run: Path | None, config: dict[str, Any]) -> None:
    if source.fingerprint != config["source"]["fingerprint"]:
        raise ValueError(f"data: {name} has changed since {run} was trained on it, and so has its held-out part")


def _passes(
    scored: Loaded,
    pieces: list[Piece],
    settings: dict[str, Any],
    kept: Path | None,
    options: dict[str, Any],
    nats: float,
) -> tuple[int, int]:
    """Of each piece, for an interval within +- nats per token, and of pilots: these have draws of their own."""

    def pilot(which: Tensor, num_samples: int, stage: int) -> NLLEstimate:
        some = [pieces[k] for k in which.tolist()]
        drawn = dict(num_samples=num_samples, seed=options["seed"] ^ stage << STAGE)
        return likelihoods(scored, some, settings, kept, **options | drawn)

    return enough(pilot, len(pieces), options["num_samples"], _MOST_SAMPLES, nats)


def _nats_per_token(bits_per_byte: float, pieces: list[Piece]) -> float:
    return bits_per_byte * math.log(2) * sum(p.bytes for p in pieces) / sum(len(p.target) for p in pieces)


def _show_rows(rows: dict[str, dict[str, Any]], title: str) -> None:
    table = Table(title=title, title_justify="left")
    for column in _cells(*next(iter(rows.items()))):
        table.add_column(column, justify="left" if column == "text" else "right")
    for name, found in rows.items():
        table.add_row(*_cells(name, found).values())
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _cells(name: str, found: dict[str, Any]) -> dict[str, str]:
    spread, n = found["bits_per_byte_sd_between_pieces"], found["pieces"]
    masking = {"± masking, 95%": f"{_masking(found):.4f}"} if "bits_per_byte_interval" in found else {}
    return {
        "text": name,
        "pieces": f"{n}",
        "passes": f"{found['network_passes']}",
        "nats": f"{found['nll']:.1f}",
        "bits per byte": f"{found['bits_per_byte']:.4f}",
        **masking,
        "± between pieces, 95%": "one piece" if spread is None else f"{half_of(spread / math.sqrt(n), n):.4f}",
        "perplexity per token": f"{found['perplexity_per_token']:.3f}",
        "per word": f"{found['perplexity_per_word']:.4g}",
    }


def _masking(row: dict[str, Any]) -> float:
    """Half of the 95% interval of a text's bits per byte that masking leaves open."""
    low, high = row["bits_per_byte_interval"]
    return (high - low) / 2
