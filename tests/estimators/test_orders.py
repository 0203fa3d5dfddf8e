"""Likelihoods along one order, against their definition written plainly in float64, and as distributions."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import RandomNetwork, nll_by_chain_rule, random_tokens
from oracles import Tabled, markov_chain, mixture
from torch import Tensor, nn

from fastdiff.estimators import OrderedNLL, exact_nll, ordered_nll
from fastdiff.generation.sampling import sample

RULES = ("confidence", "margin", "entropy")
ORDERS = ("left-to-right", *RULES)
each_order = pytest.mark.parametrize("order", ORDERS)
GOOD = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])


def every_sequence(length: int, num_tokens: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(num_tokens), repeat=length)))


def sureness(order: str | list[int], i: int, log_p: Tensor) -> float:
    """What the order reveals first has the largest."""
    if not isinstance(order, str):
        return -order.index(i)
    p = log_p[log_p > -math.inf].exp().sort(descending=True).values
    return {"left-to-right": -i, "confidence": p[0], "margin": p[0] - p[1], "entropy": (p * p.log()).sum()}[order]


def plainly(model, x0: Tensor, order: str | list[int], k: int = 1, block_length: int | None = None, target=None):
    """-log p of one sequence [L] and the masks in front of each step."""
    target = list(range(len(x0))) if target is None else target.nonzero().squeeze(1).tolist()
    block_length = block_length or len(x0)
    left, total, asked = target, 0.0, []
    while left:
        xt = x0.clone()
        xt[left] = model.mask_index
        asked.append(xt.tolist())
        log_p = model(xt.unsqueeze(0))[0].index_fill(1, torch.tensor(model.mask_index), -math.inf).log_softmax(1)
        block = [i for i in left if (i - target[0]) // block_length == (left[0] - target[0]) // block_length]
        chosen = sorted(block, key=lambda i: sureness(order, i, log_p[i]), reverse=True)[
            :k
        ]  # stable: ties to the first
        total -= sum(log_p[i, x0[i]].item() for i in chosen)
        left = [i for i in left if i not in chosen]
    return total, asked


@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(1, 7),
    k=st.integers(1, 8),
    block_length=st.none() | st.integers(1, 8),
    order=st.sampled_from(ORDERS),
    target=st.lists(st.booleans(), min_size=7, max_size=7),
    seed=st.integers(0, 99),
)
def test_is_what_the_definition_says(length, k, block_length, order, target, seed) -> None:
    network, x0 = RandomNetwork(length), random_tokens(3, length, seed=seed)
    target = torch.tensor(target[:length] if any(target[:length]) else [True] * length).repeat(3, 1)
    target[1] = True
    options = dict(order=order, tokens_per_step=k, block_length=block_length)
    estimate = ordered_nll(network, x0, mask_index=4, target=target, **options)
    asked = torch.cat(network.asked).tolist()
    expected, steps = zip(*(plainly(network, x0[b], order, k, block_length, target[b]) for b in range(3)), strict=True)
    assert estimate.nll.tolist() == pytest.approx(expected, rel=1e-12)
    assert estimate.num_forwards.tolist() == [len(each) for each in steps]
    assert estimate.num_tokens.tolist() == target.sum(1).tolist()
    assert sorted(asked) == sorted(itertools.chain(*steps))  # no pass but these, and none sees a token to come


@pytest.mark.parametrize("block_length", [None, 2, 3])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("order", [*ORDERS, torch.tensor([2, 0, 3, 1])], ids=[*ORDERS, "given"])
def test_is_a_distribution_over_sequences(order: str | Tensor, k: int, block_length: int | None) -> None:
    if isinstance(order, Tensor) and block_length:
        block_length = None
    x0, network = every_sequence(4, 3), Tabled(RandomNetwork(4, 3), 4)
    estimate = ordered_nll(network, x0, mask_index=3, order=order, tokens_per_step=k, block_length=block_length)
    assert (-estimate.nll).exp().sum().item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("order", RULES)
def test_is_also_one_after_a_prompt(order: str, k: int) -> None:
    network, x0 = RandomNetwork(6, 3), torch.cat([torch.tensor([[2, 0]]).expand(81, 2), every_sequence(4, 3)], 1)
    target = torch.arange(6).expand(81, 6) >= 2
    options = dict(mask_index=3, order=order, tokens_per_step=k, block_length=2, target=target)
    assert (-ordered_nll(network, x0, **options).nll).exp().sum().item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(("k", "block_length"), [(1, None), (2, None), (1, 2)])
@pytest.mark.parametrize("order", ["margin", "entropy"])
def test_is_the_law_of_what_the_sampler_draws(order: str, k: int, block_length: int | None) -> None:
    """Pearson's chi-square over all sequences."""
    network, x0, num = Tabled(RandomNetwork(4, 3), 4), every_sequence(4, 3), 10000
    network.table *= 0.2  # no sequence is rare
    options = dict(mask_index=3, block_length=block_length)
    expected = num * (-ordered_nll(network, x0, order=order, tokens_per_step=k, **options).nll).exp()
    drawn = sample(network, sampler=order, steps=4 // k, num_samples=num, length=4, seed=5, **options)
    seen = (drawn @ torch.tensor([27, 9, 3, 1])).bincount(minlength=81)
    assert expected.min() > 5
    assert ((seen - expected) ** 2 / expected).sum() < 124.9  # exceeded once in a thousand, 80 degrees of freedom


@pytest.mark.parametrize(("k", "block_length"), [(1, None), (2, None), (3, 6), (2, 4)])
@pytest.mark.parametrize("order", RULES)
def test_takes_the_order_of_the_sampler(order: str, k: int, block_length: int | None) -> None:
    """What is drawn at temperature 0 is scored in the order in which it was drawn."""
    network = RandomNetwork(12)
    options = dict(steps=12 // k, num_samples=5, length=12, temperature=0, return_trajectory=True)
    result = sample(network, mask_index=4, sampler=order, block_length=block_length, **options)
    taken = (result.trajectory == 4).sum(0).argsort(1)  # those that are masks in the fewest states come first
    by_rule = ordered_nll(
        network, result.tokens, mask_index=4, order=order, tokens_per_step=k, block_length=block_length
    )
    told = ordered_nll(network, result.tokens, mask_index=4, order=taken, tokens_per_step=k)
    assert torch.equal(by_rule.nll, told.nll)
    assert (by_rule.num_forwards == 12 // k).all()
    if k == 1:
        reverse = ordered_nll(network, result.tokens, mask_index=4, order=taken.flip(1))
        assert (reverse.nll - told.nll).abs().min() > 1e-3


@each_order
def test_consistent_conditionals_give_the_nll_in_any_order(order: str) -> None:
    for oracle in (mixture(8, 3, mask_index=1), markov_chain(4)):
        x0 = oracle.sample(4, 8)
        options = dict(mask_index=oracle.mask_index, order=order)
        torch.testing.assert_close(ordered_nll(oracle, x0, **options).nll, oracle.nll(x0), rtol=1e-10, atol=0)
        target = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0, 1, 0], [1] * 8, [0, 1] * 4]).bool()
        given = ordered_nll(oracle, x0, target=target, block_length=3, **options)
        torch.testing.assert_close(given.nll, oracle.nll(x0, target), rtol=1e-10, atol=1e-12)


