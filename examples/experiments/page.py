"""One page of all results, in markdown, with their pictures beside it."""

import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image  # comes with matplotlib

from fastdiff.files import write_atomically

from .report import Table

TOP = """# The papers' experiments

What the papers on score entropy (SEDD) and on information-theoretic discrete diffusion end in, in small. Columns and
notes that name the paper hold its printed numbers; every other number was measured here, by the command under it.
Minutes leave out the training of networks that an earlier command had left.

`python -m examples.experiments all` makes what is missing, or one experiment by its name, and `page` this page. Other
text comes by `--text FILE`, such as text8, and larger models by `--model`: a run, or a published checkpoint
("KIND:PATH", "hf:PATH").
"""
COLORS = 64  # of a picture, a third of its size then


def write(out: Path, experiments: dict[str, ModuleType], page: Path) -> None:
    """The results in a folder, those that are there."""
    found = {name: out / f"{name}.json" for name in experiments if (out / f"{name}.json").exists()}
    if not found:
        raise SystemExit(f"{out}: no results of experiments yet; run them first")
    page.parent.mkdir(parents=True, exist_ok=True)
    parts = [TOP]
    for name, path in found.items():
        picture = page.with_name(f"experiments_{name}.png")
        content = io.BytesIO()
        Image.open(path.with_suffix(".png")).convert("RGB").quantize(COLORS).save(content, "png", optimize=True)
        write_atomically(picture, content.getvalue())
        parts.append(section(name, experiments[name].__doc__ or "", json.loads(path.read_text()), picture))
    write_atomically(page, "\n".join(parts).encode())


def section(name: str, about: str, content: dict[str, Any], picture: Path) -> str:
    tables = [Table(**table).in_markdown() for table in content["tables"]]
    return (
        "\n\n".join([f"## {name}", about.strip(), *tables, f"![{name}]({picture.name})", origin(content["made"])])
        + "\n"
    )


def origin(made: dict[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in made["versions"].items())
    return (
        f"`{made['command']}`: {made['seconds'] / 60:.1f} minutes on {made['threads']} threads ({made['machine']}), "
        f"{made['cpu_seconds'] / 60:.1f} CPU minutes; text: {made['text']}; model: {made['model']}; {versions}."
    )
