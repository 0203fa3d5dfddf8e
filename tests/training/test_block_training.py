"""Training by blocks: a noise level of its own for each, the clean blocks before it, and a likelihood of blocks."""

import dataclasses
import json
import math

import pytest
import torch
from training_runs import TOKENS, losses, make, run, same_weights

from fastdiff import block_nll
from fastdiff.data import Table
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.training import LOSSES, SCHEDULE, TrainConfig, noise

OF_BLOCKS = [name for name in LOSSES if name not in ("dse-uniform", "gidd")]  # whose tokens move
MASK = 4


def chain(n: int, length: int = 12) -> torch.Tensor:
    """Sequences in which a token is the one before, plus 1, but in one case out of 10, and the first is any."""
    generator = torch.Generator().manual_seed(n)
    first = torch.randint(0, 4, (n, 1), generator=generator)
    jumps = torch.where(torch.rand(n, length - 1, generator=generator) < 0.1, 3, 1)
    return torch.cat([first, jumps], 1).cumsum(1) % 4


# -- noise -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", OF_BLOCKS)
def test_a_block_is_noised_as_a_sequence_would_be(loss):
    """With a model that loses 1 nat at each mask, the loss of each block is 1 nat a token."""
    x0 = torch.randint(0, 4, (2000, 8), generator=torch.Generator().manual_seed(0))
    batch = noise(x0, loss, 5, seed=1, step=0, block_length=4)
    assert batch.block_length == 4
    assert torch.equal(batch.x0, x0)
    assert ((batch.xt == MASK) | (batch.xt == x0)).all()
    blocks = [value.unflatten(1, (2, 4)) for value in (batch.weight, batch.sigma)]
    assert all((block == block[..., :1]).all() for block in blocks)
    weight = blocks[0][..., 0] / (torch.expm1(blocks[1][..., 0]) if loss == "dse-absorb" else 1)
    per_token = (batch.xt == MASK).unflatten(1, (2, 4)).sum(2) * weight.double() / 4
    assert ((per_token.mean(0) - 1).abs() <= 4 * per_token.std(0) / len(x0) ** 0.5).all()


def test_counts_of_blocks_are_stratified():
    """In a batch of 4 sequences of 3 blocks each of the 4 counts comes 3 times, and where it comes moves on."""
    found = []
    for step in range(20):
        batch = noise(torch.zeros(4, 12, dtype=torch.int64), "dce-k", 5, seed=0, step=step, block_length=4)
        counts = (batch.xt == MASK).unflatten(1, (3, 4)).sum(2)
        assert counts.unique(return_counts=True)[1].tolist() == [3] * 4
        assert torch.equal(batch.weight[:, ::4] * counts, torch.full((4, 3), 4.0))
        found.append(counts)
    assert (torch.stack(found).amax(0) == 4).all()
    assert (torch.stack(found).amin(0) == 1).all()


@pytest.mark.parametrize(("loss", "complementary"), [*((loss, False) for loss in OF_BLOCKS), ("dce-k", True)])
def test_noise_is_named_by_the_row_and_the_block(loss, complementary):
    options = dict(seed=1, step=2, block_length=3, complementary=complementary)
    x0 = torch.randint(0, 4, (12, 6), generator=torch.Generator().manual_seed(0))
    whole = noise(x0, loss, 5, **options)
    for first, n in ((0, 4), (3, 8), (11, 1)):
        part = noise(x0[first : first + n], loss, 5, first=first, batch_size=12, **options)
        for of_part, of_whole in zip(part[:4], whole[:4], strict=True):
            assert torch.equal(of_part, of_whole[first : first + n])


def test_complementary_blocks():
    x0 = torch.zeros(8, 12, dtype=torch.int64)
    batch = noise(x0, "dce-k", 5, seed=0, step=0, block_length=4, complementary=True)
    mask = batch.xt == MASK
    assert (mask[::2] ^ mask[1::2]).all()
    counts = mask.unflatten(1, (3, 4)).sum(2).repeat_interleave(4, 1)
    torch.testing.assert_close(batch.weight.double()[mask], 5 / counts.double()[mask])


