"""flow_matching: the generalised KL of its discrete paths, with a path and a scheduler."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from fastdiff.integrations import flow_matching
from standins import Case, Problem, published


class SchedulerOutput(NamedTuple):
    alpha_t: Tensor
    d_alpha_t: Tensor


class PolynomialConvexScheduler:
    """alpha = t^n."""

    def __init__(self, n):
        self.n = n

    def __call__(self, t):
        return SchedulerOutput(alpha_t=t**self.n, d_alpha_t=self.n * t ** (self.n - 1))


class MixtureDiscreteProbPath:
    def __init__(self, scheduler):
        self.scheduler = scheduler


class MixturePathGeneralizedKL(_Loss):
    def __init__(self, path, reduction="mean"):
        super().__init__(None, None, reduction)
        self.path = path

    def forward(self, logits, x_1, x_t, t):
        """log p of every token, then p of every token; one entry of each is used."""
        log_p = torch.log_softmax(logits, dim=-1)
        log_p_1 = log_p.gather(-1, x_1[..., None]).squeeze(-1)
        p_t = torch.exp(log_p).gather(-1, x_t[..., None]).squeeze(-1)
        schedule = self.path.scheduler(t)
        rate = schedule.d_alpha_t / (1 - schedule.alpha_t)
        rate = rate[(...,) + (None,) * (x_1.dim() - 1)].expand(x_1.shape)
        same = (x_t == x_1).to(log_p.dtype)
        loss = -rate * (p_t - same + (1 - same) * log_p_1)
        if self.reduction == "none":
            return loss
        if self.reduction not in ("mean", "sum"):
            raise ValueError(self.reduction)
        return loss.mean() if self.reduction == "mean" else loss.sum()


PUBLISHED = published("flow_matching", *(f"flow_matching{part}" for part in ("", ".loss", ".path", ".path.scheduler")))
MixturePathGeneralizedKL = PUBLISHED["flow_matching.loss"].MixturePathGeneralizedKL
MixtureDiscreteProbPath = PUBLISHED["flow_matching.path"].MixtureDiscreteProbPath
PolynomialConvexScheduler = PUBLISHED["flow_matching.path.scheduler"].PolynomialConvexScheduler


def cases(p: Problem) -> dict[str, Case]:
    path = MixtureDiscreteProbPath(PolynomialConvexScheduler(2.0))
    theirs, ours = MixturePathGeneralizedKL(path), flow_matching.MixturePathGeneralizedKL(path)

    def pair(x_t: Tensor) -> Case:
        arguments = (p.x0, x_t, (1 - p.t).sqrt().float())  # so that a share t is noise
        return tuple(lambda network, loss=loss: loss(network(x_t).logits, *arguments) for loss in (theirs, ours))

    return {"uniform source": pair(p.moved), "mask source": pair(p.xt)}
