"""Plans of a step against what is counted: saved tensors, states, collectives, operations."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import torchrun
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from fastdiff import cli
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.planning import CARDS, Plan
from fastdiff.presets import PRESETS
from fastdiff.training import TrainConfig, diffusion_loss, noise
from fastdiff.training.ranks import blocks_as

SHAPES = [
    ModelConfig(300, 96, 64, 3, 2),
    ModelConfig(5001, 128, 96, 2, 4, learned_positions=False),
    ModelConfig(300, 64, 128, 4, 2, cond_dim=16, learned_positions=False),
]


def plan_of(shape, gpus=1, **training):
    loss = "dse-absorb" if shape.cond_dim else "dce-k"
    return Plan(shape, TrainConfig(loss, batch_size=8, **training), gpus, shape.max_length)


def kept_for_backward(call, model):
    """Bytes that autograd keeps, each storage once, and none of the parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, or its place would be taken by another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return sum(storage.nbytes() for storage in kept.values()), result


def inputs(plan):
    shape = plan.model
    x = torch.randint(0, shape.num_states, (plan.rows, plan.length))
    return (x, torch.rand(plan.rows)) if shape.cond_dim else (x,)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations(shape, dtype):
    plan, model = plan_of(shape, dtype=dtype), DiffusionTransformer(shape)
    cast = dtype == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        found, _ = kept_for_backward(lambda: model.body(*inputs(plan)), model)
    copies = 2 * sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2) if cast else 0
    assert found - copies == pytest.approx(plan.activations, rel=0.02)
    assert copies < plan.memory["weights in use"] or not cast


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_recomputed_activations(shape, dtype):
    plan, model = plan_of(shape, dtype=dtype, recompute=True), DiffusionTransformer(shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"), blocks_as(plan.training, model):
        found, _ = kept_for_backward(lambda: model.body(*inputs(plan)), model)
    width = plan.tokens * shape.dim * plan.stream
    assert found == pytest.approx(plan.activations - plan.activations_of_a_block + width, rel=0.04)


@pytest.mark.parametrize("loss", ["dce-k", "dse-absorb"])
def test_states(loss):
    shape = dataclasses.replace(SHAPES[0], cond_dim=16 * (loss == "dse-absorb"))
    plan, model = plan_of(shape), DiffusionTransformer(shape)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = noise(torch.randint(0, 299, (2, shape.max_length)), loss, shape.num_states, seed=0, step=0)
    diffusion_loss(model, batch, loss, reduction="sum").backward()
    optimizer.step()
    states = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert sum(p.numel() for p in model.parameters()) == plan.parameters
    for name, tensors in {
        "weights": model.parameters(),
        "gradients": (p.grad for p in model.parameters()),
        "AdamW": states,
    }.items():
        assert sum(tensor.nbytes for tensor in tensors) == plan.memory[name], name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("shape", SHAPES[::2])
def test_operations(shape, recompute):
    plan, model = plan_of(shape, recompute=recompute), DiffusionTransformer(shape)
    counter = FlopCounterMode(display=False)  # which knows the products of this attention, and not the fused one's
    with counter, blocks_as(plan.training, model), sdpa_kernel(SDPBackend.MATH):
        model(*inputs(plan)).sum().backward()
    assert counter.get_total_flops() == pytest.approx(plan.operations, rel=0.05)


def test_exchanged():
    torchrun.launch(Path(__file__).parent / "distributed" / "planned.py", 4, "exchanged")
