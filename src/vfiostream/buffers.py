"""The one name for "something with bytes in it" that all layers share."""

from __future__ import annotations

from typing import TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Contiguous bytes, read only or writable; memoryviews have format ``B`` and one dimension."""
