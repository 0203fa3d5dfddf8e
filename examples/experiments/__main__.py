"""The papers' experiments in small, on real text: python -m examples.experiments all, or one by its name.

What is done is not done again, and what was stopped goes on: networks and results stay in --out.
"""

from pathlib import Path

import typer

from . import bits, zero_shot
from .report import Setup, console

EXPERIMENTS = {"bits": bits, "zero_shot": zero_shot}

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def main(
    context: typer.Context,
    out: Path = typer.Option(Path("runs/experiments"), help="Where networks and results go."),
    text: Path = typer.Option(None, help="A file of English, such as text8; without one, the King James Bible."),
    model: str = typer.Option(
        None, help='The model to look into: a run, "KIND:PATH" or "hf:PATH", as of fastdiff eval.'
    ),
    steps: int = typer.Option(1500, help="Of training, for each network."),
    quick: bool = typer.Option(False, help="A few steps of everything, to see that it runs."),
) -> None:
    context.obj = Setup(out / "quick" if quick else out, text, model, 4 if quick else steps, quick)


@app.command("all")
def every(context: typer.Context) -> None:
    """Every experiment that has no results yet."""
    for name, experiment in EXPERIMENTS.items():
        if not (context.obj.out / f"{name}.json").exists():
            console.rule(f"{name}, about {experiment.MINUTES} minutes")
            experiment.run(context.obj)


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
