"""How much an estimate of a likelihood varies, by network passes: four estimators, beside the paper's table 1a."""

from torch import Tensor

from fastdiff import time_free_nll
from fastdiff.estimators import time_integral_nll

from .networks import subject, unseen
from .report import Setup, reporting
from .spreads import Published, measure, of_masks, picture, table

MINUTES = 9
TIME_INTEGRAL, HARMONIC = "time integral", "harmonic"
PAPER: Published = {
    TIME_INTEGRAL: {128: 70.97, 256: 30.19, 512: 13.38},
    HARMONIC: {128: 11.57, 256: 6.02, 512: 2.92},
}


def run(setup: Setup) -> None:
    """Variance of four likelihood estimators on text, by network passes."""
    passes, texts, repeats = ((16, 32), 2, 2) if setup.quick else ((16, 32, 64, 128, 256, 512), 8, 8)
    model = subject(setup)
    x0 = unseen(setup, model, texts)
    rows, options = of_masks(model, x0, repeats)  # each row has masks of its own

    def time_free(n: int, proposal: str) -> Tensor:
        nll = time_free_nll(model.conditionals, rows, num_samples=n, proposal=proposal, **options).nll
        return nll.view(repeats, -1)

    def time_integral(n: int) -> Tensor:
        nll = time_integral_nll(model.conditionals, rows, num_samples=n, times="iid", **options).nll
        return nll.view(repeats, -1)

    with reporting("variance", setup) as report:
        measured = measure(
            {
                TIME_INTEGRAL: time_integral,
                HARMONIC: lambda n: time_free(n, "harmonic"),
                "systematic (LLaDA's)": lambda n: time_free(n, "systematic"),
                "stratified (default)": lambda n: time_free(n, "stratified"),
            },
            passes,
        )
        title = f"Variance of the NLL in nats²: {len(x0)} windows of {x0.shape[1]} tokens, {repeats} repeats of each"
        setting = "The paper's are of LLaDA, 8 billion parameters, on HellaSwag."
        report.numbers = {"ours": measured, "paper": PAPER, "texts": len(x0), "repeats": repeats}
        report.tables = [table(title, "passes", measured, PAPER, setting)]
        report.figure = picture(title, "network passes", measured)
