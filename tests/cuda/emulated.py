"""The CUDA kernels compiled for the CPU, with emulator.h in the place of CUDA; once for the same sources.

python tests/cuda/emulated.py  # builds, and prints where the extension is
"""

import fcntl
import hashlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent
FLAGS = ["-std=c++17", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
FLAGS += ["-Wall", "-Werror", "-Wno-unknown-pragmas"]
if os.environ.get("FASTDIFF_SANITIZE") == "1":
    FLAGS += ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
FLAGS += ["-DFASTDIFF_EMULATED", "-DFASTDIFF_GPU", "-DFASTDIFF_ARCHITECTURES=the emulator"]
TARGET_OPTIONS = ["-DPy_LIMITED_API=0x030A0000", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
TARGET_OPTIONS += [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]


def sources() -> list[Path]:
    return sorted([*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*.cpp")])


def extension() -> Path:
    """Path of the extension module, built if these sources have not been built before."""
    read = [*sources(), *ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.h"), HERE / "emulator.h", Path(__file__)]
    contents = repr((torch.__version__, FLAGS)).encode() + b"".join(path.read_bytes() for path in sorted(read))
    folder = ROOT / "build" / f"emulated-{hashlib.sha256(contents).hexdigest()[:16]}"
    made = folder / "_C_cuda.abi3.so"
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two processes of tests may come here together
        return made if made.exists() else _built(folder, made)


def _built(folder: Path, made: Path) -> Path:
    options = [*FLAGS, *TARGET_OPTIONS, f"-I{HERE}", f"-I{sysconfig.get_path('include')}"]
    compiler = os.environ.get("CXX", "c++")

    def compiled(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        subprocess.run([compiler, *options, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources()))
    part = folder / "part.so"
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run([compiler, *FLAGS, "-shared", *objects, *libraries, "-o", part], check=True)
    os.replace(part, made)
    return made


def load() -> None:
    """Makes it fastdiff._C_cuda, before fastdiff is imported."""
    spec = importlib.util.spec_from_file_location("fastdiff._C_cuda", extension())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["fastdiff._C_cuda"] = module


if __name__ == "__main__":
    print(extension())
