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
from fastdiff.model import DiffusionTransformer, ModelConfig, noised_stream
from fastdiff.training import TrainConfig, diffusion_loss, noise
from fastdiff.training.cards import CARDS
from fastdiff.training.planning import Plan
from fastdiff.training.presets import PRESETS
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


def called(plan, network):
    """A network of the shape on tokens of a part of a batch, by blocks if the plan is."""
    shape, block_length = plan.model, plan.training.block_length
    x = torch.randint(0, shape.num_states, (plan.rows, plan.length))
    noise = torch.rand(x.shape if block_length else x.shape[:1]) if shape.cond_dim else None
    return noised_stream(network, x, noise, x0=x, block_length=block_length) if block_length else network(x, noise)


@pytest.mark.parametrize("block_length", [0, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_activations(shape, dtype, block_length):
    plan, model = plan_of(shape, dtype=dtype, block_length=block_length), DiffusionTransformer(shape)
    cast = dtype == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16, enabled=cast):
        found, _ = kept_for_backward(lambda: called(plan, model.body), model)
    copies = 2 * sum(p.numel() for p in model.blocks.parameters() if p.dim() == 2) if cast else 0
    assert found - copies == pytest.approx(plan.activations, rel=0.02)
    assert copies < plan.memory["weights in use"] or not cast


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_recomputed_activations(shape, dtype):
    plan, model = plan_of(shape, dtype=dtype, recompute=True), DiffusionTransformer(shape)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"), blocks_as(plan.training, model):
        found, _ = kept_for_backward(lambda: called(plan, model.body), model)
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


@pytest.mark.parametrize(("recompute", "block_length"), [(False, 0), (True, 0), (False, 8)])
@pytest.mark.parametrize("shape", SHAPES[::2])
def test_operations(shape, recompute, block_length):
    plan, model = plan_of(shape, recompute=recompute, block_length=block_length), DiffusionTransformer(shape)
    counter = FlopCounterMode(display=False)  # which knows the products of this attention, and not the fused one's
    with counter, blocks_as(plan.training, model), sdpa_kernel(SDPBackend.MATH):
        called(plan, model).sum().backward()
    assert counter.get_total_flops() == pytest.approx(plan.operations, rel=0.05)


@pytest.mark.slow
def test_ranks():
    torchrun.launch(Path(__file__).parents[1] / "distributed" / "planned.py", 4, "exchanged", "most_memory")


def test_presets():
    """Published sizes: SEDD's small and medium, and LLaDA's without what its MLP and biases have otherwise."""
    for name, millions in {"gpt2-small": 170, "gpt2-medium": 424}.items():
        shape = dataclasses.replace(PRESETS[name].model, cond_dim=128)
        assert Plan(shape, TrainConfig("dse-absorb"), 1, 1024).parameters / 1e6 == pytest.approx(millions, rel=0.02)
    for name, (shape, training) in PRESETS.items():
        plan = Plan(shape, training, 8, shape.max_length)
        assert plan.accumulation_for(CARDS["H200 141 GB"]), name
        assert name == "tiny" or plan.last_layer + plan.logits < plan.naive_logits / 10, name


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = "plan --preset 1b --gpus 16 --sharding hybrid --accumulation 2 --tokens 1e12 --json plan.json"
    result = CliRunner().invoke(cli.app, command.split(), catch_exceptions=False)
    assert result.exit_code == 0
    assert "1,625,736,704" in result.output
    numbers = json.loads(Path("plan.json").read_text())
    assert numbers["training"]["shards"] == 8
    assert set(numbers["exchanged"]) == {"all-gather, forward", "all-gather, backward", "reduce-scatter", "all-reduce"}
    assert numbers["total"] == sum(numbers["memory"].values())
    for wrong, message in {
        "--preset 2b": "preset: expected",
        "--preset 1b --gpus 3": "batch_size: expected a multiple of ranks x accumulation = 3 x 1",
        "--preset 1b --gpus 8 --sharding hybrid --shards 3": "shards: expected a divisor of the 8 ranks, got 3",
        "--preset 1b --block-length 5": "block_length: expected a divisor of the length, 4096, got 5",
        "--preset 1b --share 2": "share: expected a number in (0, 1]",
        "--preset 1b --dtype float16": "dtype: expected",
    }.items():
        monkeypatch.setattr("sys.argv", ["fastdiff", "plan", *wrong.split()])
        with pytest.raises(SystemExit):
            cli.main()
        assert message in capsys.readouterr().err


def test_training_with_a_preset(tmp_path, monkeypatch):
    """An option wins over the preset, which a resumed run does not take."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("all work and no play makes a dull text\n" * 200)
    command = "train --data text.txt --out run --preset tiny --depth 1 --length 16 --steps 1 --eval-every 0"
    result = CliRunner().invoke(cli.app, command.split(), catch_exceptions=False)
    assert result.exit_code == 0
    saved = json.loads(Path("run/config.json").read_text())
    model, training = saved["model"], saved["training"]
    assert (model["dim"], model["heads"], model["depth"], model["max_length"]) == (128, 4, 1, 16)
    assert (training["batch_size"], training["lr"], training["steps"]) == (8, 3e-3, 1)
    with pytest.raises(ValueError, match="preset: the run in run has its own sizes"):
        CliRunner().invoke(cli.app, ["train", "--out", "run", "--resume", "--preset", "tiny"], catch_exceptions=False)
