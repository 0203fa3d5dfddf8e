"""Files: written whole or not at all, and errors that name them."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


def read_config(folder: str | os.PathLike) -> dict:
    """config.json of a model's folder, as the dictionary it holds.

    Raises:
        FileNotFoundError: the folder has no config.json.
        ValueError: it is not JSON.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: damaged or cut short: {error}") from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside the file, then rename over it, so that a reader finds the old bytes or the new ones.

    Raises:
        OSError: names the file; the old one stays, and nothing beside it.
    """
    part = path.with_name(path.name + ".part")
    with naming(path):
        try:
            with part.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # or the rename might outlive a power cut, and the bytes not
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system in the block name the file, which that of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def import_safetensors() -> ModuleType:
    """safetensors.torch, or an ImportError that says how to get it."""
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError("saving and loading needs safetensors: pip install safetensors") from None
    return safetensors.torch
