"""The choice of backend, and what is said when one cannot run."""

import os
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch

from fastdiff import BackendUnavailable, backends, dce_loss, fastest, mask_tokens

X0 = torch.zeros(2, 3, dtype=torch.long)


def resolve(backend, device):
    return backends.resolve(backend, device, "row_loss", 8)


def test_cpu_tensors_take_the_compiled_kernels_unless_the_process_says_otherwise(monkeypatch):
    assert resolve(None, X0.device) == "cpu"
    monkeypatch.setattr(backends, "DEFAULT", "reference")
    assert resolve(None, X0.device) == "reference"
    assert resolve("cpu", X0.device) == "cpu"
    monkeypatch.setattr(backends, "DEFAULT", "tpu")
    with pytest.raises(ValueError, match="backend: expected one of 'cpu', 'triton', 'cuda', 'reference', got 'tpu'"):
        resolve(None, X0.device)


def test_another_device_takes_the_reference_and_warns_once():
    z = torch.zeros(2, 3, 8, device="meta")
    with pytest.raises(BackendUnavailable, match="backend 'cpu': no kernels for meta tensors"):
        dce_loss(z, X0.to("meta"), backend="cpu")
    with pytest.raises(BackendUnavailable, match="backend 'triton': no kernels for meta tensors"):
        dce_loss(z, X0.to("meta"), backend="triton")
    backends._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="slow float64 reference: no kernels for meta tensors"):
        assert dce_loss(z, X0.to("meta")).shape == (2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert mask_tokens(X0.to("meta"), 0.5, mask_index=7, seed=0).xt.shape == (2, 3)


def test_triton_does_not_take_cpu_tensors():
    with pytest.raises(BackendUnavailable, match="no kernels for cpu tensors, unless TRITON_INTERPRET=1"):
        mask_tokens(X0, 0.5, mask_index=7, backend="triton")


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "triton is not installed"),
        ("3.5.1", "triton 3.5.1 is too old, 3.6 is needed"),
        ("3.10.0+rocm7", None),
    ],
)
def test_why_triton_is_missing(version, reason, monkeypatch, tmp_path):
    (tmp_path / "triton").mkdir()  # by itself a namespace, which is nothing
    if version:
        (tmp_path / "triton/__init__.py").write_text(f"# Triton\n__version__ = '{version}'\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert backends._triton_missing() == reason


@pytest.mark.parametrize(
    ("capability", "triton_missing", "reason"),
    [((7, 5), None, r"compute capability 7\.5, 8\.0 is needed"), ((8, 0), "triton is not installed", "not installed")],
)
def test_a_gpu_that_triton_cannot_use(capability, triton_missing, reason, monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(backends, "TRITON_MISSING", None)
    monkeypatch.setattr(backends, "CUDA_MISSING", "was not built")
    assert resolve(None, gpu) == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backends, "TRITON_MISSING", triton_missing)
    with pytest.raises(BackendUnavailable, match=f"backend 'triton': .*{reason}"):
        resolve("triton", gpu)
    backends._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=f"slow float64 reference: .*{reason}"):
        assert resolve(None, gpu) == "reference"


def test_a_gpu_takes_what_was_measured_to_be_faster_or_else_what_can_run(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "TRITON_MISSING", None)
    monkeypatch.setattr(backends, "CUDA_MISSING", None)
    monkeypatch.setattr(fastest, "CUDA_IS_FASTER", (fastest.Measured("row_loss", 8, "a test"),))
    choose = partial(backends.resolve, None, gpu)
    assert [choose("row_loss", 8), choose("row_loss", 7), choose("row_sample", 8)] == ["cuda", "triton", "triton"]
    monkeypatch.setattr(backends, "CUDA_MISSING", "was not built")
    assert choose("row_loss", 8) == "triton"
    with pytest.raises(BackendUnavailable, match="backend 'cuda': was not built"):
        resolve("cuda", gpu)
    monkeypatch.setattr(backends, "TRITON_MISSING", "is not installed")
    monkeypatch.setattr(backends, "CUDA_MISSING", None)
    assert choose("row_sample", 8) == "cuda"


def test_amd_has_triton_alone(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.version, "hip", "7.1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr(backends, "TRITON_MISSING", None)
    monkeypatch.setattr(backends, "CUDA_MISSING", None)
    monkeypatch.setattr(fastest, "CUDA_IS_FASTER", (fastest.Measured("row_loss", 8, "a test"),))
    assert resolve(None, gpu) == resolve("triton", gpu) == "triton"
    with pytest.raises(BackendUnavailable, match="backend 'cuda': CUDA C\\+\\+ is for NVIDIA's GPUs"):
        resolve("cuda", gpu)


def test_every_choice_of_a_gpu_names_the_measurement_that_it_rests_on():
    results = Path(__file__).parent.parent / "benchmarks/results"
    for choice in fastest.CUDA_IS_FASTER:
        assert (results / choice.measurement.split(":")[0]).exists()


@pytest.mark.skipif(torch.version.cuda is not None, reason="with this torch the kernels may be built")
def test_cuda_kernels_that_were_not_built():
    with pytest.raises(
        BackendUnavailable, match="backend 'cuda': the CUDA kernels were not built; FASTDIFF_BUILD_CUDA=1"
    ):
        resolve("cuda", torch.device("cpu"))
    assert [r.available for r in backends.report() if r.name == "cuda"] == [False]


@pytest.mark.parametrize("asked", ["0", "1"])
def test_values_off_the_cpu_are_looked_at_only_if_the_environment_asks(asked):
    code = "import torch, fastdiff.checks as c; x = torch.ones(1, device='meta'); c.check_values('x', x, x > 0, 'less')"
    command, env = [sys.executable, "-c", code], os.environ | {"FASTDIFF_CHECK": asked}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == int(asked), result.stderr
    assert asked == "0" or "cannot be called on meta tensors" in result.stderr


def test_import_prints_nothing_and_loads_no_extras():
    extras = {"rich", "typer", "safetensors", "matplotlib", "triton"}
    code = f"import sys, fastdiff; print(sorted({extras} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
    assert result.stderr == ""
