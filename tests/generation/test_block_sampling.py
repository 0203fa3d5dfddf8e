import math

import pytest
import torch
from laws import agrees, strings
from networks import RandomNetwork, random_tokens
from oracles import mixture
from samplers import RANKED, SAMPLERS, TIMED
from torch import Tensor, nn

from fastdiff import LogLinear, sample
from fastdiff.generation.block_sampling import plans_of_blocks
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.noise.blocks import block_causal

MASK = 4
each_sampler = pytest.mark.parametrize("sampler", SAMPLERS)


def transformer(cond_dim: int = 0) -> DiffusionTransformer:
    """A network whose branches are open, of any length."""
    torch.manual_seed(0)
    config = ModelConfig(5, None, 16, 2, 2, cond_dim, learned_positions=False)
    model = DiffusionTransformer(config).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.requires_grad_(False)


def uncached(model: DiffusionTransformer, block_length: int):
    """The same block model without a cache."""

    def body(xt: Tensor) -> Tensor:
        sigma, n = None, xt.shape[1]
        if model.sigma_map is not None:
            start = (n - 1) // block_length * block_length
            share = (xt[:, start:] == MASK).double().mean(1, keepdim=True)
            sigma = torch.cat([torch.zeros(len(xt), start), LogLinear().total_noise(share).expand(-1, n - start)], 1)
        return model.body(xt, sigma, block_causal(n, block_length))

    return body, model.lm_head


class Recomputing:
    """A cache of another kind: logits, by going through all tokens again. Keeps whom it was asked about."""

    def __init__(self, model, batch_size: int, block_length: int) -> None:
        self.model, self.block_length = model, block_length
        self.tokens, self.asked, self.appended = torch.empty(batch_size, 0, dtype=torch.int64), [], []

    def append(self, tokens: Tensor) -> None:
        self.appended.append(tokens.shape[1])
        self.tokens = torch.cat([self.tokens, tokens], 1)

    def __call__(self, xt: Tensor, rows: Tensor) -> Tensor:
        self.asked.append((self.tokens.shape[1], rows.tolist()))
        return self.model(torch.cat([self.tokens[rows], xt], 1))[:, self.tokens.shape[1] :]


class Padded:
    """A network of one length as a block model: what comes after is masked."""

    def __init__(self, model, length: int) -> None:
        self.model, self.length = model, length

    def __call__(self, xt: Tensor) -> Tensor:
        n = xt.shape[1]
        return self.model(nn.functional.pad(xt, (0, self.length - n), value=self.model.mask_index))[:, :n]


# ------------------------------------------------------------------------------------------------- laws


@pytest.mark.parametrize("sampler", ["first_hitting", "random"])
@pytest.mark.parametrize("block_length", [1, 3])
def test_one_position_a_step_is_exact(sampler: str, block_length: int) -> None:
    oracle = mixture(4, 3, seed=5)
    truth = torch.exp(oracle.log_prob(strings(3, 4)))
    options = dict(num_samples=3000, length=4, mask_index=3, sampler=sampler, block_causal=True)
    assert agrees(sample(Padded(oracle, 4), block_length=block_length, **options), truth, 3)


