"""Likelihood estimators: a model's conditionals or scores in, negative log-likelihoods with standard errors out."""

from fastdiff.estimators.block import block_nll
from fastdiff.estimators.corpus import CorpusEstimate, corpus_nll
from fastdiff.estimators.estimate import LogRatioEstimate, NLLEstimate
from fastdiff.estimators.information import InformationCurve, mutual_information
from fastdiff.estimators.one_pass import one_pass_nll
from fastdiff.estimators.orders import OrderedNLL, ordered_nll
from fastdiff.estimators.ratio import log_likelihood_ratio
from fastdiff.estimators.score_entropy import dse_nll
from fastdiff.estimators.time_free import conditional_nll, exact_nll, time_free_nll
from fastdiff.estimators.time_integral import time_integral_nll
from fastdiff.estimators.upper_bound import upper_bound_nll

__all__ = [
    "CorpusEstimate",
    "InformationCurve",
    "LogRatioEstimate",
    "NLLEstimate",
    "OrderedNLL",
    "block_nll",
    "conditional_nll",
    "corpus_nll",
    "dse_nll",
    "exact_nll",
    "log_likelihood_ratio",
    "mutual_information",
    "one_pass_nll",
    "ordered_nll",
    "time_free_nll",
    "time_integral_nll",
    "upper_bound_nll",
]
