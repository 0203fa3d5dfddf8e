"""Checkpoints and exports of one process."""

import json
import threading

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpointed import Run, assert_equal, assert_whole, damage, filled, limit, whole
from torch import nn

from fastdiff.loading import load
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.training.checkpoints import Checkpoints
from fastdiff.training.exporting import export
from fastdiff.weights import read_weights

# pytest puts its own filters in the place of those that the module sets
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def test_values_are_those_at_the_call(tmp_path, monkeypatch):
    """Weights change, as do the values of the optimiser, before anything is written."""
    changed, write = threading.Event(), dcp.save
    monkeypatch.setattr(dcp, "save", lambda *args, **options: changed.wait(10) and write(*args, **options))
    checkpoints, run, extra = Checkpoints(tmp_path), Run(steps=1), {"step": 1}
    for step in (1, 2):  # the second into memory of the first
        values, extra["step"] = run.values(), step
        changed.clear()
        checkpoints.save(step, run.state(), extra)
        run.train(1)
        extra["step"] = -1
        changed.set()
        loaded = Run()
        assert loaded.load(checkpoints, checkpoints.latest()) == {"step": step}
        assert_equal(loaded.values(), values)


def test_which_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, keep_every=4)
    for step in range(1, 12):
        checkpoints.save(step, filled(step), {"step": step})
    assert checkpoints.latest() == 11
    assert_whole(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-{step:08}" for step in (4, 8, 10, 11)]
    for step in (3, 11):
        with pytest.raises(ValueError, match=rf"step: expected one after 11, the newest in {tmp_path}, got {step}"):
            checkpoints.save(step, filled(step), {})


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "extra.json", "checksums.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "missing"])
def test_damaged(tmp_path, name, how):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, filled(step), {"step": step})
    assert checkpoints.latest() == 2
    path, state = tmp_path / "step-00000002" / name, filled(-1)
    if how == "missing":
        path.unlink()
    else:
        damage(path, how)
    error = FileNotFoundError if how == "missing" else ValueError
    with pytest.raises((error, FileNotFoundError), match=str(path.parent)) as caught:
        checkpoints.load(2, state)
    if name in ("extra.json", "checksums.json"):
        with pytest.raises(error, match=name):
            checkpoints.extra(2)
    else:
        assert checkpoints.extra(2) == {"step": 2}
    assert "\n" not in str(caught.value)
    assert_equal(state, filled(-1))
    if name != "checksums.json":
        assert name in str(caught.value)
    assert checkpoints.load(1, state) == {"step": 1}


def test_of_another_model(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(FileNotFoundError, match=f"no such checkpoint: {tmp_path}/step-00000005"):
        checkpoints.load(5, filled(5))
    checkpoints.save(5, filled(5), {})
    others = {
        "model.w1: expected torch.float32 (3,), but .*/step-00000005 has torch.float32 (100, 2)": torch.zeros(3),
        "model.w1: expected torch.float64 (100, 2), but .* has torch.float32": torch.zeros(100, 2, dtype=torch.float64),
        "model.w1: expected none, but .* has torch.float32 (100, 2)": None,
        "model.w1: expected an object, but": 3,
    }
    for message, value in others.items():
        state = filled(-1)
        state["model"]["w1"] = value
        if value is None:
            del state["model"]["w1"]
        before = whole(state)
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            checkpoints.load(5, state)
        assert_equal(state, before)
    more = filled(-1)
    more["model"]["w9"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"model.w9: expected torch.float32 \(2,\), but .* has none"):
        checkpoints.load(5, more)
    part = {"model": filled(-1)["model"]}
    checkpoints.load(5, part)
    assert_equal(part, {"model": filled(5)["model"]})


def test_a_full_disk(tmp_path):
    """The error comes with the next call; the disk has its room again, and the checkpoint before is there."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, filled(1), {"step": 1})
    for size, name in ((2000, "__0_0.distcp"), (3500, "__0_0.distcp"), (100, "__0_0.distcp")):
        checkpoints.wait()
        with limit(size):
            checkpoints.save(2, filled(2), {"step": 2})
            with pytest.raises(OSError, match=f"File too large: '{tmp_path}/step-00000002.part/{name}'"):
                checkpoints.save(3, filled(3), {"step": 3})
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    checkpoints.save(2, filled(2), {"step": 2})
    checkpoints.wait()
    assert assert_whole(tmp_path) == 2


def test_wrong_arguments(tmp_path):
    with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(TypeError, match="JSON"):
        Checkpoints(tmp_path).save(1, filled(1), {"x": object()})
    assert Checkpoints(tmp_path / "none").latest() is None


def test_export(tmp_path):
    model = DiffusionTransformer(ModelConfig(257, 16, 32, 2, 2))
    nn.init.normal_(model.lm_head.weight)
    export(model, tmp_path, training={"steps": 3})
    weights, config = dict(model.state_dict()), (tmp_path / "config.json").read_bytes()
    assert_equal(dict(DiffusionTransformer.from_pretrained(tmp_path).state_dict()), weights)
    assert load(str(tmp_path), torch.device("cpu")).length == 16
    model.save_pretrained(tmp_path / "same", training={"steps": 3})
    assert (tmp_path / "same/config.json").read_bytes() == config
    export(model, tmp_path, file_size=20_000)
    files = {path.name for path in tmp_path.glob("model*")}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert files == {"model.safetensors.index.json", *index.values()}
    assert len(files) > 4
    assert_equal(read_weights(tmp_path), weights)
    biggest = max(t.nbytes for t in weights.values())
    assert all(path.stat().st_size < max(20_000, biggest) + 5000 for path in tmp_path.glob("model-*"))
