"""Checkpoints over processes of torchrun and gloo: the same values on any number of ranks, and errors on all."""

import copy
import json
import time
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torchrun
from checkpointed import Run, assert_equal, damage, limit, shared
from torch.distributed.fsdp import fully_shard

from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.training.checkpoints import Checkpoints
from fastdiff.training.exporting import export
from fastdiff.weights import read_weights

# pytest puts its own filters in the place of those that the module sets
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:torch.distributed is disabled")]

SETTINGS = {"lr": 0.01, "name": "a run"}


def save(run, folder, step):
    """Saves, and what the values are beside it; trains on while it is being written."""
    checkpoints, values = Checkpoints(folder), run.values()
    checkpoints.save(step, run.state(), {"step": step, "settings": SETTINGS})
    run.train(2)
    if not dist.is_initialized() or dist.get_rank() == 0:
        torch.save(values, folder.with_suffix(".values"))
    checkpoints.wait()


def assert_loads(how, folder):
    run, checkpoints = Run(how), Checkpoints(folder)
    step = checkpoints.latest()
    assert run.load(checkpoints, step) == {"step": step, "settings": SETTINGS}
    values = run.values()
    assert_equal(values, torch.load(folder.with_suffix(".values")))
    assert {v["step"].item() for v in values["optimizer"]["state"].values()} == {step}  # AdamW's own count


def two_ranks_load_and_save():
    for how in ("DDP", "FSDP"):
        assert_loads(how, shared() / "plain-1")
        save(Run(how, steps=3), shared() / f"{how}-2", 3)


def four_ranks_load_and_save():
    for how in ("FSDP", "HSDP"):
        for folder in ("plain-1", "FSDP-2", "DDP-2"):
            assert_loads(how, shared() / folder)
    save(Run("HSDP", steps=3), shared() / "HSDP-4", 3)


def two_ranks_load_what_four_saved():
    assert_loads("FSDP", shared() / "HSDP-4")


def an_error_of_one_rank_ends_all():
    """A full disk, a rank without memory, a damaged file, another model: the same line on each, at the same call."""
    folder, last = shared() / "errors", dist.get_rank() == 1
    run, checkpoints = Run("FSDP", steps=3), Checkpoints(folder)
    checkpoints.save(3, run.state(), {})
    checkpoints.wait()
    with limit(1000) if last else limit(None):
        checkpoints.save(4, run.state(), {})
        with pytest.raises(OSError, match=r"File too large: .*step-00000004.part/__1_0.distcp"):
            checkpoints.wait()
    assert checkpoints.latest() == 3

    def fails(state):
        raise MemoryError("no memory on rank 1")

    stage = checkpoints._stager.stage
    checkpoints._stager.stage = fails if last else stage
    with pytest.raises(RuntimeError, match="MemoryError: no memory on rank 1"):
        checkpoints.save(4, run.state(), {})
    checkpoints._stager.stage = stage
    other = run.state()
    del other["model"]["scale"]
    with pytest.raises(ValueError, match=r"model.scale: expected none, but .*errors/step-00000003 has torch.float32"):
        checkpoints.load(3, other)
    checkpoints.save(4, run.state(), {})
    checkpoints.wait()
    if last:
        damage(folder / "step-00000004/__1_0.distcp", "flip")
    dist.barrier()
    with pytest.raises(ValueError, match=r"step-00000004/__1_0.distcp: damaged or cut short"):
        checkpoints.load(4, run.state())
    assert run.load(checkpoints, 3) == {}


def a_rank_that_hangs_ends_the_others():
    new_group, dist.new_group = dist.new_group, partial(dist.new_group, timeout=timedelta(seconds=2))
    checkpoints = Checkpoints(shared() / "hangs")
    dist.new_group = new_group
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"[Tt]imed out"):
            checkpoints.save(1, {"model": {}}, {})
    else:
        time.sleep(4)


def exports_what_is_in_parts():
    torch.manual_seed(0)
    plain = DiffusionTransformer(ModelConfig(13, 8, 16, 2, 2)).requires_grad_(False)
    sharded = copy.deepcopy(plain)
    for block in sharded.blocks:
        fully_shard(block)
    fully_shard(sharded)
    export(sharded, shared() / "one", data={"path": "x"})
    export(sharded, shared() / "many", file_size=3000)
    if dist.get_rank() == 0:
        assert_equal(dict(DiffusionTransformer.from_pretrained(shared() / "one").state_dict()), plain.state_dict())
        assert_equal(read_weights(shared() / "many"), dict(plain.state_dict()))
        assert json.loads((shared() / "one/config.json").read_text())["data"] == {"path": "x"}
    with limit(1000) if dist.get_rank() == 0 else limit(None), pytest.raises(OSError, match=r"one/model\.safetensors"):
        export(sharded, shared() / "one")
    assert_equal(read_weights(shared() / "one"), dict(plain.state_dict()))


def test_ranks_read_what_others_wrote(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDIFF_TEST_FOLDER", str(tmp_path))
    save(Run(steps=3), tmp_path / "plain-1", 3)
    torchrun.launch(__file__, 2, "two_ranks_load_and_save", "exports_what_is_in_parts")
    torchrun.launch(__file__, 4, "four_ranks_load_and_save")
    errors = ("an_error_of_one_rank_ends_all", "a_rank_that_hangs_ends_the_others")
    torchrun.launch(__file__, 2, "two_ranks_load_what_four_saved", *errors)
    for folder in ("plain-1", "DDP-2", "FSDP-2", "HSDP-4"):
        assert_loads("plain", tmp_path / folder)


if __name__ == "__main__":
    torchrun.run(globals())
