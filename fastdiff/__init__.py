"""Fused kernels for discrete-diffusion language models: losses, masking and likelihoods, each in one pass."""

from fastdiff.backends import BackendUnavailable
from fastdiff.blocks import MaskedBlocks, block_causal, mask_blocks, two_streams, two_streams_mask
from fastdiff.d3pm import d3pm_loss, linear_d3pm_loss
from fastdiff.distillation import distill_loss, linear_distill_loss
from fastdiff.estimators import (
    InformationCurve,
    LogRatioEstimate,
    NLLEstimate,
    OrderedNLL,
    block_nll,
    conditional_nll,
    dse_nll,
    exact_nll,
    log_likelihood_ratio,
    mutual_information,
    one_pass_nll,
    ordered_nll,
    time_free_nll,
    time_integral_nll,
    upper_bound_nll,
)
from fastdiff.graphs import Absorbing, Uniform
from fastdiff.implicit_score import implicit_score_entropy
from fastdiff.leave_one_out import linear_loo_loss, loo_loss
from fastdiff.linear_losses import linear_dce_loss, linear_dse_loss
from fastdiff.logps import linear_token_logps, token_logps
from fastdiff.losses import RowStats, dce_loss, dse_loss
from fastdiff.mixture import linear_mixture_loss, mixture_loss
from fastdiff.mixture_noise import Mixture, mixture_reverse_step, mixture_weight
from fastdiff.noising import (
    HarmonicMask,
    Masked,
    corrupt,
    harmonic_mask,
    mask_exactly,
    mask_tokens,
    sample_mask_counts,
    sample_times,
)
from fastdiff.ops.scored_rows import scored_rows
from fastdiff.preferences import DPOLoss, GRPOLoss, dpo_loss, grpo_loss
from fastdiff.reverse import reverse_probs, reverse_step
from fastdiff.sampling import Generated, sample
from fastdiff.schedules import Cosine, Geometric, Hybrid, Linear, LogLinear, Polynomial
from fastdiff.score_matching import csm_loss, linear_csm_loss
from fastdiff.soft_embeddings import linear_soft_embeddings
from fastdiff.times import ImportanceTimes
from fastdiff.tokens import TokenStats, linear_sample_tokens, sample_tokens

__version__ = "0.1.0"

__all__ = [
    "Absorbing",
    "BackendUnavailable",
    "Cosine",
    "DPOLoss",
    "GRPOLoss",
    "Generated",
    "Geometric",
    "HarmonicMask",
    "Hybrid",
    "ImportanceTimes",
    "InformationCurve",
    "Linear",
    "LogLinear",
    "LogRatioEstimate",
    "Masked",
    "MaskedBlocks",
    "Mixture",
    "NLLEstimate",
    "OrderedNLL",
    "Polynomial",
    "RowStats",
    "TokenStats",
    "Uniform",
    "block_causal",
    "block_nll",
    "conditional_nll",
    "corrupt",
    "csm_loss",
    "d3pm_loss",
    "dce_loss",
    "distill_loss",
    "dpo_loss",
    "dse_loss",
    "dse_nll",
    "exact_nll",
    "grpo_loss",
    "harmonic_mask",
    "implicit_score_entropy",
    "linear_csm_loss",
    "linear_d3pm_loss",
    "linear_dce_loss",
    "linear_distill_loss",
    "linear_dse_loss",
    "linear_loo_loss",
    "linear_mixture_loss",
    "linear_sample_tokens",
    "linear_soft_embeddings",
    "linear_token_logps",
    "log_likelihood_ratio",
    "loo_loss",
    "mask_blocks",
    "mask_exactly",
    "mask_tokens",
    "mixture_loss",
    "mixture_reverse_step",
    "mixture_weight",
    "mutual_information",
    "one_pass_nll",
    "ordered_nll",
    "reverse_probs",
    "reverse_step",
    "sample",
    "sample_mask_counts",
    "sample_times",
    "sample_tokens",
    "scored_rows",
    "time_free_nll",
    "time_integral_nll",
    "token_logps",
    "two_streams",
    "two_streams_mask",
    "upper_bound_nll",
]
