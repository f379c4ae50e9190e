"""The native accelerator is optional: without a compiler, or with VFIOSTREAM_NO_EXTENSION=1, its pure twin works."""

from __future__ import annotations

import os
import sys

from setuptools import Extension, setup


def extensions() -> list[Extension]:
    if os.environ.get("VFIOSTREAM_NO_EXTENSION") == "1":
        return []
    try:
        from Cython.Build import cythonize
        from Cython.Compiler.Errors import CompileError
    except ImportError:
        return []
    sources = Extension("vfiostream._accel._native", ["src/vfiostream/_accel/_native.pyx"], extra_compile_args=["-O3"])
    try:
        built = cythonize([sources], build_dir="build")
    except CompileError as error:
        print(f"vfiostream is installed without its native accelerator: {error}", file=sys.stderr)
        return []
    for extension in built:
        extension.optional = True  # Here, as cythonize makes new ones and leaves this behind.
    return built


setup(ext_modules=extensions())
