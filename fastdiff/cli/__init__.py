"""The `fastdiff` command: tokenize, plan, train, eval, table, answers, sample, doctor."""

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import torch.distributed as dist

import fastdiff
from fastdiff.backends import BackendUnavailable

try:
    import rich  # noqa: F401
    import typer
except ImportError as error:
    print(f"fastdiff: {error}; install what the command needs: pip install rich safetensors typer", file=sys.stderr)
    raise SystemExit(2) from None

from fastdiff.cli.answers import answers
from fastdiff.cli.doctor import doctor
from fastdiff.cli.evaluate import evaluate
from fastdiff.cli.plan import plan
from fastdiff.cli.sample import sample
from fastdiff.cli.table import table
from fastdiff.cli.tokenize import tokenize
from fastdiff.cli.train import train

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("tokenize")(tokenize)
app.command("plan")(plan)
app.command("train")(train)
app.command("eval")(evaluate)
app.command("table")(table)
app.command("answers")(answers)
app.command("sample")(sample)
app.command("doctor")(doctor)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fastdiff {fastdiff.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="print the version", callback=_tell_version, is_eager=True)
    ] = False,
) -> None:
    """Train, score and sample discrete-diffusion language models."""


_TO_TELL = 10  # seconds
_USER_ERRORS = (ValueError, OSError, ImportError, FloatingPointError, MemoryError, BackendUnavailable)
_OF_A_LOST_RANK = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


def main() -> None:
    """Run the command line; what a user can put right ends as one line on stderr and exit code 2."""
    warnings.showwarning = lambda message, *_: print("fastdiff:", message, file=sys.stderr)
    try:
        with _progress():
            app()
    except _USER_ERRORS as error:
        if _told_by_the_first(error):
            time.sleep(_TO_TELL)  # once a rank has left, torchrun ends the others, of which the first may be late
        else:
            print("fastdiff:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:
        if not any(words in str(error) for words in _OF_A_LOST_RANK):
            raise
        print(f"fastdiff: rank {os.environ.get('RANK')} has lost another, which must have ended", file=sys.stderr)
        raise SystemExit(1) from None


@contextmanager
def _progress() -> Iterator[None]:
    """The package's log to stderr, of the first of torchrun's ranks alone."""
    log, handler = logging.getLogger("fastdiff"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("fastdiff: %(message)s"))
    level = log.level
    if os.environ.get("RANK", "0") == "0":
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def _told_by_the_first(error: Exception) -> bool:
    """Whether the first of torchrun's ranks has the same error: one of the command, or one on which ranks agreed."""
    if os.environ.get("RANK", "0") == "0" or isinstance(error, MemoryError):
        return False
    return dist.is_initialized() or isinstance(error, ValueError | FloatingPointError)
