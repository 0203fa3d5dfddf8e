"""Losses of tokens, in nats, from logits and from hidden states without logits."""

from fastdiff.losses.d3pm import d3pm_loss, linear_d3pm_loss
from fastdiff.losses.distillation import distill_loss, linear_distill_loss
from fastdiff.losses.implicit_score import implicit_score_entropy
from fastdiff.losses.leave_one_out import linear_loo_loss, loo_loss
from fastdiff.losses.linear_losses import linear_dce_loss, linear_dse_loss
from fastdiff.losses.logps import linear_token_logps, token_logps
from fastdiff.losses.mixture import linear_mixture_loss, mixture_loss
from fastdiff.losses.row_losses import RowStats, dce_loss, dse_loss
from fastdiff.losses.score_matching import csm_loss, linear_csm_loss

__all__ = [
    "RowStats",
    "csm_loss",
    "d3pm_loss",
    "dce_loss",
    "distill_loss",
    "dse_loss",
    "implicit_score_entropy",
    "linear_csm_loss",
    "linear_d3pm_loss",
    "linear_dce_loss",
    "linear_distill_loss",
    "linear_dse_loss",
    "linear_loo_loss",
    "linear_mixture_loss",
    "linear_token_logps",
    "loo_loss",
    "mixture_loss",
    "token_logps",
]
