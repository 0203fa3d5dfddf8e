"""The CUDA kernels compiled for the CPU, with tests/cuda/emulator.h in the place of CUDA; once for the same sources.

    python tests/cuda/build.py    # prints where the extension is
"""

import hashlib
import os
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
FLAGS = ["-std=c++17", "-O2", "-g", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-unknown-pragmas", "-ffp-contract=off"]
DEFINES = ["FASTDIFF_EMULATED", "FASTDIFF_GPU", "FASTDIFF_BUILD=\"emulated\""]
DEFINES += ["Py_LIMITED_API=0x030A0000", "TORCH_TARGET_VERSION=0x020a000000000000"]


def sources() -> list[Path]:
    return sorted([*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*.cpp")])


def extension() -> Path:
    """Path of the extension module, built if these sources have not been built before."""
    read = [*sources(), *ROOT.glob("csrc/*.h"), *ROOT.glob("csrc/cuda/*.h"), HERE / "emulator.h", Path(__file__)]
    contents = torch.__version__.encode() + b"".join(path.read_bytes() for path in sorted(read))
    folder = ROOT / "build" / f"emulated-{hashlib.sha256(contents).hexdigest()[:16]}"
    made = folder / "_C_cuda.abi3.so"
    if made.exists():
        return made
    folder.mkdir(parents=True, exist_ok=True)
    torch_home = Path(torch.__file__).parent
    include = [HERE, torch_home / "include", torch_home / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    options = [*FLAGS, *(f"-D{name}" for name in DEFINES), *(f"-I{path}" for path in include)]
    compiler = os.environ.get("CXX", "c++")

    def compiled(source: Path) -> Path:
        target = folder / f"{source.name}.{os.getpid()}.o"
        subprocess.run([compiler, *options, "-x", "c++", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources()))
    part = folder / f"{os.getpid()}.so"
    libraries = [f"-L{torch_home / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    subprocess.run([compiler, "-shared", *objects, *libraries, "-o", part], check=True)
    os.replace(part, made)
    return made


if __name__ == "__main__":
    print(extension())
