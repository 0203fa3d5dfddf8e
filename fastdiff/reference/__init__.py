"""The specification: every formula once, in float64 PyTorch, with no care for speed.

Rows are the last dimension: `logits` and `log_score` are [..., V], tokens and sigma [...]. Everything is
differentiable by autograd, and every other backend is tested against these. Losses are in nats.

Score entropy: Lou, Meng, Ermon, ICML 2024. Time-free likelihood: Jeon, Shin, Jeon, No, NeurIPS 2025.
"""

from fastdiff.reference.conditionals import d3pm_uniform, dce, dce_stats, leave_one_out, mixture
from fastdiff.reference.distillation import distill, kl
from fastdiff.reference.draws import exponential, kept_logits, race
from fastdiff.reference.forward import (
    mixture_limit,
    mixture_transition,
    reverse_rate,
    staggered_score,
    transition,
    transp_transition,
)
from fastdiff.reference.reverse import (
    absorb_reverse_step,
    euler_step,
    mixture_reverse_step,
    reverse_step,
    reverse_weights,
)
from fastdiff.reference.scores import (
    csm_absorb,
    csm_uniform,
    dse_absorb,
    dse_uniform,
    dse_uniform_logits,
    log_score_from_logits,
    scale_by_sigma,
    sigma_shift,
)
from fastdiff.reference.terms import phi
from fastdiff.reference.time_free import count_law, subset_weight, subsets

__all__ = [
    "absorb_reverse_step",
    "count_law",
    "csm_absorb",
    "csm_uniform",
    "d3pm_uniform",
    "dce",
    "dce_stats",
    "distill",
    "dse_absorb",
    "dse_uniform",
    "dse_uniform_logits",
    "euler_step",
    "exponential",
    "kept_logits",
    "kl",
    "leave_one_out",
    "log_score_from_logits",
    "mixture",
    "mixture_limit",
    "mixture_reverse_step",
    "mixture_transition",
    "phi",
    "race",
    "reverse_rate",
    "reverse_step",
    "reverse_weights",
    "scale_by_sigma",
    "sigma_shift",
    "staggered_score",
    "subset_weight",
    "subsets",
    "transition",
    "transp_transition",
]
