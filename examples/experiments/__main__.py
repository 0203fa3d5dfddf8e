"""The papers' experiments in small, on real text: python -m examples.experiments all, or one by its name.

What is done is not done again, and what was stopped goes on: networks and results stay in --out.
"""

from pathlib import Path
from typing import Annotated

import typer

from . import auditing, bits, dna, generation, information, markov, page, ratio, variance, zero_shot
from .report import Setup, console

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
    """Every experiment that has no results yet."""
    for name, experiment in EXPERIMENTS.items():
        if not (context.obj.out / f"{name}.json").exists():
            console.rule(f"{name}, about {experiment.MINUTES} minutes")
            experiment.run(context.obj)


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
