import itertools
import math

import pytest
import torch
from networks import RandomNetwork, nll_by_chain_rule, random_tokens, z_score
from oracles import MASK_LOGIT, Oracle, dna_toy, markov_chain, mixture
from torch import Tensor

from fastdiff.estimators import conditional_nll, exact_nll, scoring, time_free, time_free_nll
from fastdiff.estimators.time_free import PROPOSALS

each_proposal = pytest.mark.parametrize("proposal", PROPOSALS)


ORACLES = {
    "mixture": (mixture(8, 3, mask_index=1), mixture(8, 3, mask_index=1).sample(4, 8)),
    "markov": (markov_chain(4), markov_chain(4).sample(4, 8)),
    "dna": (dna_toy()[0], dna_toy()[1][:4]),
}
each_oracle = pytest.mark.parametrize(("oracle", "x0"), ORACLES.values(), ids=ORACLES.keys())


@each_oracle
def test_enumeration_gives_the_nll(oracle: Oracle, x0: Tensor) -> None:
    estimate = exact_nll(oracle, x0, mask_index=oracle.mask_index)
    torch.testing.assert_close(estimate.nll, oracle.nll(x0), rtol=1e-12, atol=0)
    assert estimate.stderr.tolist() == [0] * 4
    assert estimate.num_forwards.tolist() == [255] * 4
    assert estimate.num_tokens.tolist() == [8] * 4


@each_oracle
def test_enumeration_gives_conditional_nlls(oracle: Oracle, x0: Tensor) -> None:
    target = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1, 0], [1] * 8, [0, 1] * 4]).bool()
    estimate = exact_nll(oracle, x0, mask_index=oracle.mask_index, target=target)
    torch.testing.assert_close(estimate.nll, oracle.nll(x0, target), rtol=1e-10, atol=1e-12)
    assert estimate.num_tokens.tolist() == [4, 1, 8, 4]
    # an unknown response is masked and no target: what is left is the marginal of the prompt
    target = target[:1].expand(4, 8)
    prompt = x0.masked_fill(target, oracle.mask_index)
    marginal = exact_nll(oracle, prompt, mask_index=oracle.mask_index, target=~target)
    response = exact_nll(oracle, x0, mask_index=oracle.mask_index, target=target)
    torch.testing.assert_close(marginal.nll + response.nll, oracle.nll(x0), rtol=1e-10, atol=0)


