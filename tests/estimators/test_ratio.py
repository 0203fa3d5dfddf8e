import math

import pytest
import torch
from networks import RandomNetwork, random_tokens
from oracles import markov_chain, mixture

from fastdiff.estimators import LogRatioEstimate, exact_nll, log_likelihood_ratio, time_free_nll
from fastdiff.estimators.time_free import PROPOSALS

ORACLE = markov_chain(4)
X = ORACLE.sample(1, 20, seed=1)
Y = X.clone()
Y[0, [3, 9, 10]] = (Y[0, [3, 9, 10]] + 1) % 4


def z_score(estimate: LogRatioEstimate, truth: float) -> float:
    repeats = len(estimate.log_ratio)
    return ((estimate.log_ratio.mean() - truth) / (estimate.log_ratio.std() / math.sqrt(repeats))).item()


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_ratios_are_unbiased_and_coupled(proposal: str) -> None:
    truth = (ORACLE.nll(Y) - ORACLE.nll(X)).item()
    options = dict(mask_index=4, num_samples=32, proposal=proposal)
    x, y = X.expand(400, -1), Y.expand(400, -1)
    ratio = log_likelihood_ratio(ORACLE, x, y, **options)
    assert abs(z_score(ratio, truth)) < 3.5
    low, high = ratio.interval()
    assert 0.88 < ((low <= truth) & (truth <= high)).double().mean().item() < 0.99
    apart = time_free_nll(ORACLE, y, seed=1, **options).nll - time_free_nll(ORACLE, x, **options).nll
    assert ratio.log_ratio.var() < 0.9 * apart.var()


def test_masking_only_where_they_differ_is_the_same_ratio_of_consistent_conditionals() -> None:
    truth = ORACLE.nll(Y) - ORACLE.nll(X)
    ratio = log_likelihood_ratio(ORACLE, X, Y, mask_index=4, restrict=True)
    torch.testing.assert_close(ratio.log_ratio, truth)
    assert ratio.num_forwards.tolist() == [14]
    assert ratio.stderr.tolist() == [0]


def test_masking_only_where_they_differ_is_another_ratio_of_a_network() -> None:
    network, x, y = RandomNetwork(8), random_tokens(1, 8), random_tokens(1, 8, seed=4)
    y[0, :5] = x[0, :5]
    differ = x != y
    ratio = log_likelihood_ratio(network, x, y, mask_index=4, num_samples=255, restrict=True)
    nll_x, nll_y = (exact_nll(network, tokens, mask_index=4, target=differ).nll for tokens in (x, y))
    torch.testing.assert_close(ratio.log_ratio, nll_y - nll_x)
    full = log_likelihood_ratio(network, x, y, mask_index=4, num_samples=255)
    nll_x, nll_y = (exact_nll(network, tokens, mask_index=4).nll for tokens in (x, y))
    torch.testing.assert_close(full.log_ratio, nll_y - nll_x)
    assert abs((full.log_ratio - ratio.log_ratio).item()) > 0.1


REFERENCE = markov_chain(4, seed=1)


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_a_reference_meets_the_same_masks(proposal: str) -> None:
    """The margin is unbiased, its error is that of the difference, and smaller than with masks of its own."""
    nll = [oracle.nll(tokens).item() for oracle in (ORACLE, REFERENCE) for tokens in (X, Y)]
    truth = nll[1] - nll[0] - (nll[3] - nll[2])
    options = dict(x=X.expand(150, -1), y=Y.expand(150, -1), mask_index=4, num_samples=32, proposal=proposal)
    margin = log_likelihood_ratio(ORACLE, reference=REFERENCE, **options)
    assert abs(z_score(margin, truth)) < 3.5
    low, high = margin.interval()
    assert 0.88 < ((low <= truth) & (truth <= high)).double().mean().item() <= 1
    assert margin.num_forwards.unique().item() == 2 * log_likelihood_ratio(ORACLE, **options).num_forwards[0]
    near = log_likelihood_ratio(Sharpened(ORACLE), reference=ORACLE, **options)
    other = log_likelihood_ratio(ORACLE, seed=1, **options).log_ratio
    apart = log_likelihood_ratio(Sharpened(ORACLE), **options).log_ratio - other
    assert near.log_ratio.var() < 0.2 * apart.var()


class Sharpened:
    """An oracle a little surer than it should be."""

    def __init__(self, oracle) -> None:
        self.oracle = oracle

    def __call__(self, xt: torch.Tensor) -> torch.Tensor:
        return 1.1 * self.oracle(xt)


@pytest.mark.parametrize("num_samples", [8, 1023])
def test_a_margin_to_itself_is_0(num_samples: int) -> None:
    network, x, y = RandomNetwork(8), random_tokens(3, 8), random_tokens(3, 8, seed=4)
    network.head.requires_grad_()
    for proposal in PROPOSALS:
        options = dict(mask_index=4, num_samples=num_samples, proposal=proposal, differentiable=True)
        margin = log_likelihood_ratio(network, x, y, reference=network, **options)
        for column in (margin.log_ratio, margin.stderr, margin.variance):
            assert column.tolist() == [0, 0, 0]
        slope, alone = (
            torch.autograd.grad(m.log_ratio.sum(), network.head, retain_graph=True)[0]
            for m in (margin, log_likelihood_ratio(network, x, y, **options))
        )

        assert torch.equal(slope, alone)
        if margin.variance.requires_grad:
            assert not torch.autograd.grad(margin.variance.sum(), network.head)[0].any()


