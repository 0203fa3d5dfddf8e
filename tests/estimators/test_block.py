import math

import pytest
import torch
from networks import RandomNetwork, random_tokens, z_score
from oracles import Blocks, Tabled, markov_chain, mixture, skewed_chain
from torch import Tensor

from fastdiff import block_nll, exact_nll, time_free_nll
from fastdiff.estimators.time_free import PROPOSALS

each_proposal = pytest.mark.parametrize("proposal", PROPOSALS)


def truth(model, x0: Tensor, block_length: int, target: Tensor | None = None) -> Tensor:
    """The exact NLL, block after block, each by enumeration with what comes after it masked: by token, [B, L]."""
    target = torch.ones_like(x0, dtype=torch.bool) if target is None else target
    token_nll, at = torch.zeros(x0.shape, dtype=torch.float64), torch.arange(x0.shape[1])
    for start in range(0, x0.shape[1], block_length):
        own = target & (at >= start) & (at < start + block_length)
        rows = own.any(1)
        seen = x0.masked_fill(at >= start + block_length, model.mask_index)
        if rows.any():
            token_nll[rows] += exact_nll(model, seen[rows], mask_index=model.mask_index, target=own[rows]).token_nll
    return token_nll


@pytest.mark.parametrize("block_length", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("oracle", [mixture(8, 3, mask_index=1), markov_chain(4)], ids=["mixture", "markov"])
def test_enumeration_gives_the_nll(oracle, block_length: int) -> None:
    x0 = oracle.sample(4, 8)
    options = dict(mask_index=oracle.mask_index, block_length=block_length)
    estimate = block_nll(Blocks(oracle, block_length), x0, num_samples=2**block_length - 1, **options)
    torch.testing.assert_close(estimate.nll, oracle.nll(x0), rtol=1e-12, atol=0)
    torch.testing.assert_close(estimate.token_nll.sum(1), estimate.nll, rtol=1e-14, atol=0)
    assert estimate.stderr.tolist() == [0] * 4
    assert estimate.num_forwards.tolist() == [2**block_length - 1] * 4
    assert estimate.num_tokens.tolist() == [8] * 4


def test_blocks_of_one_token_take_one_pass() -> None:
    oracle = markov_chain(4)
    x0, asked = oracle.sample(3, 12), []

    def model(xt: Tensor, x0: Tensor) -> Tensor:
        asked.append(xt)
        return Blocks(oracle, 1)(xt, x0)

    estimate = block_nll(model, x0, mask_index=4, block_length=1, num_samples=1)
    torch.testing.assert_close(estimate.nll, oracle.nll(x0), rtol=1e-12, atol=0)
    assert torch.equal(torch.cat(asked), torch.full_like(x0, 4))
    ahead = torch.stack([oracle.nll(x0[:, : i + 1]) for i in range(12)], 1).diff(dim=1)
    torch.testing.assert_close(estimate.token_nll[:, 1:], ahead)


@pytest.mark.parametrize("block_length", [1, 3, 4])
def test_enumeration_of_inconsistent_conditionals(block_length: int) -> None:
    network, x0 = RandomNetwork(10), random_tokens(3, 10)
    target = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 0, 1, 1], [1] * 10, [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]]).bool()
    options = dict(mask_index=4, block_length=block_length, num_samples=15)
    estimate = block_nll(Blocks(network, block_length), x0, target=target, **options)
    torch.testing.assert_close(estimate.token_nll, truth(network, x0, block_length, target), rtol=1e-12, atol=1e-12)
    assert estimate.num_tokens.tolist() == [4, 10, 1]
    assert estimate.num_forwards.tolist()[1:] == [2**block_length - 1, 1]


@each_proposal
@pytest.mark.parametrize("num_samples", [16, 300])
def test_one_block_is_the_time_free_nll(proposal: str, num_samples: int) -> None:
    network, x0, target = RandomNetwork(8), random_tokens(3, 8), torch.ones(3, 8, dtype=torch.bool)
    target[1, :4] = False
    options = dict(mask_index=4, num_samples=num_samples, proposal=proposal, target=target, seed=3)
    expected = time_free_nll(network, x0, **options)
    for block_length in (8, 20):
        found = block_nll(lambda xt, x0: network(xt), x0, block_length=block_length, **options)
        for name, column in vars(expected).items():
            if name != "num_forwards":
                torch.testing.assert_close(getattr(found, name), column, rtol=1e-9, atol=0)
    assert found.num_forwards.tolist() == expected.num_forwards.tolist()


# ------------------------------------------------------------------------------------------ estimation


