"""What the estimators cost beside the network, and what an error bar costs by them and as published.

A byte-level model of the demo's size and windows of 128 bytes. The first comparison needs no training, the second
trains it on the standard library's text for 600 steps.
"""

from types import SimpleNamespace

import pytest
import torch
from measure import DEVICE
from standins.llada import get_log_likelihood

from fastdiff import dce_loss, time_free_nll
from fastdiff.data import NUM_BYTES, Text, load_documents
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.training import TrainConfig, train

WINDOWS, LENGTH, PASSES = 8, 128, 64
PUBLISHED_PASSES, REPEATS = 128, 16


def network():
    torch.manual_seed(0)
    return DiffusionTransformer(ModelConfig(NUM_BYTES + 1, max_length=LENGTH, dim=128, depth=2, heads=4)).to(DEVICE)


def test_time_free_nll(compare):
    model = network()
    x0 = torch.randint(0, NUM_BYTES, (WINDOWS, LENGTH), device=DEVICE)
    mask = torch.rand(WINDOWS * PASSES, LENGTH, device=DEVICE) < 0.5
    rows = x0.repeat_interleave(PASSES, 0)

    @torch.no_grad()
    def passes_alone():
        for xt, x, m in zip(rows.where(~mask, NUM_BYTES).split(64), rows.split(64), mask.split(64), strict=True):
            dce_loss(model(xt), x, mask=m, mask_index=NUM_BYTES)

    calls = {
        f"fastdiff, {proposal}": lambda proposal=proposal: time_free_nll(
            model, x0, mask_index=NUM_BYTES, num_samples=PASSES, proposal=proposal, batch_size=64
        )
        for proposal in ("stratified", "uniform")
    }
    compare("time_free_nll, 8 x 128 bytes, 64 passes", calls | {"the passes and losses alone": passes_alone})


@pytest.fixture(scope="module")
def trained():
    source, model = Text(load_documents("stdlib"), length=LENGTH), network()
    config = TrainConfig("dce-k", steps=600, batch_size=16, lr=3e-3, warmup=50, eval_every=0)
    return train(config, model, source), source.validation(WINDOWS).to(DEVICE)


@torch.no_grad()
def test_same_error_bar(trained, compare):
    """LLaDA's procedure says nothing of its error, so its results' own spread is taken; then the least passes of ours
    that err no more."""
    model, x0 = trained

    def with_logits(xt):
        return SimpleNamespace(logits=model(xt))

    def published():
        with torch.device(DEVICE):
            options = dict(mc_num=PUBLISHED_PASSES, mask_id=NUM_BYTES)
            return torch.tensor([get_log_likelihood(with_logits, x0.new_empty(0), x, **options) for x in x0])

    def ours(passes):
        return time_free_nll(model, x0, mask_index=NUM_BYTES, num_samples=passes)

    def error(passes):
        return ours(passes).stderr.square().mean().sqrt().item()

    spread = torch.stack([published() for _ in range(REPEATS)]).var(0).mean().sqrt().item()
    passes = next(n for n in (8, 16, 32, 64, 128) if error(n) <= spread)
    calls = {
        f"fastdiff, {passes} passes, ± {error(passes):.1f} nats": lambda: ours(passes),
        f"LLaDA, {PUBLISHED_PASSES} passes, ± {spread:.1f} nats": published,
    }
    compare(f"likelihood of {WINDOWS} x {LENGTH} bytes", calls, rounds=3)
