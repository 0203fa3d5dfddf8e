"""Run by torchrun with names of functions: each holds training over ranks against the numbers of one process, which
the first command writes to a folder of its own."""

import os
from pathlib import Path

import torch
import torchrun
from torch.distributed.tensor import DTensor

import fastdiff.training.objectives as objectives
from fastdiff.data import Table
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.training import TrainConfig, train

V, L = 13, 8
FOLDER = Path(os.environ.get("FASTDIFF_TEST_FOLDER", "."))
SETTINGS = dict(steps=50, batch_size=8, lr=0.003, warmup=5, ema=0.9, eval_every=25, eval_sequences=6, eval_samples=8)
LOSSES = ("dce-t", "dce-k", "dce-harmonic", "dse-absorb", "dse-uniform")


def trained(loss, out=None, seed=0, resume=False, large=False, **settings):
    """Weights and their average by name, whole; and the records, which the first rank has."""
    objectives.LARGE_VOCABULARY = 2 if large else 4096
    torch.manual_seed(seed)
    model = DiffusionTransformer(ModelConfig(V + (loss != "dse-uniform"), L, 16, 2, 2, 8 * loss.startswith("dse")))
    tokens = torch.randint(0, V, (40, L), generator=torch.Generator().manual_seed(0))
    records = []
    config = TrainConfig(**(SETTINGS | dict(loss=loss) | settings))
    source = Table(tokens, num_tokens=V, held_out=tokens[:7])
    averaged = train(config, model, source, out=out, resume=resume, callback=records.append)
    weights = {f"{k}.{name}": whole(p) for k, m in enumerate((model, averaged)) for name, p in m.named_parameters()}
    return model, weights, records


def whole(parameter):
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


if __name__ == "__main__":
    torchrun.run(globals())
