"""Builds fastdiff._C_cpu and, where there is a CUDA build of torch and its nvcc, fastdiff._C_cuda.

Both are on torch's stable ABI (torch >= 2.10), one binary for every Python from 3.10 on. Without torch there are an
sdist and metadata, but no build. FASTDIFF_BUILD_CUDA=0 leaves the CUDA kernels out, 1 makes it an error not to build
them; TORCH_CUDA_ARCH_LIST says for which GPUs, from 8.0 on.
"""

import os
import platform
import re
import subprocess

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CPU_SOURCES = [
    f"csrc/cpu/{name}.cpp"
    for name in (
        "row_sample_wide",  # what takes longest first
        "row_sample_narrow",
        "row_loss",
        "distill",
        "row_sample",
        "corrupt",
        "fit_controls",
        "library",
    )
]
TARGET = ["-DPy_LIMITED_API=0x030A0000", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
OPTIMISE = ["-O3", "-g0", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
BUILD_CUDA = os.environ.get("FASTDIFF_BUILD_CUDA", "auto")

if os.environ.get("FASTDIFF_SANITIZE") == "1":
    SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    OPTIMISE = ["-O1", "-g", "-fopenmp-simd", "-DFASTDIFF_ONE_ISA", *SANITIZERS]

if platform.machine() == "x86_64":
    # GCC moves 8 bytes through MMX registers, and leaves long double broken for the process.
    OPTIMISE.append("-mno-mmx")

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    torch = None


def cuda_missing():
    """Why the CUDA kernels cannot be built here."""
    if BUILD_CUDA == "0":
        return "FASTDIFF_BUILD_CUDA=0"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    if cpp_extension.CUDA_HOME is None:
        return "nvcc was not found (is CUDA_HOME set?)"
    nvcc = [f"{cpp_extension.CUDA_HOME}/bin/nvcc", "--version"]
    release = re.search(r"release ([\d.]+)", subprocess.run(nvcc, capture_output=True, text=True).stdout)
    if release is None or release[1].split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc {release and release[1]} does not go with torch's CUDA {torch.version.cuda}"
    return None


def cuda_extension():
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    default = "8.0;9.0+PTX" if capability is None else "{}.{}".format(*capability)
    targets = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default).replace(" ", "/").replace(";", "/")
    names = ("library.cpp", "row_loss.cu", "distill.cu", "scale.cu", "row_sample.cu", "reverse_rows.cu", "corrupt.cu")
    options = [*TARGET, "-DUSE_CUDA", f"-DFASTDIFF_ARCHITECTURES={targets}", "-O3"]
    return cpp_extension.CUDAExtension(
        "fastdiff._C_cuda",
        [f"csrc/cuda/{name}" for name in names],
        depends=["setup.py"],
        extra_compile_args={"cxx": [*options, "-g0", "-fvisibility=hidden"], "nvcc": options},
        py_limited_api=True,
        optional=BUILD_CUDA != "1",
    )


def cpu_extension():
    return cpp_extension.CppExtension(
        "fastdiff._C_cpu",
        CPU_SOURCES,
        depends=["setup.py"],
        extra_compile_args={"cxx": [*TARGET, *OPTIMISE, "-fvisibility=hidden", "-Wall"]},
        py_limited_api=True,
    )


def extensions():
    if torch is None:
        return [Extension("fastdiff._C_cpu", CPU_SOURCES)]
    missing = cuda_missing()
    if missing is None:
        return [cpu_extension(), cuda_extension()]
    if BUILD_CUDA == "1":
        raise SystemExit(f"fastdiff: FASTDIFF_BUILD_CUDA=1, but {missing}")
    print(f"fastdiff: the CUDA kernels are left out: {missing}")
    return [cpu_extension()]


if torch is None:

    class Build(build_ext):
        """Nothing can be built."""

        def run(self):
            raise SystemExit(
                "fastdiff: torch is not installed where this builds, so its kernels cannot be compiled. "
                "Install torch, and then this with pip's --no-build-isolation."
            )

else:

    class Build(cpp_extension.BuildExtension):
        """Goes on without the CUDA kernels if they do not compile, unless they were asked for."""

        def build_extension(self, extension):
            try:
                super().build_extension(extension)
            except Exception as error:
                if not extension.optional:
                    raise
                print(f"fastdiff: the CUDA kernels did not compile and are left out: {error}")


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": Build},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
