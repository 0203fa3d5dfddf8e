"""The package as a user gets it: sdist, wheel from that sdist, installed where there is no compiler."""

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
CHECK = """
import torch, fastdiff
assert fastdiff.backends.CPU_MISSING is None
loss = fastdiff.dce_loss(torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.long), reduction="mean", backend="cpu")
print(fastdiff.__file__, fastdiff.__version__, loss.exp().item())
"""


def run(*command, **options):
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def built(dist):
    """A wheel, from an sdist."""
    run(sys.executable, "setup.py", "-q", "egg_info", "-e", dist, "sdist", "-d", dist, cwd=ROOT)
    (sdist,) = dist.glob("*.tar.gz")
    compiler = dist / "c++"  # what takes most of the time of a build is for the kernels' own tests
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "c++")} "$@" -O0 -DFASTDIFF_ONE_ISA\n')
    compiler.chmod(0o755)
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", dist, sdist]
    run(*build, env=os.environ | {"CXX": str(compiler)})
    (wheel,) = dist.glob("*.whl")
    return wheel


def test_a_wheel_for_every_python_runs_in_a_clean_environment_without_a_compiler(tmp_path):
    wheel = built(tmp_path)
    assert "-cp310-abi3-" in wheel.name
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", purelib, wheel)
    here = sysconfig.get_path("purelib")  # for torch; nothing here is a compiler, and no editable install is followed
    output = run(python, "-c", CHECK, cwd=tmp_path, env={"PATH": "", "PYTHONPATH": here, "HOME": str(tmp_path)})
    file, version, value = output.split()
    assert Path(file).is_relative_to(tmp_path)
    assert version == "0.1.0"
    assert float(value) == pytest.approx(7)


@pytest.fixture
def not_compiled(tmp_path):
    """A folder with the package's Python files."""
    package = tmp_path / "fastdiff"
    run("cp", "-r", ROOT / "fastdiff", package)
    for extension in package.glob("*.so"):
        extension.unlink()
    return tmp_path


def test_import_works_without_the_extension_and_says_why(not_compiled):
    code = """
import warnings, torch, fastdiff
z, x0 = torch.randn(2, 3, 8), torch.zeros(2, 3, dtype=torch.long)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    fastdiff.dce_loss(z, x0), fastdiff.dce_loss(z, x0)
print(len(caught), caught[0].message)
fastdiff.mask_tokens(x0, 0.5, mask_index=7)
try:
    fastdiff.dce_loss(z, x0, backend="cpu")
except fastdiff.BackendUnavailable as error:
    print(error)
"""
    env = os.environ | {"PYTHONPATH": f"{not_compiled}{os.pathsep}{sysconfig.get_path('purelib')}"}
    output = run(sys.executable, "-S", "-c", code, cwd=not_compiled, env=env)  # -S: no editable install is followed
    warned, refused = output.strip().splitlines()
    assert warned.startswith("1 fastdiff runs its slow float64 reference: the compiled extension")
    assert refused.startswith("backend 'cpu': the compiled extension fastdiff._C_cpu did not load")


def test_a_clone_that_hides_the_installed_package_says_so(not_compiled):
    installed = not_compiled / "site-packages"
    (installed / "fastdiff").mkdir(parents=True)
    (installed / "fastdiff" / "_C_cpu.abi3.so").touch()
    path = os.pathsep.join(map(str, (not_compiled, installed, sysconfig.get_path("purelib"))))
    code = "import fastdiff; print(fastdiff.backends.CPU_MISSING)"
    reason = run(sys.executable, "-S", "-c", code, cwd=not_compiled, env=os.environ | {"PYTHONPATH": path}).strip()
    here, there = not_compiled / "fastdiff", installed / "fastdiff"
    assert reason == f"{here} was imported, which is not compiled; it hides {there}, which is"


@pytest.mark.parametrize(("command", "built"), [("build", False), ("egg_info", True)])
def test_a_build_that_does_not_see_torch_fails_and_says_so(command, built, tmp_path):
    where = {"build": ("--build-base", tmp_path), "egg_info": ("-e", tmp_path)}[command]
    code = "import runpy, sys; sys.modules['torch'] = None; runpy.run_path('setup.py', run_name='__main__')"
    result = subprocess.run(
        [sys.executable, "-c", code, "-q", command, *where], cwd=ROOT, capture_output=True, text=True
    )
    assert (result.returncode == 0) == built
    assert built or "torch is not installed where this builds" in result.stderr
