"""What every estimator returns: negative log-likelihoods, their standard errors and what they cost."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NLLEstimate:
    """Negative log-likelihoods of B sequences, in nats, with the error that random masking leaves in them.

    Attributes:
        nll: [B] float64, nats per sequence.
        stderr: [B] float64, standard error of nll; 0 where every subset was enumerated, NaN where nll is infinite.
        num_tokens: [B] int64, tokens whose likelihood this is (the prompt is not counted).
        num_forwards: [B] int64, network passes spent.
        degrees_of_freedom: [B] float64, those of stderr; infinite where stderr is 0.
        bias: [B] float64, an estimate of what the expectation of nll is too high by; 0 for unbiased estimators.
        token_nll: [B, L] float64, nats that each token contributes to nll, which is their sum; 0 off target. None where
            an estimator has no such parts.
    """

    nll: Tensor
    stderr: Tensor
    num_tokens: Tensor
    num_forwards: Tensor
    degrees_of_freedom: Tensor
    bias: Tensor
    token_nll: Tensor | None = field(default=None, kw_only=True)

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Bounds (low, high), [B] each, that hold the true value with probability `level` (Student's t).

        Raises:
            ValueError: level outside (0, 1).
        """
        return _interval(self.nll, self.stderr, self.degrees_of_freedom, level)

    @property
    def bits_per_token(self) -> Tensor:
        """nll / (num_tokens log 2): [B]."""
        return self.nll / self.num_tokens / math.log(2)

    @property
    def bits_per_token_stderr(self) -> Tensor:
        """Standard error of `bits_per_token`: [B]."""
        return self.stderr / self.num_tokens / math.log(2)

    @property
    def perplexity(self) -> Tensor:
        """exp(nll / num_tokens): [B]."""
        return torch.exp(self.nll / self.num_tokens)

    def pooled(self) -> "NLLEstimate":
        """The B sequences as one text (B = 1): nats, tokens and passes add up, and so do squared errors.

        Sequences with different names draw their masks independently. The error is that of the masking; how
        well these sequences stand for the text they were taken from is another matter. Degrees of freedom by
        Welch-Satterthwaite.
        """
        stderr, freedom = sum_of_independent(self.stderr.view(1, -1), self.degrees_of_freedom.view(1, -1))
        return dataclasses.replace(
            self,
            nll=self.nll.sum().view(1),
            stderr=stderr,
            num_tokens=self.num_tokens.sum().view(1),
            num_forwards=self.num_forwards.sum().view(1),
            degrees_of_freedom=freedom,
            bias=self.bias.sum().view(1),
            token_nll=None if self.token_nll is None else self.token_nll.view(1, -1),
        )

    def moderated(self) -> "NLLEstimate":
        """The same numbers with standard errors drawn towards those of the batch: of sequences and a model of a kind.

        An estimate that met none of the rare masks which carry its error takes it for small, and has many degrees of
        freedom; others of the batch, which met theirs, have few. Squared errors per token are averaged with their
        mean, by what of their spread degrees of freedom do not explain (Bühlmann's credibility). Errors of 0 stay.
        """
        known = (self.stderr > 0) & self.stderr.isfinite()
        if known.sum() < 2:
            return self
        square, freedom = (self.stderr**2 / self.num_tokens)[known], self.degrees_of_freedom[known]
        mean, noise = square.mean(), (2 * square**2 / (freedom + 2)).mean()
        own = (square.var() - noise).clamp(min=0)
        share = own / (own + noise)
        drawn = mean + share * (square - mean)
        error = share * noise + (1 - share) ** 2 * (own + noise) / len(square)
        stderr, degrees = self.stderr.clone(), self.degrees_of_freedom.clone()
        stderr[known] = (drawn * self.num_tokens[known]).sqrt()
        degrees[known] = (2 * drawn**2 / error).clamp(min=1)
        return dataclasses.replace(self, stderr=stderr, degrees_of_freedom=degrees)

    def to_dict(self) -> dict[str, list[Any]]:
        """Lists of B numbers, ready for JSON, 95% interval included."""
        low, high = self.interval()
        columns = {
            "nll": self.nll,
            "stderr": self.stderr,
            "low": low,
            "high": high,
            "bias": self.bias,
            "bits_per_token": self.bits_per_token,
            "perplexity": self.perplexity,
            "num_tokens": self.num_tokens,
            "num_forwards": self.num_forwards,
        }
        return {name: column.tolist() for name, column in columns.items()}


