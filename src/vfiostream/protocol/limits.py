"""Every limit on what a stream may hold, each checked before anything is allocated (``docs/format.md``)."""

from __future__ import annotations

MAX_HELLO = 512 * 1024
"""Bytes of the header of a HELLO, which may describe many devices."""
MAX_HEADER = 8 * 1024
"""Bytes of any other header."""
MAX_CONTENT = 16 * 1024 * 1024
"""Bytes of a frame's payload, and of what it stands for."""
MIN_CHUNK = 64 * 1024
"""The least that both ends must be ready to take in one frame."""
DEFAULT_CHUNK = 1024 * 1024
MAX_TEXT = 4096
"""Bytes of a version or of a reason, as UTF-8."""
MAX_NAME = 256
"""Bytes of any other text."""
MAX_FEATURES = 16
MAX_FLAGS = 16
MAX_FLAG = 32
"""Bytes of the name of a flag."""
MAX_DEVICES = 64
MAX_RANGES = 256
MAX_BITMAP_PAGES = 512 * 1024
"""Pages one BITMAP covers: 64 KiB of bits, 2 GiB of guest memory."""
MIN_PCI_CONFIG = 64
MAX_PCI_CONFIG = 4096
MAX_CONFIG = 1024 * 1024 * 1024
"""Bytes of a device's config; the proposal thinks of 10 MiB (thread, "no big than 10M")."""
MAX_WINDOW = 8 * 1024 * 1024
"""Bytes of the window that a zstd frame may ask its decoder for."""
PAGE_SIZE = 4096
"""Of guest memory; what a bit of a BITMAP stands for."""
CREDIT_SLACK = 64 * 1024
"""Credit beyond one chunk that is open whenever the target has let go of everything: one frame then always fits."""