def test_the_margin_of_every_subset() -> None:
    """Of other targets in x than in y, and with references in every form."""
    network, x, y = RandomNetwork(8), random_tokens(3, 8), random_tokens(3, 8, seed=4)
    target = torch.ones(3, 8, dtype=torch.bool), (torch.arange(8) < 4).expand(3, -1)
    table, lm_head = torch.nn.Embedding(5, 5).double(), torch.nn.Linear(5, 5).double()
    body = torch.nn.Sequential(table, torch.nn.Dropout(0.5))
    for reference in (RandomNetwork(8, dim=5), (body, lm_head)):
        options = dict(mask_index=4, target=target, reference=reference, differentiable=True)
        margin = log_likelihood_ratio(network, x, y, num_samples=255, **options)
        assert margin.stderr.tolist() == [0, 0, 0]
        assert not margin.log_ratio.requires_grad
        nll = [
            exact_nll(m, z, mask_index=4, target=t).nll
            for m in (network, reference)
            for z, t in zip((x, y), target, strict=True)
        ]
        torch.testing.assert_close(margin.log_ratio, (nll[1] - nll[0] - (nll[3] - nll[2])).detach())
        assert log_likelihood_ratio(network, x, y, num_samples=15, **options).stderr.gt(0).all()
    assert body.training


def test_variance_and_its_gradient_are_those_of_the_replicates() -> None:
    """Of independent passes: their sample variance over their number, by finite differences too."""
    network, x, y = RandomNetwork(8), random_tokens(2, 8), random_tokens(2, 8, seed=4)

    def variance(scale: torch.Tensor, proposal: str) -> torch.Tensor:
        options = dict(mask_index=4, num_samples=9, proposal=proposal, reference=network, differentiable=True)
        return log_likelihood_ratio(lambda xt: scale * network(xt), x, y, **options).variance

    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    for proposal in PROPOSALS[1:]:
        assert torch.autograd.gradcheck(lambda s, p=proposal: variance(s, p), scale)
    estimate = log_likelihood_ratio(network, x, y, mask_index=4, num_samples=9, proposal="uniform")
    torch.testing.assert_close(estimate.variance, estimate.stderr**2)
    chains = log_likelihood_ratio(network, x, y, mask_index=4, num_samples=9)
    torch.testing.assert_close(chains.stderr**2 / chains.variance, torch.full((2,), 1 + 5 / 7, dtype=torch.float64))


def test_equal_sequences_have_ratio_0() -> None:
    x, y = torch.cat([X, X]), torch.cat([X, Y])
    for restrict in (False, True):
        ratio = log_likelihood_ratio(ORACLE, x, y, mask_index=4, restrict=restrict)
        assert ratio.log_ratio[0].item() == 0
        assert ratio.stderr[0].item() == 0
        assert ratio.log_ratio[1].item() != 0
    only = log_likelihood_ratio(ORACLE, X, X, mask_index=4, restrict=True)
    assert only.num_forwards.tolist() == [0]


@pytest.mark.parametrize("shorter", [1, 4, 14])
def test_unequal_lengths_are_unbiased(shorter: int) -> None:
    y = Y[:, :shorter]
    truth = (ORACLE.nll(y) - ORACLE.nll(X)).item()
    ratio = log_likelihood_ratio(ORACLE, X.expand(300, -1), y.expand(300, -1), mask_index=4, num_samples=32)
    assert abs(z_score(ratio, truth)) < 3.5
    back = log_likelihood_ratio(ORACLE, y.expand(300, -1), X.expand(300, -1), mask_index=4, num_samples=32)
    torch.testing.assert_close(back.log_ratio, -ratio.log_ratio)


def test_responses_to_one_prompt() -> None:
    oracle = mixture(12, 4)
    x, y = oracle.sample(2, 12).unsqueeze(1)
    y[:, :6] = x[:, :6]
    y, lengths = y[:, :10], (torch.tensor([11]), torch.tensor([9]))
    x, targets = torch.nn.functional.pad(x[:, :11], (0, 1), value=-1), tuple(torch.arange(n) >= 6 for n in (12, 10))
    targets = tuple((t & (torch.arange(len(t)) < n))[None] for t, n in zip(targets, lengths, strict=True))
    ratio = log_likelihood_ratio(oracle_at(oracle), x, y, mask_index=oracle.mask_index, target=targets, lengths=lengths)
    padded = [torch.nn.functional.pad(z[:, :n], (0, 12 - n), value=oracle.mask_index) for z, n in ((x, 11), (y, 9))]
    nll_x, nll_y = (
        oracle.log_prob(p.where(torch.arange(12) < 6, oracle.mask_index)) - oracle.log_prob(p) for p in padded
    )
    torch.testing.assert_close(ratio.log_ratio, nll_y - nll_x)


def oracle_at(oracle):
    """The oracle on strings shorter than its own: what is missing is masked."""

    def model(xt: torch.Tensor) -> torch.Tensor:
        whole = torch.nn.functional.pad(xt, (0, 12 - xt.shape[1]), value=oracle.mask_index)
        return oracle(whole)[:, : xt.shape[1]]

    return model


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": Y.expand(2, -1)}, ValueError, r"^y: expected as many sequences as x, 1, got 2"),
        ({"y": Y[:, :4], "restrict": True}, ValueError, r"^restrict: .*same lengths, got \(1, 20\) and \(1, 4\)"),
        ({"x": X[0]}, ValueError, r"^x: expected shape \[B, L\], got \(20,\)"),
        ({"y": Y.float()}, TypeError, r"^y: .*float32"),
        ({"proposal": "best"}, ValueError, r"^proposal: "),
        ({"num_samples": 2}, ValueError, r"^num_samples: .*at least 3.*got 2"),
    ],
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        log_likelihood_ratio(**{"model": ORACLE, "x": X, "y": Y, "mask_index": 4, **change})
