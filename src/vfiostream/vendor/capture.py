"""The driver's own stream: what a capture of device memory and a snapshot of the config look like.

Opaque to everybody but this driver. All numbers are little endian.

A capture is a head, padded with zeros to whole pages, and then the pages. So every chunk of a capture is whole pages,
as regions are. A snapshot of the config is its header and the content.

========  ======================================================================================
offset    capture header (72 bytes), then ``runs`` times u64 first page, u64 count of pages
========  ======================================================================================
0         magic, 8 bytes
8         u16 version
10        u16 kind: 1 whole, 2 dirty
12        u32 ordinal, from 0 for a whole capture
16        nonce, 16 bytes: which captures belong together
32        u64 size of the device memory
40        u64 number of runs; they ascend and do not touch each other
48        u64 bytes of pages after the head
56        check, 16 bytes: BLAKE2b of head (with zeros here) and table
========  ======================================================================================

========  ======================================================================================
offset    config header (56 bytes)
========  ======================================================================================
0         magic, 8 bytes
8         u16 version, u16 zero
12        u32 number of captures that precede
16        nonce of those captures, 16 bytes; zeros when there are none
32        u64 length of the content
40        check, 16 bytes: BLAKE2b of header (with zeros here) and content
========  ======================================================================================

A whole capture starts a stream with a fresh nonce, dirty ones number on from it, and the config names their number. So
a target can tell that a capture is missing, or comes from elsewhere. The pages have no check: they are read when they
are fetched, after the head, and whoever carries the stream checks what it carries.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
import itertools
import struct
from array import array
from dataclasses import dataclass
from enum import IntEnum

from vfiostream._accel import gather
from vfiostream.buffers import Buffer
from vfiostream.uapi.four_region import PAGE_SIZE

VERSION = 1
CAPTURE_MAGIC = b"VFSREFM\n"
CONFIG_MAGIC = b"VFSREFC\n"
CAPTURE_HEADER = struct.Struct("<8sHHI16sQQQ16s")
CONFIG_HEADER = struct.Struct("<8sHHI16sQ16s")
NO_NONCE = bytes(16)
_NO_CHECK = bytes(16)
_RUN_SIZE = 16


class Kind(IntEnum):
    WHOLE = 1
    DIRTY = 2


def _check(*parts: Buffer) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


def _padded(size: int) -> int:
    return -(-size // PAGE_SIZE) * PAGE_SIZE


def largest_capture(memory_size: int) -> int:
    """Bytes of a whole capture. No dirty one is larger: each run of its table leaves a page out, which is more."""
    return _padded(CAPTURE_HEADER.size + _RUN_SIZE) + memory_size


@dataclass(frozen=True, slots=True)
class CaptureHead:
    """What the header of a capture says, checked for itself but not against the table."""

    kind: Kind
    ordinal: int
    nonce: bytes
    runs: int
    data_length: int
    check: bytes

    @property
    def table_end(self) -> int:
        return CAPTURE_HEADER.size + self.runs * _RUN_SIZE

    @property
    def size(self) -> int:
        """Bytes of header, table and padding."""
        return _padded(self.table_end)


def parse_capture_header(data: Buffer, total: int, memory_size: int) -> CaptureHead:
    """Parse the header of a capture of ``total`` bytes for a device of ``memory_size``.

    Raises OSError: ENOSPC when the memory of the source is larger than ours, EINVAL for anything else. That includes a
    smaller source, which would leave some of our memory undefined.
    """
    if len(data) < CAPTURE_HEADER.size:
        raise OSError(errno.EINVAL, "the capture is too short for its header")
    magic, version, kind, ordinal, nonce, size, runs, length, check = CAPTURE_HEADER.unpack_from(data)
    if magic != CAPTURE_MAGIC:
        raise OSError(errno.EINVAL, "the data is not a capture of this driver")
    if version != VERSION:
        raise OSError(errno.EINVAL, f"the capture has version {version}, this driver takes {VERSION}")
    if kind not in tuple(Kind):
        raise OSError(errno.EINVAL, f"the capture is of unknown kind {kind}")
    if size != memory_size:
        number = errno.ENOSPC if size > memory_size else errno.EINVAL
        raise OSError(number, f"the capture is of {size} bytes of device memory, here are {memory_size}")
    if not 0 < runs <= (memory_size // PAGE_SIZE + 1) // 2:
        raise OSError(errno.EINVAL, f"the capture has {runs} runs, more than its pages can have, or none")
    head = CaptureHead(Kind(kind), ordinal, nonce, runs, length, check)
    if head.size + length != total:
        raise OSError(errno.EINVAL, f"the capture says {head.size + length} bytes of itself, {total} were announced")
    return head


def parse_runs(head: CaptureHead, data: Buffer, memory_size: int) -> array[int]:
    """Parse the table of a capture out of ``data``, its ``head.size`` first bytes.

    Raises OSError: EBADMSG when the check fails, EINVAL for a table that no driver writes.
    """
    view = memoryview(data)
    start = CAPTURE_HEADER.size - len(head.check)
    if _check(view[:start], _NO_CHECK, view[CAPTURE_HEADER.size : head.table_end]) != head.check:
        raise OSError(errno.EBADMSG, "the head of the capture is corrupt")
    if any(view[head.table_end : head.size]):
        raise OSError(errno.EINVAL, "the head of the capture is not padded with zeros")
    runs = array("Q")
    runs.frombytes(view[CAPTURE_HEADER.size : head.table_end])
    total, end = 0, -1
    for first, count in zip(runs[::2], runs[1::2], strict=True):
        if first <= end or count == 0:
            raise OSError(errno.EINVAL, f"the run of {count} pages at {first} does not follow the one before")
        end = first + count
        total += count
    if end * PAGE_SIZE > memory_size or total * PAGE_SIZE != head.data_length:
        raise OSError(errno.EINVAL, "the runs of the capture leave the memory, or are not the pages that follow")
    if head.kind is Kind.WHOLE and total * PAGE_SIZE != memory_size:
        raise OSError(errno.EINVAL, "the whole capture does not cover the memory")
    return runs


class Capture:
    """A capture being fetched: a list of pages that is fixed, whose content is read when it is fetched.

    A page written in the meantime is dirty again and comes with the next capture, so it does no harm that this one has
    newer content than its head.
    """

    def __init__(self, kind: Kind, nonce: bytes, ordinal: int, memory: memoryview, runs: array[int]) -> None:
        self.kind = kind
        self.ordinal = ordinal
        self.runs = runs
        self._memory = memory
        self._ends = array("Q", itertools.accumulate(runs[1::2]))
        data_length = self._ends[-1] * PAGE_SIZE
        table = runs.tobytes()
        fields = (CAPTURE_MAGIC, VERSION, kind, ordinal, nonce, len(memory), len(runs) // 2, data_length)
        bare = CAPTURE_HEADER.pack(*fields, _NO_CHECK)
        head = CAPTURE_HEADER.pack(*fields, _check(bare, table)) + table
        self._head = head.ljust(_padded(len(head)), b"\0")
        self.size = len(self._head) + data_length

    def read(self, pos: int, out: memoryview) -> None:
        """Fill ``out`` with the bytes from ``pos`` on; both are whole pages, and end within the capture."""
        from_head = max(0, min(len(self._head) - pos, len(out)))
        out[:from_head] = self._head[pos : pos + from_head]
        if from_head == len(out):
            return
        page = (pos + from_head - len(self._head)) // PAGE_SIZE
        index = bisect.bisect_right(self._ends, page)
        skip = page - (self._ends[index - 1] if index else 0)
        gather(self._memory, self.runs, index, skip, out[from_head:], PAGE_SIZE)


def pack_config(nonce: bytes, captures: int, content: bytes) -> bytes:
    """A snapshot of the config."""
    fields = (CONFIG_MAGIC, VERSION, 0, captures, nonce, len(content))
    bare = CONFIG_HEADER.pack(*fields, _NO_CHECK)
    return CONFIG_HEADER.pack(*fields, _check(bare, content)) + content


def parse_config(data: bytes, size: int) -> tuple[bytes, int, bytes]:
    """Parse a snapshot for a device with ``size`` bytes of config: nonce, number of captures, content.

    Raises OSError: EBADMSG when the check fails, EINVAL for anything else.
    """
    if len(data) != CONFIG_HEADER.size + size:
        raise OSError(errno.EINVAL, f"the config has {len(data)} bytes, here it has {CONFIG_HEADER.size + size}")
    magic, version, _, captures, nonce, length, check = CONFIG_HEADER.unpack_from(data)
    if magic != CONFIG_MAGIC:
        raise OSError(errno.EINVAL, "the data is not a config of this driver")
    if version != VERSION:
        raise OSError(errno.EINVAL, f"the config has version {version}, this driver takes {VERSION}")
    content = data[CONFIG_HEADER.size :]
    if length != size:
        raise OSError(errno.EINVAL, f"the config says {length} bytes of itself, here it has {size}")
    if _check(data[: CONFIG_HEADER.size - len(check)], _NO_CHECK, content) != check:
        raise OSError(errno.EBADMSG, "the config is corrupt")
    return nonce, captures, content
