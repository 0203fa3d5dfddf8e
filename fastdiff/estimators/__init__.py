"""Likelihood estimators: a model's conditionals in, negative log-likelihoods with standard errors out."""

from fastdiff.estimators.estimate import NLLEstimate
from fastdiff.estimators.time_free import exact_nll, time_free_nll

__all__ = ["NLLEstimate", "exact_nll", "time_free_nll"]