def test_the_mean_over_all_given_orders_is_the_time_free_nll() -> None:
    network, x0 = RandomNetwork(4), random_tokens(1, 4)
    orders = torch.tensor(list(itertools.permutations(range(4))))
    estimate = ordered_nll(network, x0.expand(24, 4), mask_index=4, order=orders)
    each = [nll_by_chain_rule(network, x0, tuple(order)) for order in orders.tolist()]
    assert estimate.nll.tolist() == pytest.approx(each, rel=1e-12)
    assert estimate.nll.std() > 0.1
    assert estimate.nll.mean().item() == pytest.approx(exact_nll(network, x0, mask_index=4).nll.item(), rel=1e-12)


def test_one_order_for_all_and_tokens_that_are_no_target_are_passed_over() -> None:
    network, x0, order = RandomNetwork(6), random_tokens(3, 6), torch.tensor([4, 0, 5, 2, 1, 3])
    target = torch.tensor([0, 1, 1, 0, 1, 1]).bool().expand(3, 6)
    estimate = ordered_nll(network, x0, mask_index=4, order=order, tokens_per_step=2, target=target)
    expected = [plainly(network, row, [4, 5, 2, 1, 0, 3], 2, None, target[0])[0] for row in x0]
    assert estimate.nll.tolist() == pytest.approx(expected, rel=1e-12)
    spread = ordered_nll(network, x0, mask_index=4, order=order.expand(3, 6), tokens_per_step=2, target=target)
    assert torch.equal(spread.nll, estimate.nll)


