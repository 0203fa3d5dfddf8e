"""Checkpoints over processes of torchrun and gloo: whole at any kill, and the same values on any number of ranks."""

import copy
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torchrun
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from fastdiff.loading import load
from fastdiff.model import DiffusionTransformer, ModelConfig
from fastdiff.training.checkpoints import Checkpoints
from fastdiff.training.exporting import export
from fastdiff.weights import read_weights

# pytest puts its own filters in the place of those that the module sets
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SETTINGS = {"lr": 0.01, "name": "a run"}


class Network(nn.Module):
    """Sizes that no number of ranks divides, one type more, and a buffer."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 7), nn.Linear(7, 3, dtype=torch.bfloat16)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, x):
        return self.outer(self.inner(x).tanh().bfloat16()).float() * self.scale


class Run:
    """A network, its average and AdamW, on one process ("plain") or many ("DDP", "FSDP", "HSDP")."""

    def __init__(self, how="plain", *, steps=0):
        torch.manual_seed(steps)  # a run that loads starts from other numbers than the one that has saved
        self.network = Network()
        self.averaged = copy.deepcopy(self.network)
        if how == "DDP":
            self.network = nn.parallel.DistributedDataParallel(self.network)
        elif how != "plain":
            shape, names = ((dist.get_world_size(),), ("shard",)) if how == "FSDP" else ((2, 2), ("replicate", "shard"))
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            for network in (self.network, self.averaged):
                for part in (network.inner, network.outer, network):
                    fully_shard(part, mesh=mesh)
        matrices = [p for p in self.network.parameters() if p.dim() == 2]
        vectors = [p for p in self.network.parameters() if p.dim() < 2]
        groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.01, fused=True)
        self.train(steps)

    def train(self, steps):
        for step in range(steps):
            x = torch.linspace(-1, 1 + step, 20).view(4, 5)
            self.network(x).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            for group in self.optimizer.param_groups:
                group["lr"] *= 0.9
            with torch.no_grad():
                for average, raw in zip(self.averaged.parameters(), self.network.parameters(), strict=True):
                    average.lerp_(raw, 0.1)

    def state(self):
        model, optimizer = get_state_dict(self.network, self.optimizer)
        return {"model": model, "averaged": get_model_state_dict(self.averaged), "optimizer": optimizer}

    def load(self, checkpoints, step):
        state = self.state()
        extra = checkpoints.load(step, state)
        parts = dict(model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        set_state_dict(self.network, self.optimizer, **parts)
        return extra

    def values(self):
        return whole(self.state())


def whole(value):
    """A copy of nested values, with tensors that are in parts put together."""
    if isinstance(value, dict):
        return {name: whole(v) for name, v in value.items()}
    if isinstance(value, list):
        return [whole(v) for v in value]
    if isinstance(value, torch.Tensor):
        return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
    return value


def assert_equal(a, b, place=""):
    if isinstance(a, dict):
        assert a.keys() == b.keys(), place
        for name in a:
            assert_equal(a[name], b[name], f"{place}.{name}")
    elif isinstance(a, list):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{place}.{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, place
        assert torch.equal(a, b), place
    else:
        assert a == b, place


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


# -- on ranks ----------------------------------------------------------------------------------------------


def shared():
    return Path(os.environ["FASTDIFF_TEST_FOLDER"])


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


def is_killed():
    """Saves for ever; a kill in its turn ends a rank as it opens, renames or deletes something."""
    folder, after = shared() / "killed", int(os.environ["FASTDIFF_TEST_KILL"])
    checkpoints = Checkpoints(folder, keep=1)
    step = checkpoints.latest() or 0
    if dist.get_rank() == after % 2:
        kill_at(30 + after, folder)
    while True:
        step += 1
        checkpoints.save(step, filled(step), {"step": step})


# -- helpers -----------------------------------------------------------------------------------------------


def filled(step):
    return {"model": {f"w{i}": torch.full((100, i + 1), float(step)) for i in range(3)}, "optimizer": {"lr": step}}


def assert_whole(folder):
    """Every checkpoint loads, to what was saved at its step; the newest step."""
    checkpoints = Checkpoints(folder)
    for path in folder.glob("step-*"):
        if path.suffix == "":
            step, state = int(path.name.removeprefix("step-")), filled(-1)
            assert checkpoints.load(step, state) == {"step": step}
            assert_equal(state, filled(step))
    return checkpoints.latest()


def kill_at(number, folder):
    """Ends this process as by kill -9, in front of the number-th call that changes files in a folder."""
    left = [number]

    def count(event, args):
        writes = event == "open" and str(args[0]).startswith(str(folder)) and args[1] not in ("r", "rb")
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def kill_at_each_call(folder, work, check):
    """Forks a process that works, to be killed at its first call, the next at its second, until one gets through."""
    number, status = 0, None
    while status != 0:
        number += 1
        if (child := os.fork()) == 0:
            kill_at(number, folder)
            work()
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL)
        check()
    return number


def kill_saves(folder):
    def work():
        checkpoints = Checkpoints(folder, keep=1)
        step = checkpoints.latest() + 1
        checkpoints.save(step, filled(step), {"step": step})
        checkpoints.wait()

    newest = [0]

    def check():
        step = assert_whole(folder)
        assert step - newest[0] in (0, 1)
        newest[0] = step

    checkpoints = Checkpoints(folder)
    checkpoints.save(0, filled(0), {"step": 0})
    checkpoints.wait()
    checkpoints._thread.shutdown()  # no thread is forked
    assert kill_at_each_call(folder, work, check) > 15
    assert [path.name for path in folder.iterdir()] == [f"step-{newest[0]:08}"]  # nothing is left of those killed


def kill_exports(folder):
    model = DiffusionTransformer(ModelConfig(5, 4, 8, 1, 2)).requires_grad_(False)

    def fill(value):
        for parameter in model.parameters():
            parameter.fill_(value)

    def values():
        return {value for tensor in read_weights(folder).values() for value in tensor.unique().tolist()}

    def check():
        assert len(values()) == 1

    fill(0)
    export(model, folder)
    for value, file_size in enumerate((2000, 2000, 10**9), 1):  # several files after one, after several, and one again
        fill(value)
        assert kill_at_each_call(folder, partial(export, model, folder, file_size=file_size), check) > 5
        assert values() == {value}
        assert len(list(folder.glob("model*"))) == (1 if value == 3 else 4)


@contextmanager
def limit(size):
    """A limit on the size of a file stands in for a full disk; the system then says as little about the file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, before if size is None else (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
    path.write_bytes(content if how == "flip" else content[: len(content) // 2])


def launch(monkeypatch, folder, ranks, *functions):
    monkeypatch.setenv("FASTDIFF_TEST_FOLDER", str(folder))
    torchrun.launch(__file__, ranks, *functions)


# -- tests -------------------------------------------------------------------------------------------------


def test_ranks_read_what_others_wrote(tmp_path, monkeypatch):
    save(Run(steps=3), tmp_path / "plain-1", 3)
    launch(monkeypatch, tmp_path, 2, "two_ranks_load_and_save", "exports_what_is_in_parts")
    launch(monkeypatch, tmp_path, 4, "four_ranks_load_and_save")
    errors = ("an_error_of_one_rank_ends_all", "a_rank_that_hangs_ends_the_others")
    launch(monkeypatch, tmp_path, 2, "two_ranks_load_what_four_saved", *errors)
    for folder in ("plain-1", "DDP-2", "FSDP-2", "HSDP-4"):
        assert_loads("plain", tmp_path / folder)


@pytest.mark.parametrize("after", [0, 1])
def test_a_rank_is_killed(tmp_path, monkeypatch, after):
    monkeypatch.setenv("FASTDIFF_TEST_KILL", str(after))
    with pytest.raises(AssertionError, match="SIGKILL"):
        launch(monkeypatch, tmp_path, 2, "is_killed")
    assert assert_whole(tmp_path / "killed") > 1


@pytest.mark.parametrize("what", ["kill_saves", "kill_exports"])
def test_killed_at_any_call(tmp_path, what):
    code = f"import torch, test_checkpoints as t; torch.set_num_threads(1); t.{what}(t.Path({str(tmp_path / 'x')!r}))"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


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


if __name__ == "__main__":
    torchrun.run(globals())
