"""A small run, and what it leaves."""

import json

import torch

from fastdiff.data import Table
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.training import TrainConfig, train

TOKENS = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0], [1, 1, 1, 1]])
SETTINGS = {"steps": 6, "batch_size": 4, "lr": 0.01, "warmup": 2, "eval_every": 0}


def make(loss: str = "dce-k", seed: int = 0) -> DiffusionTransformer:
    torch.manual_seed(seed)
    return DiffusionTransformer(ModelConfig(4 + (loss != "dse-uniform"), 4, 16, 1, 2, 8 * (loss[:3] != "dce")))


def source(seed: int = 0) -> Table:
    return Table(TOKENS, num_tokens=4, held_out=TOKENS, seed=seed)


def run(out=None, *, resume=False, model=None, callback=None, data=None, **settings):
    """Trains; returns the averaged model and the records."""
    records = []

    def collect(record):
        records.append(record)
        if callback is not None:
            callback(record)

    config = TrainConfig(**(SETTINGS | settings))
    model = make(config.loss) if model is None else model
    averaged = train(config, model, data or source(), out=out, resume=resume, callback=collect)
    return averaged, records


def losses(records) -> list[float]:
    return [r["loss"] for r in records if "loss" in r]


def on_disk(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
