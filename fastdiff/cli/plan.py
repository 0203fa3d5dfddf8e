"""`fastdiff plan`."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from fastdiff.checks import check_choice
from fastdiff.files import write_atomically
from fastdiff.training import LOSSES
from fastdiff.training.cards import CARDS, USABLE
from fastdiff.training.presets import COND_DIM, PRESETS

if TYPE_CHECKING:
    from fastdiff.training.planning import Plan

_OF_PRESET = "the preset's"


def _setting(text: str) -> Any:
    return typer.Option(help=text, show_default=_OF_PRESET)


def plan(
    preset: Annotated[str, typer.Option(help=", ".join(PRESETS))],
    gpus: Annotated[int, typer.Option(help="a rank each")] = 1,
    vocabulary: Annotated[int | None, _setting("size of the vocabulary, the mask included")] = None,
    length: Annotated[int | None, _setting("tokens in a sequence")] = None,
    loss: Annotated[str | None, _setting(", ".join(LOSSES))] = None,
    block_length: Annotated[int | None, _setting("tokens of a block, of block diffusion; 0: no blocks")] = None,
    batch_size: Annotated[int | None, _setting("sequences in a step, of all GPUs")] = None,
    accumulation: Annotated[int | None, _setting("parts that a rank's share of them is cut into")] = None,
    dtype: Annotated[str | None, _setting("float32 or bfloat16")] = None,
    sharding: Annotated[str | None, _setting("none, full or hybrid")] = None,
    shards: Annotated[int | None, typer.Option(help="ranks that share a copy in hybrid", show_default="8")] = None,
    recompute: Annotated[
        bool | None, typer.Option("--recompute/--no-recompute", help="run blocks again in backward")
    ] = None,
    share: Annotated[float, typer.Option(help="of the peak that is assumed to be reached")] = 0.4,
    tokens: Annotated[float | None, typer.Option(help="to train on, for days")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="file for the numbers")] = None,
) -> None:
    """What a step of training needs: memory, exchanged bytes, operations; and the cards that have it."""
    given = {name: value for name, value in locals().items() if value is not None}
    from fastdiff.training.planning import Plan

    check_choice("preset", preset, tuple(PRESETS))
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a number in (0, 1], got {share}")
    model, training = PRESETS[preset]
    names = {field.name for field in dataclasses.fields(training)}
    training = dataclasses.replace(training, **{name: given[name] for name in names & given.keys()})
    length = length or model.max_length or 1
    shape: dict[str, Any] = {"num_states": vocabulary or model.num_states, "max_length": length}
    model = dataclasses.replace(model, **shape, cond_dim=COND_DIM * training.sees_noise)
    planned = Plan(model, training, gpus, length)
    _show(preset, planned, share, tokens)
    if json_file is not None:
        numbers = _numbers(planned, share, tokens)
        write_atomically(json_file, json.dumps(numbers, indent=1).encode() + b"\n")


def _show(preset: str, planned: "Plan", share: float, tokens: float | None) -> None:
    training = planned.training
    table = Table("a step", "", title=f"{preset} on {planned.gpus} GPUs, a rank each", title_justify="left")
    table.add_row("parameters", f"{planned.parameters:,}")
    passes = f"{training.accumulation} x {planned.rows} x {planned.length} tokens"
    passes += f", twice, in blocks of {training.block_length}" if training.block_length else ""
    table.add_row("a rank's batch", f"{passes}, {training.dtype}, sharding {training.sharding}")
    for name, value in planned.memory.items():
        table.add_row(name, _bytes(value))
    table.add_row("memory of a rank, about the most", _bytes(planned.total))
    table.add_row("logits and their gradient, avoided", _bytes(planned.naive_logits))
    for name, value in planned.exchanged.items():
        table.add_row(f"a rank receives, {name}", _bytes(value))
    table.add_row("operations, all ranks", f"{planned.operations:.3g}")
    title = f"cards, {USABLE:.0%} of their memory, at {share:.0%} of their bfloat16 peak (an assumption)"
    cards = Table("card", "fits", "tokens/s", title=title, title_justify="left")
    if tokens is not None:
        cards.add_column(f"days for {tokens:.3g} tokens")
    for row in _cards(planned, share, tokens):
        rates = [f"{row[name]:,.{digits}f}" for name, digits in (("tokens_per_second", 0), ("days", 1)) if name in row]
        cards.add_row(row["card"], _fits(planned, row["accumulation"]), *rates)
    for each in (table, cards):
        Console().print(each)


def _fits(planned: "Plan", accumulation: int | None) -> str:
    if accumulation is None:
        return "no"
    return "yes" if accumulation == planned.training.accumulation else f"with --accumulation {accumulation}"


def _numbers(planned: "Plan", share: float, tokens: float | None) -> dict[str, Any]:
    names = ("parameters", "memory", "total", "naive_logits", "exchanged", "operations")
    settings = {name: dataclasses.asdict(getattr(planned, name)) for name in ("model", "training")}
    numbers = {name: getattr(planned, name) for name in ("gpus", "length", *names)}
    return settings | numbers | {"cards": _cards(planned, share, tokens)}


def _cards(planned: "Plan", share: float, tokens: float | None) -> list[dict[str, Any]]:
    rows = []
    for name, card in CARDS.items():
        row: dict[str, Any] = {"card": name, "accumulation": planned.accumulation_for(card)}
        if planned.training.dtype == "bfloat16":  # whose peak is known
            row["tokens_per_second"] = planned.tokens_per_second(card, share)
            row |= {} if tokens is None else {"days": tokens / row["tokens_per_second"] / 86400}
        rows.append(row)
    return rows


def _bytes(value: int) -> str:
    return f"{value / 1e9:,.2f} GB" if value >= 1e7 else f"{value / 1e6:,.2f} MB"