@pytest.mark.parametrize("sampler", TIMED)
def test_steps_are_of_a_block(sampler: str) -> None:
    """One step a block: tokens are independent within it, and blocks follow from each other."""
    oracle = mixture(4, 3, seed=5)
    options = dict(num_samples=3000, length=4, mask_index=3, sampler=sampler, block_causal=True, block_length=2)
    x = sample(Padded(oracle, 4), steps=2, **options)

    def row(xt: Tensor, i: int) -> Tensor:
        return torch.softmax(oracle(xt)[:, i, :3], 1)

    states = strings(3, 4)
    law = torch.ones(81, dtype=torch.float64)
    for i in range(4):
        seen = states.masked_fill(torch.arange(4) >= i // 2 * 2, 3)
        law *= row(seen, i).gather(1, states[:, i : i + 1]).squeeze(1)
    assert agrees(x, law, 3)


def test_bidirectional_models_keep_their_blocks() -> None:
    """LLaDA's start after the prompt, and are asked with all that follows."""
    network = RandomNetwork(7)
    sample(network, length=7, prompt=torch.tensor([1]), block_length=3, sampler="random", mask_index=4)
    assert all(xt.shape[1] == 7 for xt in network.asked)


# ------------------------------------------------------------------------------------------------- caches


@each_sampler
@pytest.mark.parametrize("temperature", [0, 0.7])
@pytest.mark.parametrize(("length", "prompt"), [(12, 0), (14, 4), (15, 6), (11, 9), (8, 8)])
def test_a_cache_changes_no_token(sampler: str, temperature: float, length: int, prompt: int) -> None:
    model, tokens = transformer(), random_tokens(5, prompt)
    options = dict(num_samples=5, length=length, prompt=tokens, mask_index=MASK, sampler=sampler, end_token=2)
    options |= dict(temperature=temperature, return_trajectory=True)
    cache = model.cache(5, 4)
    expected = sample(uncached(model, 4), block_causal=True, block_length=4, **options)
    found = sample(model, cache=cache, **options)
    assert torch.equal(found.trajectory, expected.trajectory)
    assert torch.equal(found.tokens, expected.tokens)
    assert found.num_forwards == expected.num_forwards
    assert torch.equal(found.tokens[:, : cache.tokens.shape[1]], cache.tokens)
    other = sample(None, cache=Recomputing(lambda xt: model(xt, sees=block_causal(xt.shape[1], 4)), 5, 4), **options)
    assert torch.equal(other.tokens, expected.tokens)


@pytest.mark.parametrize("sampler", ["tweedie", "confidence"])
def test_a_model_that_sees_the_noise(sampler: str) -> None:
    model = transformer(cond_dim=8)
    noise = LogLinear().total_noise
    options = dict(num_samples=5, length=10, mask_index=MASK, sampler=sampler, prompt=torch.tensor([1, 2, 3, 0, 1]))
    expected = sample(uncached(model, 4), block_causal=True, block_length=4, **options)
    assert torch.equal(sample(model, cache=model.cache(5, 4, MASK, noise), **options), expected)
    with pytest.raises(ValueError, match=r"^mask_index, total_noise: a model that sees the noise level needs both"):
        model.cache(5, 4)


def test_what_a_cache_holds_is_what_two_streams_see() -> None:
    """The hidden states of a block are those of the estimators' passes, noise level included."""
    for cond_dim in (0, 8):
        model, noise = transformer(cond_dim), LogLinear().total_noise
        x0 = random_tokens(3, 12)
        xt = x0.masked_fill(torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) < 0.6, MASK)
        expected = model.block_conditionals(4, MASK, noise)[0](xt, x0)
        cache = model.cache(3, 4, MASK, noise)
        for start in (0, 4, 8):
            rows = torch.tensor([2, 0])
            torch.testing.assert_close(cache(xt[rows, start : start + 4], rows), expected[rows, start : start + 4])
            torch.testing.assert_close(cache(xt[:, start : start + 4]), expected[:, start : start + 4])
            cache.append(x0[:, start : start + 4])
        whole = model.cache(3, 4, MASK, noise)
        whole.append(x0[:, :8])
        torch.testing.assert_close(whole(xt[:, 8:]), expected[:, 8:])


def test_a_cache_goes_on() -> None:
    model = transformer()
    cache, options = model.cache(3, 4), dict(num_samples=3, mask_index=MASK, sampler="random")
    begun = sample(model, cache=cache, length=10, **options)
    assert cache.tokens.shape == (3, 8)
    found = sample(model, cache=cache, prompt=begun, length=18, **options)
    assert torch.equal(found, sample(model, cache=model.cache(3, 4), prompt=begun, length=18, **options))
    assert torch.equal(cache.tokens, found[:, :16])


def test_a_pass_is_about_a_block_of_sequences_that_gain_a_token() -> None:
    model, options = transformer(), dict(num_samples=6, mask_index=MASK, length=12, prompt=random_tokens(6, 5))
    cache = Recomputing(uncached(model, 4)[0], 6, 4)
    cache.lm_head = model.lm_head
    result = sample(model, cache=cache, return_trajectory=True, **options)
    assert cache.appended == [4, 4]
    changed = (result.trajectory[1:] != result.trajectory[:-1]).any(2)
    rows = [step.nonzero().squeeze(1).tolist() for step in changed if step.any()]
    assert [asked for _, asked in cache.asked] == rows
    assert result.num_forwards == changed.sum()
    assert [held for held, _ in cache.asked] == sorted(held for held, _ in cache.asked)


# ---------------------------------------------------------------------------------------------- end tokens


class Milder(RandomNetwork):
    def __call__(self, xt: Tensor) -> Tensor:
        return 0.05 * super().__call__(xt)


