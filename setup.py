"""Builds the extension `resnet_fused._C` (csrc/) against the installed torch; pyproject.toml holds everything else.

    pip install --no-build-isolation -e .

No build isolation: the extension must be compiled against the torch that will load it.
"""

import re
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "resnet_fused" / "__init__.py").read_text())[1]
CSRC = ROOT / "csrc"

extension = CppExtension(
    "resnet_fused._C",
    sources=sorted(str(p.relative_to(ROOT)) for p in CSRC.rglob("*.cpp")),
    depends=sorted(str(p.relative_to(ROOT)) for p in CSRC.rglob("*.h")),
    define_macros=[("RESNET_FUSED_VERSION", f'"{VERSION}"')],
    extra_compile_args=[
        "-O3",
        "-g0",
        "-std=c++20",
        "-fopenmp",  # at::parallel_for is a header: without it, it compiles to a plain loop
        "-fno-trapping-math",  # lets the vectoriser turn branches around float operations into selects
        "-fvisibility=hidden",
        "-Wall",
        "-Wno-unknown-pragmas",
    ],
    extra_link_args=["-fopenmp"],
)

setup(
    version=VERSION,
    packages=[
        "resnet_fused",
        "resnet_fused.adapters",
        "resnet_fused.backends",
        "resnet_fused.models",
        "resnet_fused.triton_kernels",
    ],
    # The folder stays at the top, the package does not: a top-level `triton_kernels` would shadow Triton's own.
    package_dir={"resnet_fused.triton_kernels": "triton_kernels"},
    ext_modules=[extension],
    cmdclass={"build_ext": BuildExtension.with_options(use_ninja=True)},
)
