"""The few leaf functions that touch every byte of memory, twice: native (``_native.pyx``) and pure (``_pure.py``).

The native twin is used where it was built. ``VFIOSTREAM_ACCEL=native`` or ``pure`` forces the choice, and a choice that
can't be had is an ``ImportError``: whoever measures must know what ran, and :data:`IMPLEMENTATION` says it.

Both twins take any contiguous buffer, of whatever format, as bytes. Both raise ``TypeError`` for what is not a buffer,
``BufferError`` for one that is not contiguous, or read only where it is written to, and ``ValueError`` for sizes and
numbers that don't fit; nothing was written then. The native twin works without the GIL: the caller keeps other threads
from writing to the buffers of a call. Only memory that is copied from may be live, and then the copy may be torn. No
buffer is kept after a call.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

_choice = os.environ.get("VFIOSTREAM_ACCEL")
_native_built = find_spec("vfiostream._accel._native") is not None

if _choice not in (None, "native", "pure"):
    raise ImportError(
        f"VFIOSTREAM_ACCEL is {_choice!r}: set it to 'native' or 'pure', or unset it to get the better one."
    )
if _choice == "native" and not _native_built:
    raise ImportError(
        "VFIOSTREAM_ACCEL=native asks for an accelerator that was not built here: "
        "install vfiostream again on a machine with a C compiler and libxxhash-dev, or unset it."
    )

if _native_built and _choice != "pure":
    from vfiostream._accel._native import (
        bitmap_and_not,
        bitmap_count,
        bitmap_extract,
        bitmap_merge,
        bitmap_runs,
        copy,
        copy_check,
        gather,
        gather_check,
        is_zero,
        nonzero_pages,
        scatter,
    )

    IMPLEMENTATION = "native"
else:
    from vfiostream._accel._pure import (
        bitmap_and_not,
        bitmap_count,
        bitmap_extract,
        bitmap_merge,
        bitmap_runs,
        copy,
        copy_check,
        gather,
        gather_check,
        is_zero,
        nonzero_pages,
        scatter,
    )

    IMPLEMENTATION = "pure"

__all__ = [
    "IMPLEMENTATION",
    "bitmap_and_not",
    "bitmap_count",
    "bitmap_extract",
    "bitmap_merge",
    "bitmap_runs",
    "copy",
    "copy_check",
    "gather",
    "gather_check",
    "is_zero",
    "nonzero_pages",
    "scatter",
]
