"""A whole training step: noise, network, loss, gradients, AdamW. GPT-2's small size on a GPU, a tenth of it on a CPU.

Every column trains the same network on the same number of tokens; they differ in noise and loss alone. And what
`fastdiff.training.train` adds to a step by hand, with a network of 10 million parameters.
"""

import copy
import statistics
import time
from functools import partial
from itertools import pairwise

import peers
import pytest
import torch
from measure import DEVICE, wait

from fastdiff import dce_loss, linear_dce_loss, mask_exactly, mask_tokens, sample_mask_counts
from fastdiff.data import Table
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.training import TrainConfig, train

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


def test_share_of_the_trainer(tmp_path, benchmark, capsys):
    """After each step of a run, one by hand. In processor time on a CPU, which other programs take nothing of."""
    clock, batch, length, steps = time.perf_counter if GPU else time.process_time, 128 if GPU else 8, 128, 40
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(257, length, dim=320, depth=8, heads=5)).to(DEVICE)
    by_hand, x0 = copy.deepcopy(model), torch.randint(256, (batch, length), device=DEVICE)
    optimizer = torch.optim.AdamW(by_hand.parameters(), fused=True)
    moments = [clock()]

    def step(record):
        wait()
        moments.append(clock())
        counts, weight = (tensor.to(DEVICE) for tensor in sample_mask_counts(batch, length))
        xt = mask_exactly(x0, counts, mask_index=256).xt
        dce_loss(by_hand(xt), x0, xt=xt, weight=weight, reduction="mean", num_items=x0.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        moments.append(clock())

    run = partial(train, TrainConfig(steps=steps, batch_size=batch, eval_every=0), model, Table(x0, num_tokens=256))
    benchmark.pedantic(partial(run, out=tmp_path, callback=step), rounds=1)
    seconds = [end - begin for begin, end in pairwise(moments)]
    trainer, hand = seconds[::2][5:-5], seconds[1::2][5:-5]  # readings of the first and last are late on a GPU
    share = 1 - statistics.median(h / t for h, t in zip(hand, trainer, strict=True))
    with capsys.disabled():
        of = f"{statistics.median(trainer) * 1e3:.1f} ms, by hand {statistics.median(hand) * 1e3:.1f} ms"
        print(f"\nthe trainer's own share of a step of {batch} x {length} tokens: {share:.1%} of {of}")
