"""Likelihood estimators: a model's conditionals in, negative log-likelihoods with standard errors out."""

from fastdiff.estimators.estimate import LogRatioEstimate, NLLEstimate
from fastdiff.estimators.ratio import log_likelihood_ratio
from fastdiff.estimators.time_free import conditional_nll, exact_nll, time_free_nll

__all__ = ["LogRatioEstimate", "NLLEstimate", "conditional_nll", "exact_nll", "log_likelihood_ratio", "time_free_nll"]