@dataclass(frozen=True, eq=False)
class LogRatioEstimate:
    """log p(x) - log p(y) of B pairs of sequences, in nats, with the error that random masking leaves in them.

    Attributes:
        log_ratio: [B] float64, nats; with a reference model, less the reference's.
        stderr: [B] float64, its standard error; 0 where every subset was enumerated.
        num_forwards: [B] int64, network passes spent on both, the reference's included.
        degrees_of_freedom: [B] float64, those of stderr; infinite where stderr is 0.
        variance: [B] float64, of log_ratio, as its replicates spread; with a gradient where log_ratio has one. The
            square of stderr also allows for what chains share through their fits, and at few passes is on average
            twice as large.
    """

    log_ratio: Tensor
    stderr: Tensor
    num_forwards: Tensor
    degrees_of_freedom: Tensor
    variance: Tensor

    def interval(self, level: float = 0.95) -> tuple[Tensor, Tensor]:
        """Bounds (low, high), [B] each, that hold the true value with probability `level` (Student's t).

        Raises:
            ValueError: level outside (0, 1).
        """
        return _interval(self.log_ratio, self.stderr, self.degrees_of_freedom, level)


def _interval(mean: Tensor, stderr: Tensor, degrees_of_freedom: Tensor, level: float) -> tuple[Tensor, Tensor]:
    half = student_t(level, degrees_of_freedom) * stderr
    return mean - half, mean + half


def sum_of_independent(stderr: Tensor, degrees_of_freedom: Tensor) -> tuple[Tensor, Tensor]:
    """Standard error of a sum of n independent numbers, from theirs [B, n], and its degrees of freedom by
    Welch-Satterthwaite: [B] each."""
    variance = stderr**2
    total, spread = variance.sum(1), (variance**2 / degrees_of_freedom).sum(1)
    return total.sqrt(), torch.where(spread > 0, total**2 / spread, math.inf)


def mean_of_independent(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of n independent values [B, n], its standard error and that one's degrees of freedom: [B] each."""
    n = values.shape[1]
    stderr = values.std(1) / math.sqrt(n)
    freedom = torch.full_like(stderr, n - 1)
    return values.mean(1), stderr, torch.where(stderr == 0, math.inf, freedom)


def mean_of_strata(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `mean_of_independent`, of one value [B, n] from each of n equal strata in their order.

    Neighbours in a ring differ by their own errors and by the drift between strata: the squared standard error, sum
    of their squared differences / (2 n^2), is on average no smaller than the variance. The ring 0, 2, 4, ..., 5, 3, 1
    keeps the two ends, which differ most, apart. Degrees of freedom by Satterthwaite; n equal normals give 2n/3.
    """
    n = values.shape[1]
    ring = torch.cat([values[:, ::2], values[:, 1::2].flip(1)], 1)
    step = ring - ring.roll(1, 1)
    stderr, square = torch.linalg.vector_norm(step, dim=1) / (math.sqrt(2) * n), step**2
    freedom = (2 * square.sum(1) ** 2 / (square**2).sum(1)).clamp(1, n)
    return values.mean(1), stderr, torch.where(stderr == 0, math.inf, freedom)


def student_t(level: float, degrees_of_freedom: Tensor) -> Tensor:
    """The t with P(|T| < t) = level for Student's T with nu degrees of freedom (>= 1, or infinite), float64.

    With T = sqrt(nu) tan(A), P(|A| < a) = c int_0^a cos(u)^(nu-1) du, c = 2 Gamma((nu+1)/2) / (sqrt(pi)
    Gamma(nu/2)). It is concave in a, so Newton's steps from 0 climb to the root and never pass it. Simpson's
    rule gives the integral.
    """
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number in (0, 1), got {level}")
    nu = degrees_of_freedom.double().clamp(max=1e6).unsqueeze(-1)  # beyond that T is normal to six digits
    nodes = torch.linspace(0, 1, 257, dtype=nu.dtype, device=nu.device)
    simpson = torch.full_like(nodes, 2 / 768)
    simpson[1::2] = 4 / 768
    simpson[[0, -1]] = 1 / 768
    c = 2 / math.sqrt(math.pi) * torch.exp(torch.lgamma((nu + 1) / 2) - torch.lgamma(nu / 2))
    a = torch.zeros_like(nu)
    for _ in range(50):
        probability = c * a * (torch.cos(a * nodes) ** (nu - 1) * simpson).sum(-1, keepdim=True)
        a = a + (level - probability) / (c * torch.cos(a) ** (nu - 1))
    return (nu.sqrt() * torch.tan(a)).squeeze(-1)
