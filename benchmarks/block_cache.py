"""What a block of tokens costs behind more and more clean ones, with a cache of keys and values and without.

`python benchmarks/block_cache.py`; a minute on one core. A network of 4 layers of width 256 on bytes, one sequence,
blocks of 16 tokens in 8 steps. Milliseconds, the least of 5, of 2 without the cache.
"""

import time

import torch
from rich.console import Console
from rich.table import Table

from fastdiff import sample
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.noise.blocks import block_causal

BLOCK, STEPS, SEQUENCES = 16, 8, 1


def milliseconds(call, repeats=5):
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:])


def main():
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(257, None, dim=256, depth=4, heads=4, learned_positions=False)).eval()
    table = Table(title="ms for a block of 16 tokens")
    for column in ("clean tokens before", "with cache", "of that, taking up the block", "without", "ratio"):
        table.add_column(column, justify="right")
    for held in (0, 128, 256, 512, 1024):
        x = torch.randint(0, 256, (SEQUENCES, held))
        options = dict(num_samples=SEQUENCES, length=held + BLOCK, prompt=x, steps=STEPS, sampler="random", seed=1)
        cache = model.cache(SEQUENCES, BLOCK)
        if held:
            with torch.no_grad():
                cache.append(x)
        one = cache.tokens.new_zeros(SEQUENCES, BLOCK)

        def append(cache=cache, one=one):
            cache.append(one)
            cache.tokens = cache.tokens[:, :-BLOCK]  # forget it

        def recomputed(xt):
            return model.body(xt, sees=block_causal(xt.shape[1], BLOCK))

        taking = milliseconds(append)
        cached = taking + milliseconds(lambda options=options, cache=cache: sample(model, cache=cache, **options))
        body = (recomputed, model.lm_head)
        given = dict(block_causal=True, block_length=BLOCK, mask_index=256)
        without = milliseconds(
            lambda options=options, given=given, body=body: sample(body, **given, **options), repeats=3
        )
        table.add_row(*(f"{held}", f"{cached:.0f}", f"{taking:.0f}", f"{without:.0f}", f"{without / cached:.1f}"))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
