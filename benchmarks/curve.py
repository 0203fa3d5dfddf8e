"""Time and memory of the last layer and its loss against the share of masked tokens: a table, and a picture.

`python benchmarks/curve.py FILE.png`; 2048 rows x 768 x 50257, bfloat16, forward and backward.
"""

import statistics
import sys
from functools import partial

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from measure import DEVICE, interleave, peak_extra_bytes

from fastdiff import linear_dce_loss

ROWS, WIDTH, NUM_STATES, ROUNDS = 2048, 768, 50257, 5
SHARES = (0.05, 0.25, 0.5, 0.75, 1.0)


def calls_of(hidden, lm_head, x0, mask):
    def every_row():
        return (F.cross_entropy(hidden @ lm_head.t(), x0, reduction="none") * mask).sum()

    def by_hand():
        return F.cross_entropy(hidden[mask] @ lm_head.t(), x0[mask], reduction="sum")

    def fastdiff():
        return linear_dce_loss(hidden, lm_head, x0, mask=mask, exclude_mask=False, reduction="sum")

    def both_ways(loss):
        hidden.grad = lm_head.grad = None
        loss().backward()

    losses = {"every row": every_row, "scored rows by hand": by_hand, "linear_dce_loss": fastdiff}
    return {who: partial(both_ways, loss) for who, loss in losses.items()}


def measure():
    """Milliseconds and extra MB by who and share."""
    torch.ones(4 << 30, dtype=torch.uint8)  # a virtual machine pays for pages never touched before
    g = torch.Generator().manual_seed(0)
    hidden, lm_head = torch.randn(ROWS, WIDTH, generator=g), torch.randn(NUM_STATES, WIDTH, generator=g) / WIDTH**0.5
    leaves = [x.to(DEVICE, torch.bfloat16).requires_grad_() for x in (hidden, lm_head)]
    x0, order = torch.randint(0, NUM_STATES, (ROWS,), generator=g).to(DEVICE), torch.randperm(ROWS, generator=g)
    found = {}
    for share in SHARES:
        mask = torch.zeros(ROWS, dtype=torch.bool)
        mask[order[: int(share * ROWS)]] = True
        calls = calls_of(*leaves, x0, mask.to(DEVICE))
        seconds = interleave(calls, ROUNDS)
        for who, call in calls.items():
            found[who, share] = statistics.median(seconds[who]) * 1e3, peak_extra_bytes(call) / 1e6
            print("{:22} {:5.0%} {:8.0f} ms {:8.0f} MB".format(who, share, *found[who, share]), flush=True)
    return found


def plot(found, path):
    _, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for panel, what, column in zip(
        panels, ("forward + backward, ms", "memory beyond the gradients, MB"), (0, 1), strict=True
    ):
        for who in dict.fromkeys(who for who, _ in found):
            panel.plot(SHARES, [found[who, share][column] for share in SHARES], marker="o", label=who)
        panel.set(xlabel="share of masked tokens", ylabel=what, xlim=(0, 1.03), ylim=(0, None))
    panels[0].legend(frameon=False)
    plt.savefig(path, dpi=120)


if __name__ == "__main__":
    plot(measure(), sys.argv[1])