@each_sampler
def test_what_follows_an_end_token_is_filled_with_it(sampler: str) -> None:
    network, prompt = Padded(Milder(14), 14), torch.tensor([1, 2, 3, 0, 2])
    options = dict(num_samples=150, length=14, mask_index=MASK, sampler=sampler, prompt=prompt, seed=3)
    options |= dict(block_causal=True, block_length=4)
    free = sample(network, **options)
    result = sample(network, end_token=2, return_trajectory=True, **options)
    assert torch.equal(result.trajectory[-1], result.tokens)
    ended = 0
    for row, plain in zip(result.tokens[:, 5:].tolist(), free[:, 5:].tolist(), strict=True):
        assert MASK not in row
        end = row.index(2) if 2 in row else len(row)
        assert set(row[end:]) <= {2}
        ended += 2 in row
        if sampler in ("first_hitting", "random"):  # which draw by positions alone
            assert row[:end] == plain[:end]
    assert ended > 10
    assert (result.tokens[:, 5] != 2).any()  # that of the prompt ends nothing
    assert not torch.equal(result.tokens, free)


def test_once_all_have_ended_nothing_is_asked() -> None:
    asked = []

    def model(xt: Tensor) -> Tensor:
        asked.append(xt.shape[1])
        return torch.tensor([0.0, 0, 50, 0, 0]).expand(*xt.shape, 5)

    options = dict(num_samples=3, length=12, mask_index=MASK, block_causal=True, block_length=4)
    assert (sample(model, end_token=2, sampler="confidence", **options) == 2).all()
    assert asked == [4]  # of equally sure tokens the first is revealed
    infill = torch.full((12,), -1).index_fill(0, torch.tensor([6, 9]), 1)
    x = sample(model, end_token=2, infill=infill, **options)
    assert x.tolist() == [[2] * 6 + [1, 2, 2, 1, 2, 2]] * 3


def test_sequences_that_ended_are_not_asked_about() -> None:
    """The first sequence ends in its first block."""

    def model(xt: Tensor) -> Tensor:
        logits = torch.zeros(*xt.shape, 5).double()
        logits[..., 2] = torch.where(xt[:, :1] == 0, 50.0, -50.0)
        return logits

    cache = Recomputing(model, 2, 4)
    prompt = torch.tensor([[0], [1]])
    x = sample(None, num_samples=2, length=12, mask_index=MASK, cache=cache, prompt=prompt, end_token=2)
    assert x[0].tolist() == [0] + [2] * 11
    assert (x[1] != 2).all()
    assert all(rows == [1] for held, rows in cache.asked if held)


# ------------------------------------------------------------------------------------------------- steps


@each_sampler
def test_trajectory(sampler: str) -> None:
    prompt, network = torch.tensor([2, 0, 1]), Padded(RandomNetwork(9), 9)
    options = dict(num_samples=6, length=9, mask_index=MASK, sampler=sampler, prompt=prompt)
    result = sample(network, return_trajectory=True, block_causal=True, block_length=2, **options)
    frames = result.trajectory
    assert torch.equal(frames[0], torch.tensor([2, 0, 1] + [4] * 6).expand(6, 9))
    assert torch.equal(frames[-1], result.tokens)
    assert ((frames[1:] == frames[:-1]) | (frames[:-1] == MASK)).all()
    for frame in frames:  # from left to right: at most one block has both
        blocks = [frame[:, i : i + 2] == MASK for i in range(0, 9, 2)]
        begun = [bool((~block).any()) for block in blocks[2:]]
        left = [bool(block.any()) for block in blocks[1:-1]]
        assert not any(b and m for b, m in zip(begun, left, strict=True))


@pytest.mark.parametrize("sampler", ["tweedie", *RANKED])
def test_steps_are_shared_by_the_blocks(sampler: str) -> None:
    network = Padded(RandomNetwork(10), 10)
    options = dict(num_samples=5, length=10, mask_index=MASK, sampler=sampler, prompt=torch.tensor([1, 1, 1]))
    options |= dict(block_causal=True, block_length=4, return_trajectory=True)
    assert len(sample(network, steps=3, **options).trajectory) == 4
    assert len(sample(network, steps=6, **options).trajectory) <= 7
    with pytest.raises(ValueError, match=r"^steps: expected a multiple of the 3 blocks to fill, got 4"):
        sample(network, steps=4, **options)


@pytest.mark.parametrize(("steps", "each"), [(None, [3, 4, 2]), (6, [2, 2, 2])])
def test_plans(steps: int | None, each: list[int]) -> None:
    """As many steps as a block has positions after the prompt; numbers of steps go on from block to block."""
    plans = plans_of_blocks(14, 5, 4, steps, lambda n: [n])
    assert [block for block, _ in plans] == [slice(4, 8), slice(8, 12), slice(12, 14)]
    assert [plan for _, plan in plans] == [(n, None, [n], sum(each[:i])) for i, n in enumerate(each)]
    assert plans_of_blocks(14, 14, 4, steps, lambda n: [n]) == []


def test_draws_differ_between_blocks() -> None:
    def model(xt: Tensor) -> Tensor:
        return torch.zeros(*xt.shape, 5)

    x = sample(model, num_samples=500, length=12, mask_index=MASK, block_causal=True, block_length=4, steps=3)
    assert 0.15 < (x[:, :4] == x[:, 4:8]).double().mean() < 0.35