@each_order
def test_neither_batches_nor_padding_change_a_bit(order: str) -> None:
    table, x0 = Tabled(RandomNetwork(6), 6), random_tokens(5, 6)
    options = dict(mask_index=4, order=order, tokens_per_step=2, block_length=4)
    one = ordered_nll(table, x0, batch_size=1, **options)
    for batch_size in (2, 5, None):
        assert torch.equal(ordered_nll(table, x0, batch_size=batch_size, **options).nll, one.nll)
    networks, lengths = {length: RandomNetwork(length) for length in (1, 3, 6)}, torch.tensor([6, 3, 6, 1, 3])

    def network(xt: Tensor) -> Tensor:
        return networks[xt.shape[1]](xt)

    whole = ordered_nll(network, x0, lengths=lengths, **options)
    padded = x0.where(torch.arange(6) < lengths.unsqueeze(1), -7)
    assert torch.equal(ordered_nll(network, padded, lengths=lengths, **options).nll, whole.nll)
    for b, length in enumerate(lengths.tolist()):
        alone = ordered_nll(network, x0[b : b + 1, :length], **options)
        assert alone.nll.tolist() == pytest.approx([whole.nll[b].item()], rel=1e-12)


@each_order
def test_ties_go_to_the_first(order: str) -> None:
    """Step s scores the s-th token, so that it shows in the loss."""

    class Flat:
        mask_index = 2

        def __call__(self, xt: Tensor) -> Tensor:
            sure = 1.0 + (xt != 2).sum(1)  # of every place alike
            return torch.stack([sure, 0 * sure, 9 + 0 * sure], 1).double().unsqueeze(1).expand(*xt.shape, 3)

    x0 = random_tokens(2, 200, num_tokens=2)  # short rows are sorted in a stable way by any sort
    loss = [[math.log1p(math.exp(s * (2 * token - 1))) for s, token in enumerate(row, 1)] for row in x0.tolist()]
    estimate = ordered_nll(Flat(), x0, mask_index=2, order=order)
    assert estimate.nll.tolist() == pytest.approx([sum(row) for row in loss], rel=1e-6)


@pytest.mark.parametrize("bias", [False, True])
@each_order
def test_a_model_may_be_a_body_and_a_last_layer(order: str, bias: bool) -> None:
    """Hidden states where nothing is masked, or outside the block, are not read: they are NaN."""
    network, head, x0 = RandomNetwork(6), nn.Linear(5, 5, bias=bias).double().requires_grad_(False), random_tokens(3, 6)

    def body(xt: Tensor) -> Tensor:
        hidden = network(xt).masked_fill((xt != 4).unsqueeze(-1), torch.nan)
        hidden[(xt[:, :3] == 4).any(1), 3:] = torch.nan
        return hidden

    options = dict(mask_index=4, order=order, tokens_per_step=2, block_length=3)
    expected = ordered_nll(lambda xt: head(network(xt)), x0, **options)
    torch.testing.assert_close(ordered_nll((body, head), x0, **options).nll, expected.nll)


def test_a_mask_without_a_logit() -> None:
    head, network, x0 = nn.Linear(5, 4).double().requires_grad_(False), RandomNetwork(6), random_tokens(2, 6)
    padded = ordered_nll(lambda xt: nn.functional.pad(head(network(xt)), (0, 1)), x0, mask_index=4, order="margin")
    for model in ((network, head), lambda xt: head(network(xt))):
        estimate = ordered_nll(model, x0, mask_index=4, order="margin", exclude_mask=False)
        torch.testing.assert_close(estimate.nll, padded.nll)


