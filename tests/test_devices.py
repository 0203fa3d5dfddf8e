"""Models on devices: where they lie, in which type, and what is said where there is no room."""

import json
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torchrun
from test_likelihood import TEXT, tokenizer_folder
from test_published import made, run_folder, sedd_folder
from typer.testing import CliRunner

from fastdiff import cli, placing, sample, time_free_nll
from fastdiff.cli.models import no_room
from fastdiff.loading import Loaded, load
from fastdiff.published import load_published

CPU = torch.device("cpu")
EVALUATION = "eval hf:bert --data text.txt --length 12 --num-samples 8 --num-sequences 12 --json out.json"


@pytest.fixture
def bert(tmp_path, monkeypatch):
    """A model of transformers with a tokenizer beside it, in the current folder, and a text."""
    from transformers import BertConfig, BertForMaskedLM

    monkeypatch.chdir(tmp_path)
    tokenizer = tokenizer_folder(tmp_path / "bert", mask="<mask>")
    shape = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16)
    model = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **shape)).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "bert")
    (tmp_path / "text.txt").write_text(TEXT)
    return model


def invoke(command):
    result = CliRunner().invoke(cli.app, command.split(), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    with open("out.json") as file:
        return json.load(file)


def fail(capsys, monkeypatch, command):
    """One line, of a command that the user can put right."""
    monkeypatch.setattr(sys, "argv", ["fastdiff", *command.split()])
    with pytest.raises(SystemExit) as exited:
        cli.main()
    assert exited.value.code == 2
    *others, error = capsys.readouterr().err.splitlines()  # bars of transformers before it
    assert error.startswith("fastdiff: ")
    assert not any("fastdiff" in line for line in others)
    return error


# ---------------------------------------------------------------------------------------------------------
# Spread over all that there is.


@pytest.mark.parametrize("share", [0.8, 0.1])
def test_a_model_in_parts_gives_the_same_bits(bert, monkeypatch, share):
    whole = load("hf:bert", CPU)
    monkeypatch.setattr(placing, "own_memory", lambda: {"cpu": int(share * whole.num_bytes)})
    parts = load("hf:bert", None)
    assert (parts.device, parts.dtype) == (CPU, torch.float32)
    assert any(parameter.is_meta for parameter in parts.network.parameters())
    x0 = torch.randint(2, 200, (3, 12))
    options = dict(sample_ids=torch.arange(3), num_samples=12)
    found, expected = (model.estimate(x0[:, :2], x0[:, 2:], **options) for model in (parts, whole))
    assert torch.equal(found.nll, expected.nll)
    assert torch.equal(found.stderr, expected.stderr)
    drawn = [sample(m.conditionals, length=8, graph=m.graph, sampler="confidence") for m in (parts, whole)]
    assert torch.equal(*drawn)


@pytest.mark.slow
def test_the_same_bits_in_parts_on_any_number_of_ranks(bert, monkeypatch):
    expected = invoke(EVALUATION)
    monkeypatch.setattr(placing, "own_memory", lambda: {"cpu": int(0.8 * load("hf:bert", CPU).num_bytes)})
    assert invoke(f"{EVALUATION} --device auto") == expected
    torchrun.launch(__file__, 2, "evaluated_in_parts")
    with open("out.json") as file:
        assert json.load(file) == expected


def evaluated_in_parts():
    """On one rank of several."""
    size = load("hf:bert", CPU).num_bytes
    placing.own_memory = lambda: {"cpu": int(0.8 * size)}
    cli.app([*EVALUATION.split(), "--device", "auto"], standalone_mode=False)


def test_ranks_share_the_gpus_of_a_machine(monkeypatch):
    free = {0: 100, 1: 200, 2: 300, 3: 400, 4: 500}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(free))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (free[gpu], 1000))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=800))
    assert placing.own_gpus() == [0, 1, 2, 3, 4]
    assert placing.own_memory() == {0: 90, 1: 180, 2: 270, 3: 360, 4: 450, "cpu": 720}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    seen = Counter()
    for rank, gpus in enumerate(([0, 2, 4], [1, 3])):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        assert placing.own_gpus() == gpus
        assert placing.own_memory()["cpu"] == 360
        seen.update(gpus)
    assert set(seen.values()) == {1}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "6")
    with pytest.raises(ValueError, match="device: expected a GPU for each of 6 ranks on a machine, got 5"):
        placing.own_gpus()
    free.clear()
    assert list(placing.own_memory()) == ["cpu"]


def test_an_offloaded_last_layer_is_refused_in_a_pair():
    model = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9, device="meta")
    with pytest.raises(ValueError, match="lm_head has its weight, got one on meta"):
        time_free_nll(model, torch.zeros(1, 6, dtype=torch.int64), mask_index=8)


# ---------------------------------------------------------------------------------------------------------
# Types and batches.


