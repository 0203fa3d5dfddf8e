"""Builds fastdiff._C_cpu on torch's stable ABI (torch >= 2.10), one binary for every Python from 3.10 on.

Without torch at build time the package is pure Python: it works, slower, on its reference backend.
"""

import os

from setuptools import setup

TARGET = ["-DPy_LIMITED_API=0x030A0000", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
OPTIMISE = ["-O3", "-g0", "-fopenmp-simd", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]

if os.environ.get("FASTDIFF_SANITIZE") == "1":
    OPTIMISE = ["-O1", "-g", "-fopenmp-simd", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    print("fastdiff: torch is not installed where this builds, so the compiled CPU kernels are left out")
    setup()
else:
    setup(
        ext_modules=[
            CppExtension(
                "fastdiff._C_cpu",
                [f"csrc/cpu/{name}.cpp" for name in ("library", "row_loss", "row_sample", "corrupt")],
                depends=["setup.py"],
                extra_compile_args={"cxx": [*TARGET, *OPTIMISE, "-fvisibility=hidden", "-Wall"]},
                py_limited_api=True,
            )
        ],
        cmdclass={"build_ext": BuildExtension},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
