"""What the estimators cost beside the network: masks, gathers, statistics and the control variate.

A byte-level model of the demo's size, 64 network passes for each of 8 windows of 128 bytes.
"""

import torch
from measure import DEVICE

from fastdiff import dce_loss, time_free_nll
from fastdiff.data import NUM_BYTES
from fastdiff.model import DiffusionTransformer, ModelConfig

WINDOWS, LENGTH, PASSES = 8, 128, 64


def test_time_free_nll(compare):
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(NUM_BYTES + 1, max_length=LENGTH, dim=128, depth=2, heads=4)).to(DEVICE)
    x0 = torch.randint(0, NUM_BYTES, (WINDOWS, LENGTH), device=DEVICE)
    mask = torch.rand(WINDOWS * PASSES, LENGTH, device=DEVICE) < 0.5
    rows = x0.repeat_interleave(PASSES, 0)

    @torch.no_grad()
    def passes_alone():
        for xt, x, m in zip(rows.where(~mask, NUM_BYTES).split(64), rows.split(64), mask.split(64), strict=True):
            dce_loss(model(xt), x, mask=m, mask_index=NUM_BYTES)

    calls = {
        proposal: lambda proposal=proposal: time_free_nll(
            model, x0, mask_index=NUM_BYTES, num_samples=PASSES, proposal=proposal, batch_size=64
        )
        for proposal in ("stratified", "uniform")
    }
    compare("time_free_nll, 8 x 128 bytes, 64 passes", calls | {"the passes and losses alone": passes_alone})