def test_an_impossible_token_makes_it_infinite() -> None:
    def model(xt: Tensor) -> Tensor:
        return torch.tensor([0.0, 1.0, -math.inf, 2.0]).expand(*xt.shape, 4)

    estimate = ordered_nll(model, torch.tensor([[0, 2], [0, 1]]), mask_index=3, order="entropy")
    assert estimate.nll.isinf().tolist() == [True, False]


def test_the_result_says_what_it_is() -> None:
    estimate = ordered_nll(RandomNetwork(4), GOOD, mask_index=4, order="margin", tokens_per_step=2, block_length=4)
    assert estimate.stderr.tolist() == estimate.bias.tolist() == [0, 0]
    pooled = estimate.pooled()
    assert isinstance(pooled, OrderedNLL)
    assert (pooled.order, pooled.num_forwards.item()) == ("margin", 4)
    record = json.loads(json.dumps(pooled.to_dict(), allow_nan=False))
    asked = {"order": "margin", "tokens_per_step": 2, "block_length": 4}
    assert record == asked | {
        "nll": [estimate.nll.sum().item()],
        "bits_per_token": pooled.bits_per_token.tolist(),
        "perplexity": pooled.perplexity.tolist(),
        "num_tokens": [8],
        "num_forwards": [4],
    }
    assert ordered_nll(RandomNetwork(4), GOOD, mask_index=4, order=torch.arange(4)).order == "given"
    empty = ordered_nll(RandomNetwork(4), GOOD[:0], mask_index=4, order="margin", block_length=2)
    assert empty.nll.shape == empty.num_forwards.shape == (0,)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"order": "best"}, ValueError, r"^order: .*'left-to-right', 'confidence', 'margin', 'entropy', got 'best'"),
        ({"order": [0, 1, 2, 3]}, ValueError, r"^order: expected one of .*got \[0, 1, 2, 3\]"),
        ({"order": torch.tensor([0, 1, 2])}, ValueError, r"^order: expected shape \(4,\) or \(2, 4\), got \(3,\)"),
        ({"order": torch.arange(4).expand(3, 4)}, ValueError, r"^order: expected shape .*got \(3, 4\)"),
        ({"order": torch.tensor([[0, 1, 2, 3], [0, 1, 1, 3]])}, ValueError, r"^order: .*0\.\.3, got \[0, 1, 1, 3\]"),
        ({"order": torch.tensor([1, 2, 3, 4])}, ValueError, r"^order: .*permutation of 0\.\.3, got \[1, 2, 3, 4\]"),
        ({"order": torch.arange(4.0)}, TypeError, r"^order: expected int64 .*float32"),
        ({"order": torch.arange(4), "block_length": 2}, ValueError, r"^block_length: a given order takes none, got 2"),
        ({"tokens_per_step": 0}, ValueError, r"^tokens_per_step: expected at least 1, got 0"),
        ({"tokens_per_step": 1.5}, TypeError, r"^tokens_per_step: expected an int, got 1.5"),
        ({"block_length": 0}, ValueError, r"^block_length: expected at least 1, got 0"),
        ({"target": torch.tensor([[0, 1, 0, 0], [0] * 4]).bool()}, ValueError, r"^target: .*none in x0\[1\]"),
        ({"x0": GOOD + 1}, ValueError, r"^x0: expected no mask"),
        ({"x0": GOOD + 9}, ValueError, r"^x0, mask_index: expected ids in \[0, V=5\), got 12"),
        ({"batch_size": 0}, ValueError, r"^batch_size: expected at least 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(change: dict, error: type[Exception], message: str) -> None:
    def model(xt: Tensor) -> Tensor:
        return torch.zeros(*xt.shape, 5)

    with pytest.raises(error, match=message):
        ordered_nll(model, **{"x0": GOOD, "mask_index": 4, "order": "confidence", **change})
