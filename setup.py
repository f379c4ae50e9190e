"""The native accelerator is optional: without a C compiler or xxHash's header, or with VFIOSTREAM_NO_EXTENSION=1, its
pure twin works.
"""

from __future__ import annotations

import os
import sys

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, PlatformError

ACCEL = "src/vfiostream/_accel"


class BuildAccelerator(build_ext):
    """Says what to install where the accelerator can't be built."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (CCompilerError, PlatformError):
            print(
                "vfiostream is installed without its native accelerator: install a C compiler and the headers of "
                "Python and xxHash (on Debian: gcc, python3-dev, libxxhash-dev), and then vfiostream again.",
                file=sys.stderr,
            )
            raise  # Not the end: the extension is optional.


def extensions() -> list[Extension]:
    if os.environ.get("VFIOSTREAM_NO_EXTENSION") == "1":
        return []
    try:
        from Cython.Build import cythonize
        from Cython.Compiler.Errors import CompileError
    except ImportError:
        return []
    extension = Extension(
        "vfiostream._accel._native",
        [f"{ACCEL}/{name}" for name in ("_native.pyx", "kernels.c", "kernels_avx2.c", "kernels_avx512.c")],
        depends=[f"{ACCEL}/kernels.h", f"{ACCEL}/kernels_body.h"],
        include_dirs=[ACCEL],
        extra_compile_args=["-O3"],
    )
    try:
        built = cythonize([extension], build_dir="build")
    except CompileError as error:
        print(f"vfiostream is installed without its native accelerator: {error}", file=sys.stderr)
        return []
    for extension in built:
        extension.optional = True  # Here, as cythonize makes new ones and leaves this behind.
    return built


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildAccelerator})