@each_proposal
@pytest.mark.parametrize("num_samples", [4, 12, 40])
def test_estimates_are_unbiased_and_cover(proposal: str, num_samples: int) -> None:
    """Blocks of 6, 6 and 5 tokens, of which one is no target."""
    network, x0 = RandomNetwork(17), random_tokens(1, 17)
    target = torch.arange(17).unsqueeze(0) != 3
    expected = truth(network, x0, 6, target)
    options = dict(mask_index=4, block_length=6, num_samples=num_samples, proposal=proposal)
    estimate = block_nll(Blocks(network, 6), x0.expand(400, -1), target=target.expand(400, -1), **options)
    assert abs(z_score(estimate, expected.sum())) < 4
    off = (estimate.token_nll.mean(0) - expected[0]).abs()
    assert (off < 4.2 * estimate.token_nll.std(0) / 20 + 1e-9).all()
    assert estimate.num_forwards.unique().tolist() == [num_samples]
    low, high = estimate.interval()
    least = {"stratified": 0.9, "systematic": 0.9}.get(proposal, 0.88)
    assert ((low <= expected.sum()) & (expected.sum() <= high)).double().mean().item() > least
    rms = estimate.stderr.square().mean().sqrt() / estimate.nll.std()
    assert 0.85 < rms.item() < (2.5 if proposal == "stratified" and num_samples < 30 else 1.25)


@pytest.mark.slow
@each_proposal
def test_the_mean_of_many(proposal: str) -> None:
    """20000 estimates on a chain whose conditionals are nearly certain, see test_unbiased.py."""
    oracle, x0 = skewed_chain(), torch.tensor([[0, 0, 0, 1, 1, 0, 0, 0, 0, 1]])
    model = Blocks(Tabled(oracle, 10), 5)
    options = dict(mask_index=2, block_length=5, num_samples=5, proposal=proposal)
    estimate = block_nll(model, x0.expand(20_000, -1), **options)
    assert abs(z_score(estimate, oracle.nll(x0)[0])) < 4


def test_a_tolerance_is_met_without_bias() -> None:
    network, x0 = RandomNetwork(14), random_tokens(1, 14)
    expected = truth(network, x0, 7).sum()
    options = dict(mask_index=4, block_length=7, num_samples=17, tolerance=5.0)
    estimate = block_nll(Blocks(network, 7), x0.expand(300, -1), **options)
    low, high = estimate.interval()
    assert abs(z_score(estimate, expected)) < 4
    assert ((high - low) / 2 <= 5.0).double().mean().item() > 0.9
    assert (estimate.num_forwards > 30).all()
    assert len(estimate.num_forwards.unique()) > 1


def test_more_blocks_vary_less_than_one() -> None:
    """At as many passes, under any block length."""
    oracle = markov_chain(8)
    x0 = oracle.sample(1, 32, seed=5).expand(200, -1)
    whole = time_free_nll(oracle, x0, mask_index=8, num_samples=32).nll.var()
    for block_length in (8, 16):
        options = dict(mask_index=8, block_length=block_length, num_samples=32)
        assert block_nll(Blocks(oracle, block_length), x0, **options).nll.var() < whole


# ------------------------------------------------------------------------------------- lengths, batches, gradients


@each_proposal
def test_padding_is_never_seen(proposal: str) -> None:
    oracle, lengths = markov_chain(4), torch.tensor([7, 12, 7, 3])
    x0 = oracle.sample(4, 12).masked_fill(torch.arange(12) >= lengths.unsqueeze(1), -100)

    def model(xt: Tensor, x0: Tensor) -> Tensor:
        assert (x0 >= 0).all()
        return Blocks(oracle, 5)(xt, x0)

    options = dict(mask_index=4, block_length=5, num_samples=12, proposal=proposal)
    batch = block_nll(model, x0, lengths=lengths, **options)
    assert batch.num_tokens.tolist() == lengths.tolist()
    for b, n in enumerate(lengths.tolist()):
        one = block_nll(model, x0[b : b + 1, :n], sample_ids=torch.tensor([b]), **options)
        torch.testing.assert_close(batch.nll[b : b + 1], one.nll, rtol=1e-12, atol=0)
        torch.testing.assert_close(batch.stderr[b : b + 1], one.stderr, rtol=1e-9, atol=1e-12)


@each_proposal
def test_bits_do_not_depend_on_the_batch_size(proposal: str) -> None:
    network, x0 = RandomNetwork(13), random_tokens(5, 13)
    options = dict(mask_index=4, block_length=5, num_samples=12, proposal=proposal, sample_ids=torch.arange(5) + 2**33)
    found = [block_nll(Blocks(network, 5), x0, batch_size=size, **options) for size in (1, 7, None)]
    for other in found[1:]:
        torch.testing.assert_close(other.nll, found[0].nll, rtol=1e-12, atol=0)
    names = block_nll(Blocks(network, 5), x0[3:], **(options | dict(sample_ids=torch.tensor([2**33 + 3, 2**33 + 4]))))
    torch.testing.assert_close(names.nll, found[0].nll[3:], rtol=1e-12, atol=0)