def test_weights_in_a_type_and_buffers_in_theirs(bert):
    assert load("hf:bert", CPU).dtype == torch.float32
    assert load("hf:bert", CPU, dtype=torch.bfloat16).dtype == torch.bfloat16
    bert.to(torch.float16).save_pretrained("bert")
    assert load("hf:bert", CPU).dtype == torch.float16  # what it says
    network = made("mdlm")
    network.register_buffer("angles", torch.ones(2))
    assert placing.placed(network, None, torch.bfloat16) == CPU
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in network.buffers()} == {torch.float32}


def test_what_was_kept_of_another_type_or_batch_is_not_used(bert, monkeypatch):
    calls, estimate = [], Loaded.estimate

    def counted(self, *arguments, **options):
        calls.append(1)
        if len(calls) > last:
            raise KeyboardInterrupt
        return estimate(self, *arguments, **options)

    monkeypatch.setattr(Loaded, "estimate", counted)
    for changed, used in (("", 1), ("--dtype bfloat16", 0), ("--batch-size 3", 0), ("--exclude-mask", 0)):
        calls.clear()
        last = 1
        CliRunner().invoke(cli.app, EVALUATION.split())  # killed after one of two parts
        calls.clear()
        last = 999
        invoke(f"{EVALUATION} {changed}")
        assert len(calls) == 2 - used


def test_numbers_in_half_precision_are_near(bert):
    expected = next(iter(invoke(EVALUATION).values()))["nll"]
    for dtype in ("bfloat16", "float16"):
        found = next(iter(invoke(f"{EVALUATION} --dtype {dtype}").values()))["nll"]
        assert found != expected
        assert found == pytest.approx(expected, rel=0.03)


def test_batches_are_as_large_as_asked(bert, monkeypatch):
    sizes, forward = [], type(bert).forward

    def counted(self, xt, *arguments, **options):
        sizes.append(len(xt))
        return forward(self, xt, *arguments, **options)

    monkeypatch.setattr(type(bert), "forward", counted)
    invoke(f"{EVALUATION} --batch-size 3")
    assert max(sizes) == 3
    sizes.clear()
    invoke(EVALUATION)
    assert max(sizes) > 3


# ---------------------------------------------------------------------------------------------------------
# Memory.


@pytest.mark.parametrize("form", [sedd_folder, run_folder])
def test_weights_lie_in_their_file(form, tmp_path):
    """They are in what the system has mapped of it, and not copied."""
    form(tmp_path, "sedd", made("sedd"))
    network = load_published("sedd", tmp_path).network
    with open("/proc/self/maps") as maps:
        spans = [line.split()[0].split("-") for line in maps if str(tmp_path) in line]
    for parameter in network.parameters():
        assert any(int(low, 16) <= parameter.data_ptr() < int(high, 16) for low, high in spans)


def test_no_room_is_one_line(bert, monkeypatch, capsys):
    kinds = [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:1] data. DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ]
    for error in kinds:

        def fails(*arguments, error=error, **options):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(type(bert), "forward", fails)
            line = fail(capsys, patched, EVALUATION)
            assert "no room: the model takes 4.39e-05 GB, cpu has " in line
            assert "try a smaller --batch-size, a smaller --length, --dtype bfloat16 or --device auto" in line
            assert "fewer --num-samples" in fail(capsys, patched, "sample hf:bert --length 8")
        with monkeypatch.context() as patched:
            patched.setattr(type(bert), "from_pretrained", fails)
            assert "no room: the model takes " in fail(capsys, patched, EVALUATION)
    monkeypatch.setattr(type(bert), "forward", lambda *_, **__: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):  # which is no matter of room
        invoke_raising(EVALUATION)


def invoke_raising(command):
    CliRunner().invoke(cli.app, command.split(), catch_exceptions=False)


def test_what_a_gpu_has(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu: (1_500_000_000, 80_000_000_000))
    one, each = (
        r"cuda:1 has 80 GB, of which 1.5 GB are left; try",
        "cuda:0 has 80 GB, .*, cuda:1 has 80 GB, .*, cpu has",
    )
    for device, there in ((torch.device("cuda:1"), one), (None, each)):
        with (
            pytest.raises(MemoryError, match=f"no room: the model takes 160 GB, {there}"),
            no_room(device, 160 * 10**9, ""),
        ):
            raise torch.OutOfMemoryError


LIMITED = """
import resource, sys
from fastdiff import cli
small = ["8" if argument == "200000" else argument for argument in sys.argv[1:]]
cli.app(small, standalone_mode=False)  # what is loaded for it counts for nothing
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 300 * 2**20,) * 2)
cli.main()
"""


def test_a_pass_that_no_memory_holds(bert):
    command = [*EVALUATION.replace("--num-samples 8", "--num-samples 200000 --batch-size 200000").split()]
    result = subprocess.run([sys.executable, "-c", LIMITED, *command], capture_output=True, text=True)
    assert result.returncode == 2, result.stderr
    assert result.stderr.splitlines()[-1].startswith("fastdiff: no room: the model takes ")


if __name__ == "__main__":
    torchrun.run(globals())
