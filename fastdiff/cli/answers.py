"""`fastdiff answers`."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastdiff.answers import RANKINGS, read_questions, records, summary
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
    versions,
)
from fastdiff.files import write_atomically
from fastdiff.likelihood import forget, likelihoods, ranks

_SHOWN = 10  # lines of the file in the table


def answers(
    model: Named,
    data: Annotated[Path, typer.Option(help=r'a line of JSON each: {"prompt": text, "answers": \[text, ...]}')],
    chat: Annotated[
        bool, typer.Option("--chat", help="prompts by the chat template; answers are what the assistant says")
    ] = False,
    num_samples: Annotated[int, typer.Option(help="network passes for each answer")] = 64,
    tolerance: Annotated[
        float | None,
        typer.Option(help="nats: as many passes as each answer's interval should take to be within +- this"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the masks")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="file for the numbers; a killed evaluation goes on where it was")
    ] = None,
    tokenizer: TokenizerOf = None,
    mask_index: MaskIndex = None,
    batch_size: BatchSize = None,
    dtype: Dtype = None,
    shift: Shift = None,
    exclude_mask: ExcludeMask = None,
    trust_remote_code: Trust = False,
    device: Place = None,
) -> None:
    """Likelihood of answers given their prompts, which is the likeliest, and how sure that is.

    A line may have one "answer" instead, and "right", the index of the right one, for the accuracy. Under torchrun the
    ranks share the answers.
    """
    check_seed(seed)
    check_file("json", json_file)
    if json_file is not None and json_file.resolve() == data.resolve():
        raise ValueError(f"json: expected another file than the data's, got {json_file}")
    with ranks() as (rank, local):
        place = device or (f"cuda:{local}" if torch.cuda.is_available() else None)
        named = dict(tokenizer=tokenizer, mask_index=mask_index, shift=shift, exclude_mask=exclude_mask)
        loaded = load_named(model, place, dtype, trust_remote_code=trust_remote_code, **named)
        if loaded.conditionals is None:
            raise ValueError(
                f"{model}: expected a model with a mask and no uniform noise, which has no conditionals given a prompt"
            )
        loaded = loaded.in_chats() if chat else loaded
        questions = read_questions(data, loaded, chat=chat)
        pieces = [piece for question in questions for piece in question.pieces]
        settings = named | dict(model=model, files=versions(model), mask_index=loaded.graph.mask_index)
        settings |= dict(dtype=str(loaded.dtype), device=loaded.device.type)
        options: dict[str, Any] = dict(num_samples=num_samples, seed=seed, tolerance=tolerance, batch_size=batch_size)
        with no_room(loaded.device, loaded.num_bytes, "a smaller --batch-size"):
            estimate = likelihoods(loaded, pieces, settings, json_file, **options)
        if rank == 0:
            found = records(questions, estimate)
            numbers = summary(questions, estimate, found)
            console = Console(width=None if sys.stdout.isatty() else 160)
            _show_answers(found, f"{model}, {data}", console)
            _show_summary(found, numbers, console)
            low, high = estimate.interval()
            wide = 0 if tolerance is None else int((high - low > 2 * tolerance).sum())
            if wide:
                typer.echo(f"wider than ± {tolerance} nats: {wide} answers; try more --num-samples", err=True)
            if json_file is not None:
                whole = json.dumps(numbers | dict(records=found), indent=1)
                write_atomically(json_file, whole.encode() + b"\n")
                forget(json_file)


def _show_answers(found: list[dict[str, Any]], title: str, console: Console) -> None:
    table = Table(title=title, title_justify="left")
    columns = ("line", "answer", "nats", "± 95%", "per token", "per byte", "passes", "likeliest", "likeliest per byte")
    for column in columns:
        table.add_column(column, justify="left" if column == "answer" else "right")
    for record in found[:_SHOWN]:
        for k, answer in enumerate(record["answers"]):
            (low, high), right = answer["nll_interval"], " (right)" if record["right"] == k else ""
            table.add_row(
                f"{record['line']}" if k == 0 else "",
                Text(repr(answer["answer"]) + right, overflow="ellipsis", no_wrap=True),
                f"{answer['nll']:.2f}",
                f"{(high - low) / 2:.2f}",
                *(f"{answer[f'nll_per_{unit}']:.3f}" for unit in ("token", "byte")),
                f"{answer['network_passes']}",
                *(f"{record[by]['probabilities'][k]:.1%}" if by in record else "" for by in RANKINGS),
            )
        table.add_section()
    console.print(table)
    if len(found) > _SHOWN:
        console.print(f"and {len(found) - _SHOWN} more prompts")


def _show_summary(found: list[dict[str, Any]], numbers: dict[str, Any], console: Console) -> None:
    if "right" in numbers:
        of, (low, high) = numbers["right"], numbers["right"]["nll_interval"]
        console.print(
            f"{of['pieces']} right answers: {of['nll']:.1f} ± {(high - low) / 2:.1f} (95%) nats, "
            f"{of['bits_per_byte']:.4f} bits per byte, perplexity {of['perplexity_per_token']:.3f} per token"
        )
    table = Table("ranked by", "wrongly first, expected", "accuracy", "95%, questions", "95%, masking")
    for by, title in zip(RANKINGS, ("nats", "nats per byte"), strict=True):
        if errors := [record[by]["error"] for record in found if by in record]:
            cells = [title, f"{sum(errors):.1f} of {len(errors)}"]
            if "accuracy" in numbers:
                of = numbers["accuracy"][by]
                cells.append(f"{of['accuracy']:.1%} of {of['questions']}")
                cells += ["{:.1%} to {:.1%}".format(*of[f"{what}_interval"]) for what in ("questions", "masking")]
            table.add_row(*cells)
    if table.rows:
        console.print(table)
