"""How much of x0 is left in its noised version: the mutual information, and the rate at which noise removes it."""

import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_tensor
from fastdiff.estimators.score_entropy import EntropyScorer, ScoreModel, score_entropies
from fastdiff.estimators.scoring import Model, Scorer
from fastdiff.estimators.time_free import draw_names
from fastdiff.files import write_atomically
from fastdiff.noise.graphs import Absorbing, Graph, Uniform
from fastdiff.noise.noising import Masked, mask_tokens
from fastdiff.philox import Purpose, draw32, scaled
from fastdiff.schedules import Schedule


@dataclass(frozen=True, eq=False)
class InformationCurve:
    """Mutual information of x0 and its noised version along the noise, in nats per sequence.

    Attributes:
        times: [T + 1] float64: 0, then the times asked for.
        integrand: [T + 1] float64, how fast the information falls.
        integrand_stderr: [T + 1] float64.
        information: [T + 1] float64, I(x0; xt) less what xt still tells at the last time; at time 0 all of it.
        information_stderr: [T + 1] float64.
        variable: what times are, "lambda" or "t".
        num_forwards: network passes spent on all sequences.
    """

    times: Tensor
    integrand: Tensor
    integrand_stderr: Tensor
    information: Tensor
    information_stderr: Tensor
    variable: str
    num_forwards: int

    def to_dict(self) -> dict[str, Any]:
        """Lists of T + 1 numbers, the variable and num_forwards, ready for JSON."""
        return {name: v.tolist() if isinstance(v, Tensor) else v for name, v in vars(self).items()}

    def plot(self, path: str | os.PathLike) -> None:
        """Saves a picture of both curves with their 95% bands; the name's ending tells the format.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("plotting needs matplotlib: pip install matplotlib") from None
        figure = Figure(figsize=(8, 3.5), layout="constrained")
        panels = {
            f"information lost per unit of {self.variable} (nats)": (self.integrand, self.integrand_stderr),
            "information left (nats)": (self.information, self.information_stderr),
        }
        for axes, (label, (mean, stderr)) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            x, low, high = (column.tolist() for column in (self.times, mean - 1.96 * stderr, mean + 1.96 * stderr))
            axes.plot(x, mean.tolist())
            axes.fill_between(x, low, high, alpha=0.3, linewidth=0)
            axes.set(xlabel=self.variable, ylabel=label, xlim=(0, x[-1]))
        picture, path = io.BytesIO(), Path(path)
        figure.savefig(picture, format=path.suffix[1:] or None, dpi=150)
        write_atomically(path, picture.getvalue())


def mutual_information(
    model: Model | ScoreModel,
    x0: Tensor,
    *,
    graph: Graph,
    schedule: Schedule | None = None,
    num_samples: int = 64,
    times: Tensor | None = None,
    parametrization: str = "log_score",
    exclude_mask: bool = True,
    batch_size: int | None = None,
    seed: int | Tensor | None = 0,
    sample_ids: Tensor | None = None,
    backend: str | None = None,
) -> InformationCurve:
    """The mutual information of data and noised data along the noise, in nats, with standard errors (Jeon et al. 2025).

    - Without a schedule, model gives the conditionals c of the absorbing graph, times are the probability lambda of a
      mask, and (I-MDCE) `- d/d lambda I(x0; x_lambda) = mdce(lambda) / lambda`, with
      `mdce(lambda) = E[sum_{i masked} -log c(x0_i | x_lambda)]`. At lambda = 0 the information is the entropy, or for
      a model that is not exact, the mean NLL.
    - With a schedule, model gives scores, and (I-MDSE) `- d/dt I(x0; x_t) = mdse(t) = dsigma(t) E[sum_i l_i]`, l as in
      `dse_loss`. What x_1 still tells of x0 is not counted; where sigma(0) > 0, time 0 is not yet the data.

    Expectations are over x0 too: the B sequences stand for the data, and standard errors, from the spread between
    them, hold the choice of sequences as well as that of the noise. The information is the integral from each time to
    the last, by the trapezoidal rule, whose error falls with the square of the spacing. At time 0 the integrand of
    scores is that of the line through the first two times.

    Args:
        model: as in `time_free_nll` without a schedule, as in `dse_nll` with one.
        x0: [B, L] int64 tokens, B >= 2, drawn from the data.
        graph: Absorbing(V, mask_index), or with a schedule also Uniform(V).
        schedule: the noise of a score model.
        num_samples: network passes for each sequence and time.
        times: [T] floats in (0, 1], T >= 2, rising; None means 1/32, 2/32, ..., 1.
        parametrization: what a score model gives, as in `dse_loss`.
        exclude_mask: whether the softmax of conditionals leaves out the mask, as in `dce_loss`.
        batch_size, seed, sample_ids, backend: as in `time_free_nll`.

    Raises:
        TypeError: graph or schedule does not fit; otherwise as `time_free_nll` and `dse_nll`.
        ValueError: fewer than 2 sequences; times that are not as above, or of infinite noise; otherwise as
            `time_free_nll` and `dse_nll`.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {num_samples}")
    check_tensor("x0", x0)
    if len(x0) < 2:
        raise ValueError(f"x0: expected at least 2 sequences for a standard error, got {len(x0)}")
    seed, sample_ids = draw_names(x0, seed, sample_ids)
    asked = _check_times(times, x0.device)
    times = torch.cat([asked.new_zeros(1), asked])
    level = times.repeat_interleave(num_samples).expand(len(x0), -1)
    if schedule is None:
        if not isinstance(graph, Absorbing):
            raise TypeError(f"graph: expected Absorbing where no schedule is given, got {graph!r}")
        score = Scorer(model, x0, graph.mask_index, exclude_mask=exclude_mask, batch_size=batch_size, backend=backend)
        rate = _masked_rates(score, level, seed, sample_ids).unflatten(1, (-1, num_samples)).mean(2)
    else:
        if not isinstance(graph, Absorbing | Uniform):
            raise TypeError(f"graph: expected Absorbing or Uniform, got {graph!r}")
        scores = EntropyScorer(model, x0, graph, schedule, parametrization, batch_size, backend=backend)
        level = level[:, num_samples:]  # a score has no meaning without noise
        sigma, dsigma = schedule(level)
        if not sigma.isfinite().all():
            raise ValueError(f"times: expected times of finite noise, got {asked[-1].item()} of {schedule}")
        rate = dsigma * score_entropies(scores, sigma, sigma, seed, sample_ids)
        rate = rate.unflatten(1, (-1, num_samples)).mean(2)
        slope = (rate[:, 1] - rate[:, 0]) / (asked[1] - asked[0])
        rate = torch.cat([(rate[:, 0] - slope * asked[0]).unsqueeze(1), rate], 1)
    lost = torch.cat([rate.new_zeros(len(rate), 1), torch.cumulative_trapezoid(rate, times, dim=1)], 1)
    information = lost[:, -1:] - lost
    root = math.sqrt(len(x0))
    return InformationCurve(
        times=times,
        integrand=rate.mean(0),
        integrand_stderr=rate.std(0) / root,
        information=information.mean(0),
        information_stderr=information.std(0) / root,
        variable="lambda" if schedule is None else "t",
        num_forwards=level.numel(),
    )


