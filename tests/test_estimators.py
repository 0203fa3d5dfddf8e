import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from oracles import MASK_LOGIT, Oracle, dna_toy, markov_chain, mixture
from torch import Tensor, nn

from fastdiff.estimators import NLLEstimate, exact_nll, scoring, time_free, time_free_nll
from fastdiff.estimators.estimate import student_t

PROPOSALS = ("stratified", "uniform", "harmonic")
each_proposal = pytest.mark.parametrize("proposal", PROPOSALS)


class RandomNetwork:
    """Conditionals that no distribution has; keeps the masked sequences it was asked about."""

    def __init__(self, length: int, num_tokens: int = 4, dim: int = 16) -> None:
        generator = torch.Generator().manual_seed(7)
        shapes = [(length, num_tokens + 1, dim), (length, dim), (dim, num_tokens + 1)]
        self.embed, self.place, self.head = (
            torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes
        )
        self.mask_index = num_tokens
        self.asked: list[Tensor] = []

    def __call__(self, xt: Tensor) -> Tensor:
        self.asked.append(xt)
        seen = self.embed[torch.arange(xt.shape[1]), xt].sum(1, keepdim=True)
        return torch.tanh(seen / 2 + self.place) @ self.head


def random_tokens(batch: int, length: int, num_tokens: int = 4, seed: int = 3) -> Tensor:
    return torch.randint(num_tokens, (batch, length), generator=torch.Generator().manual_seed(seed))


def nll_by_chain_rule(model, x0: Tensor, order: tuple[int, ...]) -> float:
    """-log p(x0), a token at a time in the given order: [1, L]."""
    xt, total = torch.full_like(x0, model.mask_index), 0.0
    for i in order:
        logits = model(xt)[0, i].clone()
        logits[model.mask_index] = -math.inf
        total -= logits.log_softmax(0)[x0[0, i]].item()
        xt[0, i] = x0[0, i]
    return total


def z_score(estimate: NLLEstimate, truth: Tensor) -> float:
    """How many standard errors the mean over repeats lies from the truth."""
    repeats = len(estimate.nll)
    return ((estimate.nll.mean() - truth) / (estimate.nll.std() / math.sqrt(repeats))).item()


# --------------------------------------------------------------------------------------------- oracles

ORACLES = {
    "mixture": (mixture(8, 3, mask_index=1), mixture(8, 3, mask_index=1).sample(4, 8)),
    "markov": (markov_chain(4), markov_chain(4).sample(4, 8)),
    "dna": (dna_toy()[0], dna_toy()[1][:4]),
}
each_oracle = pytest.mark.parametrize(("oracle", "x0"), ORACLES.values(), ids=ORACLES.keys())


@pytest.mark.parametrize("oracle", [mixture(4, 3, mask_index=1), markov_chain(3)], ids=["mixture", "markov"])
def test_oracle_conditionals_are_those_of_its_distribution(oracle: Oracle) -> None:
    tokens = [v for v in range(4) if v != oracle.mask_index]
    strings = torch.tensor(list(itertools.product(tokens, repeat=4)))
    p = torch.exp(-oracle.nll(strings))
    assert p.sum().item() == pytest.approx(1, rel=1e-12)
    for masked in itertools.product([False, True], repeat=4):
        xt = strings[17].masked_fill(torch.tensor(masked), oracle.mask_index)
        agrees = ((strings == xt) | (xt == oracle.mask_index)).all(1)
        assert oracle.log_prob(xt[None]).exp().item() == pytest.approx(p[agrees].sum().item(), rel=1e-12)
        probs = oracle(xt[None])[0].index_fill(1, torch.tensor(oracle.mask_index), -math.inf).softmax(1)
        for i in xt.eq(oracle.mask_index).nonzero().flatten().tolist():
            expected = [p[agrees & (strings[:, i] == v)].sum() / p[agrees].sum() for v in range(4)]
            torch.testing.assert_close(probs[i], torch.stack(expected), rtol=1e-12, atol=0)


def test_dna_toy_is_a_distribution_over_its_strings() -> None:
    oracle, strings = dna_toy()
    assert len(strings.unique(dim=0)) == 128
    assert torch.exp(-oracle.nll(strings)).sum().item() == pytest.approx(1, rel=1e-12)
    assert oracle(strings.masked_fill(strings == 0, 4)).isfinite().all()


# ----------------------------------------------------------------------------------------- enumeration


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


# ------------------------------------------------------------------------------------------ estimation


