"""A whole training step: noise, network, loss, gradients, AdamW. GPT-2's small size on a GPU, a tenth of it on a CPU.

Every column trains the same network on the same number of tokens; they differ in noise and loss alone.
"""

from functools import partial

import peers
import pytest
import torch
from measure import DEVICE

from fastdiff import dce_loss, linear_dce_loss, mask_tokens
from fastdiff.model import DiffusionTransformer, ModelConfig

NUM_STATES = 50258
MASK = NUM_STATES - 1
GPU = DEVICE.type == "cuda"
BATCH, LENGTH, SIZE = (16, 1024, dict(dim=768, depth=12, heads=12)) if GPU else (8, 128, dict(dim=256, depth=4))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return DiffusionTransformer(ModelConfig(NUM_STATES, max_length=LENGTH, **SIZE)).to(DEVICE)


def losses_of(model, x0, t):
    """Each a loss of a freshly noised batch, with the likelihood's weight 1 / t."""
    rate = 1 / t

    def published(formula):
        xt = peers.masked_tokens(x0, t, MASK)
        return formula(model(xt), rate, xt, x0) / x0.numel()

    def fused():
        xt = mask_tokens(x0, t, mask_index=MASK).xt
        return dce_loss(model(xt), x0, xt=xt, weight=rate, reduction="mean", num_items=x0.numel())

    def without_logits():
        xt = mask_tokens(x0, t, mask_index=MASK).xt
        body, lm_head = model.body(xt), model.lm_head.weight
        return linear_dce_loss(body, lm_head, x0, xt=xt, weight=rate, reduction="mean", num_items=x0.numel())

    return {
        "fastdiff, linear_dce_loss": without_logits,
        "fastdiff, dce_loss": fused,
        "eager, as LLaDA": partial(published, peers.llada_ce),
        "eager, as MDLM": partial(published, peers.mdlm_subs),
    }


def test_step(model, compare):
    x0 = torch.randint(0, MASK, (BATCH, LENGTH), device=DEVICE)
    t = (torch.arange(BATCH, device=DEVICE) + 0.5) / BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(loss):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    calls = {who: partial(step, loss) for who, loss in losses_of(model, x0, t).items()}
    calls["the network alone"] = partial(step, lambda: model.body(x0).float().square().mean())
    compare(f"step, {BATCH} x {LENGTH} tokens, V = {NUM_STATES}, {SIZE['depth']} layers of {SIZE['dim']}", calls)