def _masked_rates(score: Scorer, level: Tensor, seed: Tensor, sample_ids: Tensor) -> Tensor:
    """Unbiased values [B, P] of mdce(lambda) / lambda at levels lambda [B, P] in [0, 1].

    One token is masked for certain, the others with probability lambda: L times the mean loss of the masked ones has
    the same expectation as 1 / lambda times their sum where each is masked with probability lambda, and less variance.
    """
    passes, length = level.shape[1], score.x0.shape[1]
    rate = torch.zeros_like(level)
    with score.evaluating(level.numel()):
        for rows in score.batches(level.numel()):
            which, step = rows // passes, rows % passes
            x0, names = score.x0[which], sample_ids[which]
            mask = mask_tokens(
                x0,
                level[which, step],
                mask_index=score.mask_index,
                seed=seed,
                step=step,
                sample_ids=names,
                backend=score.backend,
            ).mask
            certain = scaled(draw32(seed, Purpose.COUNT, step, names, 0, 0), length)
            mask = mask.scatter(1, certain.unsqueeze(1), True)
            loss = score(which, Masked(x0.masked_fill(mask, score.mask_index), mask))
            rate[which, step] = length * loss.sum(1) / mask.sum(1)
    return rate


def _check_times(times: Tensor | None, device: torch.device) -> Tensor:
    if times is None:
        return torch.arange(1, 33, dtype=torch.float64, device=device) / 32
    check_tensor("times", times)
    if not times.is_floating_point():
        raise TypeError(f"times: expected floating-point numbers, got {times.dtype}")
    if times.dim() != 1 or len(times) < 2:
        raise ValueError(f"times: expected shape [T] with T >= 2, got {tuple(times.shape)}")
    times = times.to(device, torch.float64)
    if not (times[0] > 0 and times[-1] <= 1 and (times.diff() > 0).all()):
        raise ValueError(f"times: expected rising numbers in (0, 1], got {times.tolist()}")
    return times