# ------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"block_length": None}, "block_length: expected that of the block model, got None"),
        ({"block_length": 0}, "block_length: expected at least 1, got 0"),
        ({"guidance": 1.0}, "guidance: expected 0 with a block model, got 1.0"),
        ({"parametrization": "log_score"}, "block_causal: needs conditionals of the absorbing graph, got True"),
        ({"end_token": -1}, "end_token: expected at least 0, got -1"),
        ({"end_token": MASK}, "end_token: expected another id than the mask's, got 4"),
        ({"end_token": 2, "block_causal": False}, "end_token: needs a block model"),
        ({"sampler": "first_hitting", "steps": 3}, "steps: the sampler 'first_hitting' takes none, got 3"),
        ({"model": lambda xt: torch.zeros(3, 4)}, r"model: expected \[2, 4, V\] numbers, got \(3, 4\)"),
    ],
)
def test_bad_arguments(changes, text: str) -> None:
    arguments = dict(model=Padded(RandomNetwork(8), 8), num_samples=2, length=8, mask_index=MASK)
    arguments |= dict(block_causal=True, block_length=4) | changes
    with pytest.raises(ValueError, match="^" + text):
        sample(arguments.pop("model"), **arguments)


def test_bad_caches() -> None:
    model, prompt = transformer(), random_tokens(3, 8)
    options = dict(num_samples=3, length=12, mask_index=MASK, prompt=prompt)
    cache = model.cache(3, 4)
    cache.append(prompt.roll(1, 0))
    with pytest.raises(ValueError, match=r"^cache: expected the tokens that the sequences begin with, got 8 others"):
        sample(model, cache=cache, **options)
    with pytest.raises(ValueError, match=r"^cache: expected one of num_samples = 3 sequences, got one of 2"):
        sample(model, cache=model.cache(2, 4), **options)
    with pytest.raises(ValueError, match=r"^block_length: expected the block model's, 4, or None, got 2"):
        sample(model, cache=cache, block_length=2, **options)
    ahead = model.cache(3, 4)
    ahead.append(torch.cat([prompt, prompt], 1))
    with pytest.raises(ValueError, match=r"^cache: expected the tokens that the sequences begin with, got 16 others"):
        sample(model, cache=ahead, **options)
    short = DiffusionTransformer(ModelConfig(5, 11, 16, 1, 2)).cache(3, 4)
    with pytest.raises(ValueError, match=r"^length: expected at most 11 tokens, for which the cache is, got 12"):
        sample(model, cache=short, **options)
    part = Recomputing(None, 3, 4)
    part.append(prompt[:, :3])
    with pytest.raises(ValueError, match=r"^cache: expected whole blocks of 4 tokens, got 3 tokens"):
        sample(model, cache=part, **options)


def test_what_a_transformers_cache_refuses() -> None:
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(5, 10, 16, 1, 2))
    cache = model.cache(2, 4)
    cache.append(torch.zeros(2, 8, dtype=torch.int64))
    two = torch.zeros(2, 2, dtype=torch.int64)
    assert cache(two).shape == (2, 2, 16)
    for call, error, text in [
        (lambda: cache(torch.zeros(2, 3, dtype=torch.int64)), ValueError, "xt: expected at most 2 tokens after the 8"),
        (
            lambda: cache(torch.zeros(3, 1, dtype=torch.int64)),
            ValueError,
            r"xt: expected shape \[2, m\] .*got \(3, 1\)",
        ),
        (lambda: cache(two, torch.tensor([1])), ValueError, r"xt: expected shape \[1, m\] with m >= 1, got \(2, 2\)"),
        (lambda: cache(two.float()), TypeError, "xt: expected int64"),
        (lambda: cache(two + 5), ValueError, r"xt: expected ids in \[0, 5\), got 5 to 5"),
        (lambda: cache(two, two.float()), TypeError, "rows: expected int64"),
        (lambda: cache.append(two), ValueError, "tokens: expected whole blocks of 4 tokens, got 2"),
        (lambda: cache.append(torch.zeros(2, 4, dtype=torch.int64)), ValueError, "tokens: expected at most 2 tokens"),
        (lambda: model.cache(2, 4)(torch.zeros(2, 5).long()), ValueError, "xt: expected at most a block of 4 tokens"),
        (lambda: model.cache(0, 4), ValueError, "batch_size: expected at least 1, got 0"),
        (lambda: model.cache(1, 0), ValueError, "block_length: expected at least 1, got 0"),
    ]:
        with pytest.raises(error, match="^" + text):
            call()
    assert math.isfinite(cache(two).sum().item())
