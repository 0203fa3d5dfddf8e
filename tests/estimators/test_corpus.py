"""The mean over a corpus: unbiased, with intervals that hold the mean of these texts and that of all texts."""

import math

import pytest
import torch
from oracles import Tabled, markov_chain, skewed_chain
from torch import Tensor

from fastdiff import corpus_nll, time_free_nll
from fastdiff.estimators import NLLEstimate
from fastdiff.estimators.corpus import enough, stderr_of_ratio

CHAIN, SKEWED = markov_chain(4), skewed_chain()
TABLED = Tabled(SKEWED, 8)
TEXTS = CHAIN.sample(12, 24, seed=3)
LENGTHS = torch.tensor([24, 7, 16, 24, 7, 16, 24, 7, 16, 24, 7, 16])


def holds(values: Tensor, truth: float) -> None:
    """|z| < 4."""
    z = (values.mean().item() - truth) / (values.std().item() / math.sqrt(len(values)))
    assert abs(z) < 4, f"mean {values.mean().item()}, truth {truth}, z = {z}"


def test_a_corpus_is_its_sequences() -> None:
    found = corpus_nll(CHAIN, TEXTS, mask_index=4, num_samples=8, lengths=LENGTHS)
    each = time_free_nll(CHAIN, TEXTS, mask_index=4, num_samples=8, lengths=LENGTHS)
    assert torch.equal(found.sequences.nll, each.nll)
    assert found.nll.item() == pytest.approx((each.nll.sum() / LENGTHS.sum()).item())
    assert (found.num_tokens.item(), found.num_forwards.item()) == (LENGTHS.sum().item(), 12 * 8)
    assert found.bits_per_token.item() == pytest.approx(found.nll.item() / math.log(2))
    assert found.perplexity.item() == pytest.approx(math.exp(found.nll.item()))
    assert found.masking_stderr.item() < (each.pooled().stderr / LENGTHS.sum()).item()
    both = found.masking_stderr**2 + found.sampling_stderr**2
    assert both.item() == pytest.approx(found.stderr.item() ** 2)
    (low, high), (lowest, highest) = found.interval(), found.population_interval()
    assert lowest < low < found.nll < high < highest


def test_sequences_without_error_leave_their_sampling_alone() -> None:
    short = TEXTS[:, :4]
    found = corpus_nll(CHAIN, short, mask_index=4, num_samples=15)
    truth = CHAIN.nll(short) / 4
    assert found.nll.item() == pytest.approx(truth.mean().item())
    assert found.masking_stderr.item() == 0
    assert found.stderr.item() == pytest.approx(truth.std().item() / math.sqrt(12))
    assert torch.equal(found.sampling_stderr, found.stderr)
    alone = corpus_nll(CHAIN, short[:1], mask_index=4, num_samples=15)
    assert alone.stderr.isnan()
    assert alone.interval()[0] == alone.nll


def test_the_error_of_a_ratio_is_that_of_repeats() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(5, 50, (4000, 60), generator=generator).double()
    nll = sizes * (2 + 0.3 * torch.randn(sizes.shape, generator=generator, dtype=torch.float64)) + 10
    ratios = nll.sum(1) / sizes.sum(1)
    said = torch.stack([stderr_of_ratio(*pair) for pair in zip(nll, sizes, strict=True)])
    assert said.square().mean().sqrt().item() == pytest.approx(ratios.std().item(), rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["stratified", "systematic"])
def test_a_tolerance_leaves_it_unbiased(proposal: str) -> None:
    """Of corpora whose numbers of passes hang on what pilots met, and of one of 20000 equal strings."""
    x = SKEWED.sample(10, 8, seed=1)
    options = dict(mask_index=2, num_samples=4, max_samples=12, proposal=proposal)
    tolerance = {"stratified": 0.2, "systematic": 0.1}[proposal]
    found = [corpus_nll(TABLED, x, seed=seed, tolerance=tolerance, **options) for seed in range(100)]
    assert len({estimate.num_forwards.item() for estimate in found}) > 1
    holds(torch.stack([estimate.nll for estimate in found]), (SKEWED.nll(x).sum() / x.numel()).item())
    odd = torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0]]).expand(20_000, -1)
    whole = corpus_nll(TABLED, odd, tolerance=0.004, **options)
    assert whole.num_forwards > whole.sequences.num_forwards.sum()
    holds(whole.sequences.nll, SKEWED.nll(odd[:1]).item())


@pytest.mark.slow
def test_intervals_hold_these_texts_and_those_they_are_drawn_from() -> None:
    """100 corpora of 40 strings of 16 and 24 letters."""
    lengths = torch.tensor([16, 24] * 20)
    many = CHAIN.sample(40_000, 24, seed=9)
    of_all = (CHAIN.nll(many).mean() + CHAIN.nll(many[:, :16]).mean()).item() / 40
    held = torch.zeros(2)
    for seed in range(100):
        x = CHAIN.sample(40, 24, seed=seed)
        of_these = torch.where(lengths == 24, CHAIN.nll(x), CHAIN.nll(x[:, :16])).sum().item() / 800
        found = corpus_nll(CHAIN, x, mask_index=4, num_samples=6, lengths=lengths, seed=seed)
        intervals, truths = (found.interval(), found.population_interval()), (of_these, of_all)
        held += torch.tensor([(low <= at <= high).item() for (low, high), at in zip(intervals, truths, strict=True)])
    assert (held >= 88).all(), held  # 95 of 100, and three standard deviations


def test_a_tolerance_is_reached() -> None:
    for tolerance in (0.05, 0.01):
        found = corpus_nll(CHAIN, TEXTS, mask_index=4, num_samples=8, tolerance=tolerance)
        low, high = found.interval()
        assert (high - low).item() / 2 <= tolerance
    assert found.num_forwards > found.sequences.num_forwards.sum()
    again = corpus_nll(CHAIN, TEXTS, mask_index=4, num_samples=int(found.sequences.num_forwards[0]))
    assert torch.equal(again.nll, found.nll)  # pilots leave nothing behind
    most = corpus_nll(CHAIN, TEXTS, mask_index=4, num_samples=8, tolerance=1e-9, max_samples=11)
    assert most.sequences.num_forwards.tolist() == [11] * 12


def test_a_pilot_asks_a_few_of_many() -> None:
    asked = []

    def pilot(which: Tensor, num: int, stage: int) -> NLLEstimate:
        asked.append((which.tolist(), num, stage))
        return time_free_nll(CHAIN, TEXTS[which % 12], mask_index=4, num_samples=num, seed=stage)

    num, spent = enough(pilot, 3200, 8, 4096, 0.004)
    assert [which for which, *_ in asked] == [list(range(0, 3200, 100))] * len(asked)
    assert [(tried, stage) for _, tried, stage in asked][:3] == [(8, 1), (12, 2), (18, 3)][: len(asked)]
    assert (num, spent) == (asked[-1][1], 32 * sum(tried for _, tried, _ in asked))


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="x0: expected at least one sequence, got none"):
        corpus_nll(CHAIN, TEXTS[:0], mask_index=4)
    with pytest.raises(ValueError, match="tolerance: expected a positive number of nats, got 0"):
        corpus_nll(CHAIN, TEXTS, mask_index=4, tolerance=0)
    with pytest.raises(ValueError, match="proposal: expected one of"):
        corpus_nll(CHAIN, TEXTS, mask_index=4, proposal="even")
    with pytest.raises(ValueError, match="lengths: expected lengths"):
        corpus_nll(CHAIN, TEXTS, mask_index=4, lengths=LENGTHS + 1, tolerance=1)