# -- runs ------------------------------------------------------------------------------------------------


def shape(loss: str = "dce-k") -> DiffusionTransformer:
    torch.manual_seed(0)
    return DiffusionTransformer(ModelConfig(5, 12, 32, 1, 2, 8 * loss.startswith("dse")))


@pytest.mark.parametrize(("loss", "most"), [("dce-k", 1.1), ("dse-absorb", 1.6)])
def test_learning(loss, most):
    """What follows from the token before is learned: the chain has 0.6 bits a token, and 2 where nothing is known."""
    data = Table(chain(500), num_tokens=4, held_out=chain(64))
    settings = {"block_length": 3, "steps": 150, "batch_size": 32, "ema": 0.9, "eval_every": 150, "eval_samples": 8}
    _, records = run(loss=loss, model=shape(loss), data=data, **settings)
    assert losses(records)[0] == pytest.approx(math.log(4), rel=0.3)
    assert 0.6 < records[-1]["bits_per_token"] < most


def test_what_is_told_is_the_likelihood_of_blocks():
    averaged, records = run(block_length=2, eval_every=6, eval_samples=3)
    model = averaged.block_conditionals(2, MASK, SCHEDULE.total_noise)
    found = block_nll(model, TOKENS, mask_index=MASK, block_length=2, num_samples=3).bits_per_token
    assert records[-1]["bits_per_token"] == pytest.approx(found.mean().item(), rel=1e-6)


@pytest.mark.parametrize("loss", ["dce-k", "dse-absorb"])
def test_a_large_vocabulary_changes_nothing_but_memory(loss, monkeypatch):
    """And of the two streams the noised one alone comes to the last layer."""
    logits = losses(run(loss=loss, block_length=2)[1])
    monkeypatch.setattr("fastdiff.training.objectives.LARGE_VOCABULARY", 2)
    model, shapes = make(loss), set()
    model.lm_head.register_forward_pre_hook(lambda layer, given: shapes.add(tuple(given[0].shape)))
    assert losses(run(loss=loss, model=model, block_length=2)[1]) == pytest.approx(logits, rel=1e-4)
    assert (4, 4, 16) in shapes
    assert max(shape[1] for shape in shapes) == 4


@pytest.mark.parametrize("times", ["stratified", "importance"])
def test_resumed_run_equals_unbroken_run(tmp_path, times):
    settings = {"block_length": 2, "times": times, "eval_every": 3, "eval_samples": 4}
    whole, records = run(tmp_path / "a", **settings)
    run(tmp_path / "b", steps=3, **settings)
    resumed, rest = run(tmp_path / "b", resume=True, **settings)
    assert same_weights(resumed, whole)
    assert losses(rest) == losses(records)[3:]
    assert rest[-1]["bits_per_token"] == records[-1]["bits_per_token"]


def test_accumulation_and_recomputing_change_nothing():
    whole = losses(run(block_length=2)[1])
    assert losses(run(block_length=2, accumulation=2, recompute=True)[1]) == pytest.approx(whole, rel=1e-5)


def test_a_run_says_its_block_length(tmp_path):
    run(tmp_path, steps=1, block_length=2)
    assert json.loads((tmp_path / "config.json").read_text())["training"]["block_length"] == 2
    with pytest.raises(ValueError, match=r"block_length: the run in \S+ has 2, got 0"):
        run(tmp_path, resume=True)


def test_blocks_that_do_not_fit():
    with pytest.raises(ValueError, match="block_length: expected a divisor of the length, 4, got 3"):
        run(block_length=3)
    with pytest.raises(ValueError, match="block_length: expected at least 0, got -1"):
        TrainConfig(block_length=-1)
    for loss in ("dse-uniform", "gidd"):
        with pytest.raises(ValueError, match=f"block_length: expected 0 for loss '{loss}', got 4"):
            TrainConfig(loss, block_length=4)
    assert dataclasses.replace(TrainConfig(), block_length=4).streams == 2