@each_proposal
@pytest.mark.parametrize(("num_samples", "repeats"), [(3, 2000), (12, 1000), (100, 300)])
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
    assert 0.8 < (rms_stderr / estimate.nll.std()).item() < 1.3


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


def test_stratified_beats_uniform_beats_harmonic() -> None:
    oracle = mixture(32, 6, components=4)
    x0 = oracle.sample(1, 32, seed=5).expand(200, -1)
    variance = {}
    for proposal in PROPOSALS:
        estimate = time_free_nll(oracle, x0, mask_index=6, num_samples=33, proposal=proposal)
        variance[proposal] = estimate.nll.var().item()
    assert 5 * variance["stratified"] < variance["uniform"]
    assert 5 * variance["uniform"] < variance["harmonic"]


@each_proposal
def test_every_pass_is_counted_and_none_is_left_out(proposal: str) -> None:
    network, x0 = RandomNetwork(8), random_tokens(40, 8)
    estimate = time_free_nll(network, x0, mask_index=4, num_samples=16, proposal=proposal)
    asked = torch.cat(network.asked).view(40, -1, 8)
    assert estimate.num_forwards.tolist() == [asked.shape[1]] * 40
    assert asked.shape[1] == (15 if proposal == "stratified" else 16)
    masked = asked == 4
    assert torch.equal(asked, torch.where(masked, 4, x0.unsqueeze(1)))
    counts = masked.sum(2)
    assert counts.min() >= 1
    fully = (counts == 8).sum(1)
    if proposal == "stratified":
        assert fully.tolist() == [1] * 40
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
    monkeypatch.setattr(time_free, "_STORED_LOSSES", 2 * 16 * 10)
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


@pytest.mark.parametrize("pairs", [1, 7, 600])
@pytest.mark.parametrize("length", [2, 3, 33, 4096])
def test_strata_are_equal_pairs_that_fill_the_counts(length: int, pairs: int) -> None:
    edges = time_free._strata(length, pairs)
    assert edges[0] == 0
    assert edges[-1].item() == pytest.approx(length - 1, rel=1e-12)
    assert (edges.diff() > 0).all()
    first, second = edges.diff().view(pairs, 2).unbind(1)
    torch.testing.assert_close(first, second, rtol=1e-6, atol=0)


def test_strata_are_narrow_where_few_tokens_are_masked_or_seen() -> None:
    width = time_free._strata(1024, 16).diff()
    assert 3 * width[0] < width[16]
    assert 3 * width[-1] < width[16]


# ------------------------------------------------------------------------------------------- the model


GOOD = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])


def zeros(xt: Tensor) -> Tensor:
    return torch.zeros(*xt.shape, 5)