@each_oracle
def test_chain_rule_gives_the_nll_in_every_order(oracle: Oracle, x0: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        order = tuple(torch.randperm(8, generator=generator).tolist())
        assert nll_by_chain_rule(oracle, x0[:1], order) == pytest.approx(oracle.nll(x0)[0].item(), rel=1e-12)


def test_inconsistent_conditionals_give_the_average_over_orders() -> None:
    network, x0 = RandomNetwork(5), random_tokens(1, 5)
    by_order = [nll_by_chain_rule(network, x0, order) for order in itertools.permutations(range(5))]
    assert max(by_order) - min(by_order) > 1
    estimate = exact_nll(network, x0, mask_index=4)
    assert estimate.nll.item() == pytest.approx(sum(by_order) / 120, rel=1e-12)


def test_one_token_is_one_cross_entropy() -> None:
    def model(xt: Tensor) -> Tensor:
        return torch.tensor([0.3, -1.2, 2.0, MASK_LOGIT]).expand(*xt.shape, 4)

    x0 = torch.tensor([[1]])
    without = math.log(math.exp(0.3) + math.exp(-1.2) + math.exp(2.0)) + 1.2
    full = math.log(math.exp(0.3) + math.exp(-1.2) + math.exp(2.0) + math.exp(MASK_LOGIT)) + 1.2
    for proposal in PROPOSALS:
        estimate = time_free_nll(model, x0, mask_index=3, num_samples=1, proposal=proposal)
        assert estimate.nll.item() == pytest.approx(without, rel=1e-6)
        assert estimate.stderr.item() == 0
        assert estimate.num_forwards.item() == 1
    assert exact_nll(model, x0, mask_index=3, exclude_mask=False).nll.item() == pytest.approx(full, rel=1e-6)


@each_proposal
def test_subsets_that_fit_the_budget_are_enumerated(proposal: str) -> None:
    network, x0 = RandomNetwork(5), random_tokens(2, 5)
    exact = exact_nll(network, x0, mask_index=4)
    fits = time_free_nll(network, x0, mask_index=4, num_samples=31, proposal=proposal)
    assert torch.equal(fits.nll, exact.nll)
    assert fits.stderr.tolist() == [0, 0]
    assert fits.interval()[0].tolist() == fits.nll.tolist()
    assert (time_free_nll(network, x0, mask_index=4, num_samples=30, proposal=proposal).stderr > 0).all()


@each_proposal
@pytest.mark.parametrize(("num_samples", "repeats"), [(4, 2000), (12, 1000), (100, 300)])
def test_estimates_are_unbiased_without_consistency(proposal: str, num_samples: int, repeats: int) -> None:
    network, x0 = RandomNetwork(8), random_tokens(1, 8)
    target = torch.tensor([[True, True, False, True, True, True, True, True]])
    truth = exact_nll(network, x0, mask_index=4, target=target)
    estimate = time_free_nll(
        network,
        x0.expand(repeats, -1),
        mask_index=4,
        num_samples=num_samples,
        proposal=proposal,
        target=target.expand(repeats, -1),
    )
    assert abs(z_score(estimate, truth.nll)) < 3.5
    rms_stderr = estimate.stderr.square().mean().sqrt()
    least, most = (0.9, 2.5) if proposal == "stratified" and num_samples < 30 else (0.8, 1.3)
    assert least < (rms_stderr / estimate.nll.std()).item() < most


@each_proposal
@pytest.mark.parametrize("oracle", [mixture(12, 5), markov_chain(4)], ids=["mixture", "markov"])
def test_estimates_are_unbiased_on_oracles(oracle: Oracle, proposal: str) -> None:
    x0 = oracle.sample(1, 12, seed=1).expand(600, -1)
    estimate = time_free_nll(oracle, x0, mask_index=oracle.mask_index, num_samples=17, proposal=proposal)
    assert abs(z_score(estimate, oracle.nll(x0[:1]))) < 3.5


@each_proposal
def test_intervals_cover_as_often_as_they_say(proposal: str) -> None:
    network, x0 = RandomNetwork(9), random_tokens(1, 9)
    truth = exact_nll(network, x0, mask_index=4).nll
    estimate = time_free_nll(network, x0.expand(1000, -1), mask_index=4, num_samples=33, proposal=proposal)
    for level, (least, most) in {0.95: (0.92, 0.98), 0.5: (0.45, 0.58)}.items():
        low, high = estimate.interval(level)
        covered = ((low <= truth) & (truth <= high)).double().mean().item()
        assert least < covered < most


@pytest.mark.parametrize("oracle", [mixture(32, 6, components=4), markov_chain(8)], ids=["mixture", "markov"])
def test_stratified_beats_systematic_beats_harmonic(oracle: Oracle) -> None:
    x0 = oracle.sample(1, 32, seed=5).expand(200, -1)
    variance = {}
    for proposal in PROPOSALS:
        estimate = time_free_nll(oracle, x0, mask_index=oracle.mask_index, num_samples=64, proposal=proposal)
        variance[proposal] = estimate.nll.var().item()
    assert 4 * variance["stratified"] < variance["systematic"] < 1.2 * variance["uniform"]
    assert 5 * variance["uniform"] < variance["harmonic"]


@pytest.mark.parametrize(
    "oracle", [mixture(16, 6), markov_chain(4), markov_chain(8, seed=2)], ids=["mixture", "markov", "sharp"]
)
def test_intervals_of_stratified_hold_the_truth_on_oracles(oracle: Oracle) -> None:
    x0 = oracle.sample(1, 16, seed=2)
    estimate = time_free_nll(oracle, x0.expand(500, -1), mask_index=oracle.mask_index, num_samples=64)
    low, high = estimate.interval()
    truth = oracle.nll(x0)
    assert 0.89 < ((low <= truth) & (truth <= high)).double().mean().item() < 0.98


def test_systematic_counts_lie_at_equal_distances() -> None:
    network, x0 = RandomNetwork(30), random_tokens(200, 30)
    time_free_nll(network, x0, mask_index=4, num_samples=10, proposal="systematic")
    counts = torch.cat(network.asked).view(200, 10, 30).eq(4).sum(2)
    assert torch.equal(counts.diff(), torch.full((200, 9), 3))
    assert counts[:, 0].unique().tolist() == [1, 2, 3]


@each_proposal
def test_padding_is_never_seen(proposal: str) -> None:
    lengths = torch.tensor([7, 10, 7, 4])
    x0 = random_tokens(4, 10).masked_fill(torch.arange(10) >= lengths.unsqueeze(1), -100)
    options = dict(mask_index=4, num_samples=16, proposal=proposal)
    batch = time_free_nll(PerLength(), x0, lengths=lengths, **options)
    assert batch.num_tokens.tolist() == lengths.tolist()
    for b, n in enumerate(lengths.tolist()):
        one = time_free_nll(PerLength(), x0[b : b + 1, :n], sample_ids=torch.tensor([b]), **options)
        torch.testing.assert_close(batch.nll[b : b + 1], one.nll, rtol=1e-12, atol=0)
        torch.testing.assert_close(batch.stderr[b : b + 1], one.stderr, rtol=1e-9, atol=0)


class PerLength:
    """A random network for each length; no token below 0 reaches it."""

    def __call__(self, xt: Tensor) -> Tensor:
        assert (xt >= 0).all()
        return RandomNetwork(xt.shape[1])(xt)


def test_a_response_given_its_prompt() -> None:
    oracle = markov_chain(4)
    x0 = oracle.sample(3, 12)
    prompt, response = [x0[0, :5], x0[1, :0], x0[2, :7]], [x0[0, 5:10], x0[1], x0[2, 7:12]]
    estimate = conditional_nll(oracle, prompt, response, mask_index=4, num_samples=63)
    assert estimate.num_tokens.tolist() == [5, 12, 5]
    for b in (0, 2):
        truth = oracle.nll(torch.cat([prompt[b], response[b]])[None]) - oracle.nll(prompt[b][None])
        torch.testing.assert_close(estimate.nll[b : b + 1], truth)  # 31 subsets: enumerated
    low, high = estimate.interval(0.999)
    assert low[1] < oracle.nll(x0[1:2]) < high[1]
    rectangular = conditional_nll(oracle, x0[:, :7], x0[:, 7:], mask_index=4)
    torch.testing.assert_close(rectangular.nll, oracle.nll(x0) - oracle.nll(x0[:, :7]))
    nothing = conditional_nll(oracle, [], [], mask_index=4)
    assert all(len(column) == 0 for column in vars(nothing).values())
    with pytest.raises(ValueError, match=r"^response: expected as many as prompts, 3, got 2"):
        conditional_nll(oracle, prompt, response[:2], mask_index=4)
    with pytest.raises(ValueError, match=r"^prompt: expected one row of tokens"):
        conditional_nll(oracle, [x0[:1]], [x0[0]], mask_index=4)
    with pytest.raises(TypeError, match=r"^response: .*float32"):
        conditional_nll(oracle, x0[:, :2], x0[:, 2:].float(), mask_index=4)
    with pytest.raises(ValueError, match=r"^target: expected at least one position"):
        conditional_nll(oracle, x0, x0[:, :0], mask_index=4)


def test_two_models_meet_the_same_masks() -> None:
    first, second, x0 = RandomNetwork(10), RandomNetwork(10), random_tokens(2, 10)
    second.head = second.head + 0.01
    for model in (first, second):
        time_free_nll(model, x0, mask_index=4, num_samples=16, seed=3)
    assert torch.equal(torch.cat(first.asked), torch.cat(second.asked))


@each_proposal
def test_every_pass_is_counted_and_none_is_left_out(proposal: str) -> None:
    network, x0 = RandomNetwork(8), random_tokens(40, 8)
    estimate = time_free_nll(network, x0, mask_index=4, num_samples=16, proposal=proposal)
    asked = torch.cat(network.asked).view(40, -1, 8)
    assert estimate.num_forwards.tolist() == [asked.shape[1]] * 40
    assert asked.shape[1] == 16
    masked = asked == 4
    assert torch.equal(asked, torch.where(masked, 4, x0.unsqueeze(1)))
    counts = masked.sum(2)
    fully = (counts == 8).sum(1)
    if proposal == "complementary":
        assert (counts.view(40, 2, 8).sum(1) == 8).all()
        assert (masked[:, :8] ^ masked[:, 8:]).all()
        assert torch.bincount(counts[:, :8].flatten(), minlength=9).min() > 15  # k is uniform on 0..8
        return
    assert counts.min() >= 1
    if proposal == "stratified":
        assert fully.tolist() == [1] * 40
    elif proposal == "systematic":  # each stratum of 16 is half a count wide
        assert torch.equal(counts.sort(1).values, torch.arange(1, 9).repeat_interleave(2).expand(40, -1))
    else:  # m = 8 has probability 1/8, or 1/(8 H_8) = 0.046
        assert 10 < fully.sum().item() < 150


def test_a_sequence_does_not_see_its_batch() -> None:
    x0, names = random_tokens(4, 10), torch.tensor([40, 11, 2**35 + 1, 7])
    target = torch.ones_like(x0, dtype=torch.bool)
    target[2, 3:] = False  # 7 subsets: enumerated, before the others
    target[0, 8:] = False
    for proposal in PROPOSALS:
        options = {"mask_index": 4, "num_samples": 16, "proposal": proposal, "seed": 5}
        together = RandomNetwork(10)
        batch = time_free_nll(together, x0, target=target, sample_ids=names, batch_size=7, **options)
        assert batch.num_tokens.tolist() == [8, 10, 3, 10]
        xt, start = torch.cat(together.asked), 0
        assert batch.num_forwards.sum().item() == len(xt)
        for b in (2, 0, 1, 3):
            alone = RandomNetwork(10)
            one = slice(b, b + 1)
            single = time_free_nll(alone, x0[one], target=target[one], sample_ids=names[one], **options)
            stop = start + int(single.num_forwards)
            assert torch.equal(torch.cat(alone.asked), xt[start:stop])
            torch.testing.assert_close(single.nll, batch.nll[one], rtol=1e-12, atol=0)
            torch.testing.assert_close(single.stderr, batch.stderr[one], rtol=1e-9, atol=0)
            start = stop


def test_seeds_and_names_change_the_draws() -> None:
    network, x0 = RandomNetwork(10), random_tokens(1, 10).expand(2, -1)

    def estimate(seed: int | None) -> list[float]:
        return time_free_nll(network, x0, mask_index=4, num_samples=16, seed=seed).nll.tolist()

    assert estimate(1) == estimate(1)
    assert len({*estimate(1), *estimate(2)}) == 4
    torch.manual_seed(0)
    first = estimate(None)
    assert first != estimate(None)
    torch.manual_seed(0)
    assert first == estimate(None)


@each_proposal
def test_memory_bounds_do_not_change_the_result(proposal: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x0 = RandomNetwork(10), random_tokens(6, 10)
    options = {"mask_index": 4, "num_samples": 16, "proposal": proposal}
    expected = time_free_nll(network, x0, **options)
    monkeypatch.setattr(time_free, "STORED_LOSSES", 2 * 16 * 10)
    monkeypatch.setattr(scoring, "_LOGITS_PER_BATCH", 5 * 10 * 1024)
    network.asked.clear()
    bounded = time_free_nll(network, x0, **options)
    torch.testing.assert_close(bounded.nll, expected.nll, rtol=1e-12, atol=0)
    torch.testing.assert_close(bounded.stderr, expected.stderr, rtol=1e-9, atol=0)
    assert {len(xt) for xt in network.asked} >= {1, 5}
    assert max(len(xt) for xt in network.asked) == 5


@each_proposal
def test_an_impossible_token_makes_the_nll_infinite(proposal: str) -> None:
    def model(xt: Tensor) -> Tensor:
        logits = torch.zeros(*xt.shape, 3)
        logits[:, 2, 1] = -math.inf
        return logits

    x0 = torch.tensor([[0, 1, 1, 0, 0, 1, 0]])
    assert time_free_nll(model, x0, mask_index=2, num_samples=40, proposal=proposal).nll.item() == math.inf


@each_proposal
def test_a_model_without_doubt_leaves_no_error(proposal: str) -> None:
    def model(xt: Tensor) -> Tensor:
        return torch.zeros(*xt.shape, 2)

    x0 = torch.zeros(2, 8, dtype=torch.int64)
    estimate = time_free_nll(model, x0, mask_index=1, num_samples=16, proposal=proposal)
    for column in (estimate.nll, estimate.stderr, *estimate.interval(), *estimate.pooled().interval()):
        assert not column.any()
