"""Options that commands share, and what is done with them."""

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from fastdiff.estimators.estimate import student_t
from fastdiff.files import read_config
from fastdiff.model import ModelConfig
from fastdiff.published import KINDS
from fastdiff.training import TrainConfig

DTYPES = ("float32", "bfloat16", "float16")

Named = Annotated[str, typer.Argument(help=f"run folder, or KIND:PATH of a published model: {', '.join(KINDS)}, hf")]
TokenizerOf = Annotated[
    str | None, typer.Option(help="its folder or name, as transformers takes it", show_default="the model's folder")
]
MaskIndex = Annotated[int | None, typer.Option(help="the mask's id", show_default="what the model says")]
Shift = Annotated[
    bool | None, typer.Option(help="of hf: the logits at i predict token i + 1", show_default="yes for Dream, else no")
]
ExcludeMask = Annotated[
    bool | None, typer.Option(help="leave the mask out of the softmax", show_default="no for hf, else yes")
]
BatchSize = Annotated[
    int | None, typer.Option(help="sequences in a network pass", show_default="what 256 MB of logits hold")
]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the model")]
Device = Annotated[str | None, typer.Option(help="torch device", show_default="cuda if there is one, else cpu")]
Place = Annotated[
    str | None,
    typer.Option(
        "--device", help="torch device; auto: all GPUs together", show_default="cuda if there is one, else cpu"
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help=f"of the weights: {', '.join(DTYPES)}", show_default="float32; of hf what the model says"),
]


def device_of(name: str | None) -> torch.device:
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device: {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return torch.device(name)


def check_seed(seed: int) -> None:
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a number of 64 bits, got {seed}")


def check_file(name: str, file: Path | None) -> None:
    """Makes the folder of a file to write, if there is one."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise ValueError(f"{name}: expected a file, but {file} is a folder")


def versions(model: str) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a model's files."""
    path = Path(model.partition(":")[2] or model)
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]


def read_run(run: Path) -> dict[str, Any]:
    config = read_config(run)
    try:
        ModelConfig(**config["model"]), TrainConfig(**config["training"])
        config["data"]["path"], config["source"]["fingerprint"]
    except (KeyError, TypeError):
        raise ValueError(f"{run / 'config.json'}: expected the training and data of a `fastdiff train` run") from None
    return config


def half_of(stderr: float, n: int) -> float:
    """Half of the 95% interval of a mean over n values."""
    return student_t(0.95, torch.tensor(n - 1.0)).item() * stderr


def show(title: str, rows: dict[str, str]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
