"""SEDD (louaaron/Score-Entropy-Discrete-Diffusion): its score entropy, its forward noise and its reverse steps.

Methods of the codebase's own names and signatures; one assignment puts one in its place:

    graph_lib.Absorbing.score_entropy = fastdiff.integrations.sedd.Absorbing.score_entropy

and so for `Uniform`, for `sample_transition`, and for `sampling.AnalyticPredictor.update_fn` and its like.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastdiff import graphs
from fastdiff.losses import dse_loss
from fastdiff.noising import corrupt
from fastdiff.reverse import reverse_step


class Absorbing:
    """For `graph_lib.Absorbing`: dim states, of which the last is the mask."""

    dim: int

    def score_entropy(self, score: Tensor, sigma: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        """Score entropy of each token in nats per unit of sigma, [B, L] float32; 0 where x is not the mask.

        Args:
            score: [B, L, dim] log score, in any float type. sigma: [B, 1] total noise.
            x, x0: [B, L] int64 noised and clean tokens.

        Raises:
            ValueError, TypeError: as `fastdiff.dse_loss`.
        """
        return dse_loss(score, sigma, x, x0)

    def sample_transition(self, i: Tensor, sigma: Tensor) -> Tensor:
        """Tokens i [B, L] int64 noised to total noise sigma [B, 1], named by a seed from torch's generator."""
        return corrupt(i, sigma, graphs.Absorbing(self.dim))


class UnscaledAbsorbing:
    """For `graph_lib.Absorbing`, once `model.scale_by_sigma` has been turned off to save the tail its passes."""

    def score_entropy(self, score: Tensor, sigma: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        """`Absorbing.score_entropy` of score - log(expm1(sigma)) - log(dim - 1), which the model's tail would give."""
        return dse_loss(score, sigma, x, x0, parametrization="scale_by_sigma")


class Uniform:
    """For `graph_lib.Uniform`: dim states."""

    dim: int

    def score_entropy(self, score: Tensor, sigma: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        """Score entropy of each token, [B, L]; arguments and errors as `Absorbing.score_entropy`."""
        return dse_loss(score, sigma, x, x0, graph="uniform")

    def sample_transition(self, i: Tensor, sigma: Tensor) -> Tensor:
        """Tokens i [B, L] int64 noised to total noise sigma [B, 1], named by a seed from torch's generator."""
        return corrupt(i, sigma, graphs.Uniform(self.dim))


ScoreFn = Callable[[Tensor, Tensor], Tensor]  # x [B, L], sigma [B, 1] -> score [B, L, dim], not its logarithm


class _Step:
    graph: Any  # graph.absorb says which of the two it is
    noise: Callable[[Tensor], tuple[Tensor, Tensor]]


class AnalyticPredictor(_Step):
    """For `sampling.AnalyticPredictor`."""

    def update_fn(self, score_fn: ScoreFn, x: Tensor, t: Tensor, step_size: float) -> Tensor:
        """Tokens [B, L] at time t - step_size, drawn given x [B, L] at time t [B, 1]; errors as `reverse_step`."""
        return _draw(self, score_fn, x, self.noise(t)[0], sigma_next=self.noise(t - step_size)[0])


class EulerPredictor(_Step):
    """For `sampling.EulerPredictor`."""

    def update_fn(self, score_fn: ScoreFn, x: Tensor, t: Tensor, step_size: float) -> Tensor:
        """As `AnalyticPredictor.update_fn`, by the rates at time t; entries below 0 count as 0."""
        sigma, dsigma = self.noise(t)
        return _draw(self, score_fn, x, sigma, step_size=step_size * dsigma)


class Denoiser(_Step):
    """For `sampling.Denoiser`."""

    def update_fn(self, score_fn: ScoreFn, x: Tensor, t: Tensor) -> Tensor:
        """Tokens [B, L] with no noise left, drawn given x [B, L] at time t [B, 1]; errors as `reverse_step`."""
        return _draw(self, score_fn, x, self.noise(t)[0], sigma_next=0)


def _draw(step: _Step, score_fn: ScoreFn, x: Tensor, sigma: Tensor, **move: Any) -> Tensor:
    log_score = score_fn(x, sigma).float().log()  # in bfloat16 the logarithm would be off by up to 3%
    return reverse_step(log_score, x, sigma, graph="absorb" if step.graph.absorb else "uniform", **move)