class Dropping(nn.Module):
    """Logits from an embedding, through dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop, self.frozen = nn.Embedding(5, 5), nn.Dropout(0.5), nn.Dropout(0.5).eval()
        self.had_grad: list[bool] = []

    def forward(self, xt: Tensor) -> Tensor:
        logits = self.frozen(self.drop(self.embed(xt)))
        self.had_grad.append(logits.requires_grad)
        return logits


def test_modules_are_evaluated_without_gradients_and_get_their_modes_back() -> None:
    model, x0 = Dropping(), random_tokens(2, 4)
    first, second = (time_free_nll(model, x0, mask_index=4) for _ in range(2))
    assert torch.equal(first.nll, second.nll)
    assert model.training
    assert model.drop.training
    assert not model.frozen.training
    assert not any(model.had_grad)
    with pytest.raises(IndexError):
        exact_nll(model, x0 + 90, mask_index=4)
    assert model.drop.training


def test_a_model_may_return_an_object_with_logits() -> None:
    network, x0 = RandomNetwork(4), random_tokens(2, 4)
    wrapped = exact_nll(lambda xt: SimpleNamespace(logits=network(xt)), x0, mask_index=4)
    assert torch.equal(wrapped.nll, exact_nll(network, x0, mask_index=4).nll)


@pytest.mark.parametrize("bias", [False, True])
def test_a_model_may_be_a_body_and_a_last_layer(bias: bool) -> None:
    """The same numbers, with no logits where nothing is masked: those hidden states are NaN."""
    network, head, x0 = RandomNetwork(6), nn.Linear(5, 5, bias=bias).double().requires_grad_(False), random_tokens(3, 6)

    def body(xt: Tensor) -> Tensor:
        return network(xt).masked_fill((xt != 4).unsqueeze(-1), torch.nan)

    options = dict(mask_index=4, num_samples=9, target=torch.ones(3, 6, dtype=torch.bool))
    expected = time_free_nll(lambda xt: head(network(xt)), x0, **options)
    for last in (head, head.weight) if not bias else (head,):
        estimate = time_free_nll((body, last), x0, **options)
        torch.testing.assert_close(estimate.nll, expected.nll)
        torch.testing.assert_close(estimate.stderr, expected.stderr)
    torch.testing.assert_close(
        exact_nll((lambda xt: SimpleNamespace(last_hidden_state=body(xt)), head), x0, mask_index=4).nll,
        exact_nll(lambda xt: head(network(xt)), x0, mask_index=4).nll,
    )


@pytest.mark.parametrize("model", [(zeros,), (zeros, 3), (zeros, nn.Identity())], ids=["one", "number", "no weight"])
def test_a_pair_without_a_last_layer_is_an_error(model: tuple) -> None:
    with pytest.raises(TypeError, match=r"model: expected a callable, or a pair"):
        time_free_nll(model, GOOD, mask_index=4)


def test_the_module_of_a_method_is_evaluated_too() -> None:
    model, x0 = Dropping(), random_tokens(2, 4)
    pair = (model.forward, nn.Linear(5, 5, bias=False).requires_grad_(False))
    first, second = (time_free_nll(pair, x0, mask_index=4) for _ in range(2))
    assert torch.equal(first.nll, second.nll)
    assert model.training
    assert not any(model.had_grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_of_lower_precision_give_float64_estimates(dtype: torch.dtype) -> None:
    network, x0 = RandomNetwork(6), random_tokens(2, 6)
    low = exact_nll(lambda xt: network(xt).to(dtype), x0, mask_index=4)
    assert low.nll.dtype == torch.float64
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(low.nll, exact_nll(network, x0, mask_index=4).nll, rtol=tolerance, atol=0)


def test_an_empty_batch_gives_an_empty_estimate() -> None:
    assert time_free_nll(RandomNetwork(4), torch.empty(0, 4, dtype=torch.int64), mask_index=4).nll.shape == (0,)


# ---------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("estimate", [exact_nll, time_free_nll])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x0": [[0, 1]]}, TypeError, r"^x0: .*list"),
        ({"x0": GOOD.int()}, TypeError, r"^x0: .*int64.*int32"),
        ({"x0": GOOD[0]}, ValueError, r"^x0: .*\[B, L\].*\(4,\)"),
        ({"x0": GOOD[:, :0]}, ValueError, r"^x0: .*L >= 1.*\(2, 0\)"),
        ({"x0": GOOD - 1}, ValueError, r"^x0: .*>= 0, got -1"),
        ({"x0": GOOD + 1}, ValueError, r"^x0: .*no mask \(mask_index=4\)"),
        ({"model": zeros, "x0": GOOD + 2, "mask_index": 0}, ValueError, r"^x0, .*\[0, V=5\), got 5"),
        ({"model": zeros, "mask_index": 5}, ValueError, r"mask_index: .*\[0, V=5\), got 5"),
        ({"mask_index": -1}, ValueError, r"^mask_index: .*>= 0.*got -1"),
        ({"batch_size": 0}, ValueError, r"^batch_size: .*at least 1, got 0"),
        ({"target": GOOD}, TypeError, r"^target: .*bool.*int64"),
        ({"target": GOOD[:1] > 1}, ValueError, r"^target: .*\(2, 4\), got \(1, 4\)"),
        ({"target": torch.tensor([[True] * 4, [False] * 4])}, ValueError, r"^target: .*none in x0\[1\]"),
        ({"model": lambda xt: "no"}, TypeError, r"^model's logits: .*str"),
        ({"model": lambda xt: torch.zeros(xt.shape)}, ValueError, r"^model's logits: .*V\], got \[1, 4\]"),
        (
            {"model": lambda xt: torch.zeros(4, 1, 5)},
            ValueError,
            r"^model's logits: .*\[1, 4, V\], got \[4, 1, 5\]",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(estimate, change: dict, error: type[Exception], message: str) -> None:
    arguments = {"model": RandomNetwork(4), "x0": GOOD, "mask_index": 4, **change}
    with pytest.raises(error, match=message):
        estimate(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"proposal": "best"}, ValueError, r"^proposal: .*'stratified', 'uniform', 'harmonic', got 'best'"),
        ({"num_samples": 2}, ValueError, r"^num_samples: .*at least 3.*got 2"),
        ({"num_samples": 1, "proposal": "uniform"}, ValueError, r"^num_samples: .*at least 2.*got 1"),
        ({"num_samples": 1, "proposal": "harmonic"}, ValueError, r"^num_samples: .*at least 2.*got 1"),
        ({"num_samples": 0, "x0": GOOD[:, :1]}, ValueError, r"^num_samples: .*got 0"),
        ({"sample_ids": torch.arange(3)}, ValueError, r"^sample_ids: .*\(2,\), got \(3,\)"),
        ({"sample_ids": torch.zeros(2)}, TypeError, r"^sample_ids: .*float32"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_options_of_the_estimator_are_named(change: dict, error: type[Exception], message: str) -> None:
    arguments = {"model": RandomNetwork(4), "x0": GOOD, "mask_index": 4, **change}
    with pytest.raises(error, match=message):
        time_free_nll(**arguments)


def test_too_many_subsets_to_enumerate_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^target: .*at most 20.*got 21; estimate with time_free_nll"):
        exact_nll(RandomNetwork(21), random_tokens(1, 21), mask_index=4)


# ----------------------------------------------------------------------------------------- NLLEstimate


def estimate_of(nll: list[float], stderr: list[float], freedom: list[float]) -> NLLEstimate:
    value, error, degrees = (torch.tensor(column, dtype=torch.float64) for column in (nll, stderr, freedom))
    return NLLEstimate(value, error, torch.tensor([4, 8]), torch.tensor([15, 33]), degrees)


def test_units_of_an_estimate() -> None:
    estimate = estimate_of([4 * math.log(2), 8.0], [0.0, 0.5], [math.inf, 7])
    assert estimate.bits_per_token.tolist() == pytest.approx([1, 1 / math.log(2)])
    assert estimate.bits_per_token_stderr.tolist() == pytest.approx([0, 0.5 / 8 / math.log(2)])
    assert estimate.perplexity.tolist() == pytest.approx([2, math.e])
    low, high = estimate.interval(0.95)
    assert low.tolist() == pytest.approx([4 * math.log(2), 8 - 2.364624 * 0.5], rel=1e-6)
    assert high.tolist() == pytest.approx([4 * math.log(2), 8 + 2.364624 * 0.5], rel=1e-6)


def test_pooled_sequences_add_up() -> None:
    pooled = estimate_of([3.0, 8.0], [0.3, 0.4], [5, 7]).pooled()
    assert pooled.nll.tolist() == [11]
    assert pooled.stderr.tolist() == pytest.approx([0.5])
    assert pooled.num_tokens.tolist() == [12]
    assert pooled.num_forwards.tolist() == [48]
    assert pooled.degrees_of_freedom.tolist() == pytest.approx([0.25**2 / (0.09**2 / 5 + 0.16**2 / 7)])
    assert estimate_of([3.0, 8.0], [0, 0], [math.inf, math.inf]).pooled().interval()[1].tolist() == [11]


def test_an_estimate_goes_to_json_and_back() -> None:
    estimate = estimate_of([3.0, 8.0], [0.0, 0.4], [math.inf, 7])
    record = json.loads(json.dumps(estimate.to_dict(), allow_nan=False))
    assert record["nll"] == [3, 8]
    assert record["high"] == pytest.approx([3, 8 + 2.364624 * 0.4], rel=1e-6)
    assert record["num_forwards"] == [15, 33]


@pytest.mark.parametrize(
    ("level", "freedom", "t"),
    [
        (0.95, 1, 12.7062047362),
        (0.95, 2, 4.30265272991),
        (0.95, 7, 2.36462425101),
        (0.95, 30, 2.04227245630),
        (0.95, 120, 1.97993040505),
        (0.95, math.inf, 1.95996398454),
        (0.5, 4, 0.740697084),
        (0.9, 9, 1.833112933),
        (0.99, 5, 4.03214298356),
        (0.999, 3, 12.9239786366),
        (0.999, 1000, 3.30028264842),
    ],
)
def test_student_t_is_the_one_in_the_tables(level: float, freedom: float, t: float) -> None:
    assert student_t(level, torch.tensor(freedom)).item() == pytest.approx(t, rel=2e-6)


@pytest.mark.parametrize("level", [0.0, 1.0, 95, math.nan])
def test_a_level_out_of_range_is_an_error(level: float) -> None:
    with pytest.raises(ValueError, match=r"^level: .*\(0, 1\)"):
        estimate_of([3.0, 8.0], [0.3, 0.4], [5, 7]).interval(level)