def test_each_pass_masks_all_blocks_each_in_its_own_way() -> None:
    oracle, asked = markov_chain(4), []
    x0 = oracle.sample(1, 24)

    def model(xt: Tensor, x0: Tensor) -> Tensor:
        asked.append(xt)
        return Blocks(oracle, 8)(xt, x0)

    estimate = block_nll(model, x0, mask_index=4, block_length=8, num_samples=16)
    mask = torch.cat(asked).eq(4).view(16, 3, 8)
    assert estimate.num_forwards.item() == 16
    assert mask.any(2).all()
    assert mask[0].all()
    assert (mask[:, 0] != mask[:, 1]).any()
    assert (mask[:, 1] != mask[:, 2]).any()


def gradient(nll: Tensor, network: RandomNetwork) -> Tensor:
    return torch.autograd.grad(nll, network.head)[0][:, :-1]


def test_the_gradient_of_an_exact_nll() -> None:
    network, x0 = RandomNetwork(8), random_tokens(1, 8)
    network.head.requires_grad_()
    exact = block_nll(Blocks(network, 5), x0, mask_index=4, block_length=5, num_samples=31, differentiable=True)
    step, ends = torch.zeros_like(network.head), []
    step[3, 1] = 1e-5
    for sign in (1, -2):
        network.head.data += sign * step
        ends.append(truth(network, x0, 5).sum().item())
    network.head.data += step
    found = gradient(exact.nll.sum(), network)[3, 1].item()
    assert found == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-6)


@each_proposal
def test_gradients_are_unbiased(proposal: str) -> None:
    network, x0 = RandomNetwork(8), random_tokens(1, 8)
    network.head.requires_grad_()
    options = dict(mask_index=4, block_length=5, differentiable=True)
    expected = gradient(block_nll(Blocks(network, 5), x0, num_samples=31, **options).nll.sum(), network)
    options |= dict(num_samples=6, proposal=proposal)
    parts = [block_nll(Blocks(network, 5), x0.expand(40, -1), seed=seed, **options) for seed in range(25)]
    assert not parts[0].stderr.requires_grad
    grads = torch.stack([gradient(part.nll.mean(), network) for part in parts])
    z = (grads.mean(0) - expected) / (grads.std(0) / math.sqrt(25))
    assert z.abs().max() < 4.5


def test_a_body_and_a_last_layer() -> None:
    network, head = RandomNetwork(9), torch.nn.Linear(5, 6).double().requires_grad_(False)
    x0, options = random_tokens(2, 9), dict(mask_index=4, block_length=3, num_samples=6)
    whole = block_nll(lambda xt, x0: head(Blocks(network, 3)(xt, x0)), x0, **options)
    apart = block_nll((Blocks(network, 3), head), x0, **options)
    torch.testing.assert_close(apart.nll, whole.nll)


def test_nothing() -> None:
    empty = block_nll(Blocks(markov_chain(4), 3), torch.zeros(0, 7, dtype=torch.int64), mask_index=4, block_length=3)
    assert all(len(column) == 0 for column in vars(empty).values())


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"block_length": 0}, ValueError, "block_length: expected at least 1, got 0"),
        ({"block_length": 2.5}, TypeError, "block_length: expected an int, got 2.5"),
        ({"num_samples": 2}, ValueError, "num_samples: expected at least 3 for a standard error, got 2"),
        ({"proposal": "best"}, ValueError, "proposal: expected one of"),
        ({"tolerance": 0.0}, ValueError, "tolerance: expected a positive number of nats, got 0.0"),
        ({"mask_index": -1}, ValueError, "mask_index: expected an id >= 0"),
        ({"target": torch.zeros(1, 6).bool()}, ValueError, "target: expected at least one position"),
        ({"model": lambda xt, x0: torch.zeros(1, 2, 5)}, ValueError, r"model's logits: expected shape \[1, 6, V\]"),
    ],
)
def test_bad_arguments(changes, error, text) -> None:
    arguments = dict(model=Blocks(markov_chain(4), 3), x0=torch.zeros(1, 6, dtype=torch.int64), mask_index=4)
    arguments |= dict(block_length=3, num_samples=5) | changes
    with pytest.raises(error, match="^" + text):
        block_nll(arguments.pop("model"), arguments.pop("x0"), **arguments)
