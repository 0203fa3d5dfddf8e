"""The papers' experiments in small, on real text: python -m examples.experiments all, or one by its name.

What is done is not done again, and what was stopped goes on: networks and results stay in --out.
"""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from . import auditing, bits, dna, generation, information, markov, page, ratio, variance, zero_shot
from .report import Setup
from .workers import side_by_side

EXPERIMENTS = {
    "bits": bits,
    "zero_shot": zero_shot,
    "auditing": auditing,
    "generation": generation,
    "information": information,
    "variance": variance,
    "ratio": ratio,
    "dna": dna,
    "markov": markov,
}

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Where networks and results go.")] = Path("runs/experiments"),
    text: Annotated[
        Path | None, typer.Option(help="A file of English, such as text8; without one, the King James Bible.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help='The model to look into: a run, "KIND:PATH" or "hf:PATH", as of fastdiff eval.'),
    ] = None,
    steps: Annotated[int, typer.Option(help="Of training, for each network.")] = 1500,
    quick: Annotated[bool, typer.Option(help="A few steps of everything, to see that it runs.")] = False,
) -> None:
    context.obj = Setup(out / "quick" if quick else out, text, model, 4 if quick else steps, quick)


@app.command("all")
def every(context: typer.Context) -> None:
    """Every experiment that has no results yet: bits, which trains the networks, then all others side by side."""
    setup = context.obj
    left = [name for name in EXPERIMENTS if not (setup.out / f"{name}.json").exists()]
    left.sort(key=lambda name: -EXPERIMENTS[name].MINUTES)  # so that none goes on long after the others
    if "bits" in left:
        left.remove("bits")
        bits.run(setup)
    for _ in side_by_side(partial(EXPERIMENTS[name].run, setup) for name in left):
        pass


@app.command("page")
def show(
    context: typer.Context,
    to: Annotated[Path, typer.Option(help="The page, in markdown; pictures go beside it.")] = Path(
        "runs/experiments/README.md"
    ),
) -> None:
    """One page of all results that are there."""
    page.write(context.obj.out, EXPERIMENTS, to)


def add(name: str) -> None:
    experiment = EXPERIMENTS[name]

    def command(context: typer.Context) -> None:
        experiment.run(context.obj)

    about = f"{experiment.run.__doc__} About {experiment.MINUTES} minutes."
    app.command(name, help=about)(command)


for name in EXPERIMENTS:
    add(name)

if __name__ == "__main__":
    app()
