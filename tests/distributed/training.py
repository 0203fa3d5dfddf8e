"""Run by torchrun with names of functions: each holds training over ranks against the numbers of one process, which
the first command writes to a folder of its own."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torchrun
from torch.distributed.tensor import DTensor

import fastdiff.training.objectives as objectives
from fastdiff.data import Table
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.training import TrainConfig, train

V, L = 13, 8
FOLDER = Path(os.environ.get("FASTDIFF_TEST_FOLDER", "."))
SETTINGS = dict(steps=8, batch_size=8, lr=0.003, warmup=3, ema=0.9, eval_every=4, eval_sequences=6, eval_samples=8)
TOPOLOGIES = [
    ("dce-t", False, "none"),
    ("dce-k", True, "full"),
    ("dce-harmonic", False, "full"),
    ("dse-absorb", True, "full"),
    ("dse-absorb", False, "none"),
    ("dse-uniform", False, "full"),
    ("dse-absorb in blocks of 4", True, "full"),
]
LOSSES = ("dce-t", "dce-k", "dce-harmonic", "dse-absorb", "dse-uniform", "dse-absorb in blocks of 4")


IMPORTANCE = dict(times="importance", complementary=True)


def trained(loss, large=False, out=None, resume=False, dtype=torch.float64, **settings):
    """Weights and their averages by name, whole; and the records, which the first rank has."""
    objectives.LARGE_VOCABULARY = 2 if large else 4096
    loss, _, block_length = loss.partition(" in blocks of ")
    torch.manual_seed(0)
    model = DiffusionTransformer(ModelConfig(V + (loss != "dse-uniform"), L, 16, 2, 2, 8 * loss.startswith("dse"))).to(
        dtype
    )
    tokens = torch.randint(0, V, (40, L), generator=torch.Generator().manual_seed(0))
    records = []
    source = Table(tokens, num_tokens=V, held_out=tokens[:7])
    config = TrainConfig(**(SETTINGS | dict(loss=loss, block_length=int(block_length or 0)) | settings))
    averaged = train(config, model, source, out=out, resume=resume, callback=records.append)
    parts = {"raw": model, "averaged": averaged}
    return {f"{k} {name}": _whole(p) for k, m in parts.items() for name, p in m.named_parameters()}, records


def _whole(parameter):
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def _near(found, expected, what, tolerance=1e-9):
    """Weights, and losses, norms and held-out numbers, which are of float32, agree relative to their size."""
    (weights, records), (wanted, curve) = found, expected
    error = sum((weights[name] - wanted[name]).square().sum() for name in wanted).sqrt()
    assert error < tolerance * sum(tensor.square().sum() for tensor in wanted.values()).sqrt(), f"{what}: {error}"
    if not dist.is_initialized() or dist.get_rank() == 0:
        for record, told in zip(records, curve[-len(records) :], strict=True):
            for name in told.keys() - {"tokens_per_second", "memory"}:
                off = abs(record[name] / told[name] - 1)
                assert off < max(tolerance, 1e-6), f"{what}: {name} {record[name]}, {told[name]}"


def one_process():
    """Writes what one process gives, for the ranks to be held to."""
    for loss in LOSSES:
        torch.save(trained(loss), FOLDER / loss)
    torch.save(trained("dse-absorb", dtype=torch.float32), FOLDER / "float32")
    torch.save(trained("dce-k", **IMPORTANCE), FOLDER / "importance")


def _holds(cases):
    for loss, settings in cases:
        _near(trained(loss, **settings), torch.load(FOLDER / loss), f"{loss}, {settings}")


def two_ranks():
    cases = [(loss, dict(large=large, sharding=sharding)) for loss, large, sharding in TOPOLOGIES]
    cases += [("dce-k", dict(accumulation=4, sharding="full")), ("dse-absorb", dict(accumulation=2, large=True))]
    cases += [("dse-absorb in blocks of 4", dict(accumulation=2))]
    cases += [("dce-t", dict(recompute=True, sharding="full", large=True))]
    _holds(cases)
    found = trained("dse-absorb", dtype=torch.float32, sharding="full")
    _near(found, torch.load(FOLDER / "float32"), "float32", tolerance=1e-5)
    found = trained("dce-k", sharding="full", large=True, accumulation=2, **IMPORTANCE)
    _near(found, torch.load(FOLDER / "importance"), "importance")


def four_ranks():
    hybrid = dict(sharding="hybrid", shards=2)
    _holds([("dce-k", hybrid | dict(large=True)), ("dse-absorb", hybrid | dict(accumulation=2))])
    _holds([("dce-t", dict(sharding="full", accumulation=2)), ("dse-uniform", dict(large=True))])


def other_ranks_go_on():
    """What other ranks have left: half of it on two ranks, sharded, and the rest on as many as there are."""
    _near(trained("dce-k", out=FOLDER / "run", resume=True, sharding="none"), torch.load(FOLDER / "dce-k"), "resumed")


def first_half():
    trained("dce-k", out=FOLDER / "run", steps=4, sharding="full")


if __name__ == "__main__":
    torchrun.run(globals())
