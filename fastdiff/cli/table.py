"""`fastdiff table`."""

import json
import sys
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from fastdiff.cli.evaluate import rows_of
from fastdiff.cli.models import load_named
from fastdiff.cli.options import Place, check_file
from fastdiff.data.sources import load_documents
from fastdiff.files import write_atomically
from fastdiff.likelihood import forget, ranks

_LOADING = {"tokenizer", "mask_index", "length", "shift", "exclude_mask"}
_SCORING = {"cut", "context", "num_sequences", "likelihood", "seed", "num_samples", "proposal", "tolerance"}
_SCORING |= {"batch_size", "tokens_per_step", "block_length"}


def table(
    file: Annotated[Path, typer.Argument(help="JSON that names models and texts, as docs/evaluating.md says")],
    json_file: Annotated[
        Path | None, typer.Option("--json", help="file for the numbers; a killed table goes on where it was")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="file for the table")] = None,
    device: Place = None,
) -> None:
    """Perplexities per token of several models on several texts, with 95% intervals, beside published ones.

    Under torchrun the ranks share the pieces of each text.
    """
    asked = _read(file)
    check_file("json", json_file)
    check_file("markdown", markdown)
    with ranks() as (rank, local):
        place = device or (f"cuda:{local}" if torch.cuda.is_available() else None)
        found: dict[str, Any] = {}
        for name, said in asked["models"].items():
            named = {key: said.get(key) for key in sorted(_LOADING)}
            trust = said.get("trust_remote_code", False)
            scored = load_named(said["model"], place, said.get("dtype"), trust_remote_code=trust, **named)
            numbers, source = _published(said.get("published"))
            cells: dict[str, Any] = {}
            for text, of in asked["texts"].items():
                options = {key: value for key, value in (asked | of | said).items() if key in _SCORING}
                documents = [document for path in of["data"] for document in load_documents(path)]
                rows, how = rows_of(
                    scored, named | dict(model=said["model"]), [(text, documents)], json_file, **options
                )
                cells[text] = rows[text] | dict(how=how, published=numbers.get(text))
            found[name] = dict(model=said["model"], source=source, texts=cells)
        if rank == 0:
            lines = [["model", *asked["texts"]], *([name, *_cells(row)] for name, row in found.items())]
            notes = _notes(found)
            _show(lines, notes)
            if markdown is not None:
                write_atomically(markdown, _markdown(lines, notes).encode())
            if json_file is not None:
                write_atomically(json_file, json.dumps(found, indent=1).encode() + b"\n")
                forget(json_file)


def _read(file: Path) -> dict[str, Any]:
    try:
        asked = json.loads(file.read_text())
        sections: list[tuple[dict[str, Any], set[str], set[str]]] = [(asked, {"models", "texts"} | _SCORING, set())]
        sections += [(text, {"data"} | _SCORING, {"data"}) for text in asked["texts"].values()]
        known = {"model", "published", "dtype", "trust_remote_code"} | _LOADING | _SCORING
        sections += [(said, known, {"model"}) for said in asked["models"].values()]
        for section, known, needed in sections:
            if wrong := sorted(section.keys() - known | needed - section.keys()):
                raise ValueError(
                    f"expected {', '.join(sorted(known))}, and always {', '.join(needed) or 'both'}; see {wrong[0]}"
                )
    except (KeyError, AttributeError, TypeError):
        raise ValueError(f"{file}: expected an object of models and texts, by their names") from None
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return asked


def _published(numbers: str | dict[str, float] | None) -> tuple[dict[str, float], str | None]:
    """Numbers by texts, given or by their name in published_numbers.json, and where they are from."""
    if not isinstance(numbers, str):
        return numbers or {}, None if numbers is None else "the file"
    every = json.loads((files("fastdiff") / "published_numbers.json").read_text())
    for source, models in every.items():
        if numbers in models:
            return models[numbers], source
    known = ", ".join(name for models in every.values() for name in models)
    raise ValueError(f"published: expected numbers, or one of {known}, got {numbers!r}")


def _cells(row: dict[str, Any]) -> list[str]:
    """Ours, half of its interval, and what is published of each text."""
    cells = []
    for text in row["texts"].values():
        cell = f"{text['perplexity_per_token']:.2f}"
        if (interval := text.get("perplexity_per_token_interval")) is not None:
            cell += f" ± {(interval[1] - interval[0]) / 2:.2f}"
        cells.append(cell if text["published"] is None else f"{cell} / {text['published']:.2f}")
    return cells


def _notes(found: dict[str, Any]) -> list[str]:
    """What each model's numbers are, for texts that are alike in that, and where published ones are from."""
    notes = []
    for name, row in found.items():
        alike: dict[str, list[str]] = {}
        for text, cell in row["texts"].items():
            alike.setdefault(cell["how"], []).append(text)
        notes += [f"{name} on {', '.join(texts)}: {how}" for how, texts in alike.items()]
        if row["source"] is not None:
            notes.append(f"{name}: behind the stroke, {row['source']}")
    return notes


def _show(lines: list[list[str]], notes: list[str]) -> None:
    shown = Table(title="perplexity per token ± 95% / published", title_justify="left")
    for column in lines[0]:
        shown.add_column(column, justify="left" if column == "model" else "right")
    for line in lines[1:]:
        shown.add_row(*line)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(shown)
    for note in notes:
        console.print(note, highlight=False)


def _markdown(lines: list[list[str]], notes: list[str]) -> str:
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    rows = "".join(f"| {' | '.join(line)} |\n" for line in ruled)
    return "Perplexity per token ± 95% / published.\n\n" + rows + "\n" + "".join(f"- {note}\n" for note in notes)
