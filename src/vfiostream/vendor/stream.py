"""The stream of data of the reference device, where an interface has one stream for everything.

Opaque to everybody but this driver. It is a sequence of blocks: captures of device memory, each cut into blocks, and
at the end the config in one block (``capture`` says what is in them). Where a client cuts the stream means nothing. All
numbers are little endian.

========  ======================================================================================
offset    block header (72 bytes), then the payload
========  ======================================================================================
0         magic, 8 bytes
8         u16 version
10        u16 kind: 1 memory, 2 config
12        u32 length of the payload, at least 1 and at most 1 MiB
16        u64 number of the block, from 0
24        u64 size of the capture, or of the config
32        u64 position of the payload in it
40        nonce, 16 bytes: which blocks belong together; drawn when the stream is opened
56        check, 16 bytes: XXH3-128 of header (with zeros here) and payload
========  ======================================================================================

A block is checked whole before any of it reaches the device. Its number, the nonce and the check tell a stream that was
reordered, cut, mixed with another or damaged; the geometry (size of memory and config) is in the captures and the
config, and is checked there.
"""

from __future__ import annotations

import errno
import secrets
import struct
from dataclasses import dataclass
from enum import IntEnum

import xxhash

from vfiostream._accel import bitmap_count, copy
from vfiostream.buffers import Buffer
from vfiostream.uapi.four_region import PAGE_SIZE
from vfiostream.vendor.capture import CONFIG_HEADER, largest_capture, pack_config
from vfiostream.vendor.hardware import Hardware
from vfiostream.vendor.loading import Load

VERSION = 1
MAGIC = b"VFSREFB\n"
BLOCK = 1024 * 1024
"""Bytes of the payload of a block at most."""
BLOCK_HEADER = struct.Struct("<8sHHIQQQ16s16s")
NO_CHECK = bytes(16)


class Kind(IntEnum):
    MEMORY = 1
    CONFIG = 2


@dataclass(frozen=True, slots=True)
class BlockHead:
    """What the header of a block says, checked for itself."""

    kind: Kind
    length: int
    number: int
    total: int
    position: int
    nonce: bytes
    check: bytes

    def pack(self, check: bytes) -> bytes:
        """The header, with ``check``."""
        return BLOCK_HEADER.pack(
            MAGIC, VERSION, self.kind, self.length, self.number, self.total, self.position, self.nonce, check
        )

    def check_of(self, payload: Buffer) -> bytes:
        """The check that belongs to this header and ``payload``."""
        digest = xxhash.xxh3_128(self.pack(NO_CHECK))
        digest.update(payload)
        return digest.digest()


def parse_block_head(data: Buffer) -> BlockHead:
    """Parse the header of a block; raises OSError, EINVAL."""
    magic, version, kind, length, number, total, position, nonce, check = BLOCK_HEADER.unpack(data)
    if magic != MAGIC:
        raise OSError(errno.EINVAL, "the data is not a stream of this driver")
    if version != VERSION:
        raise OSError(errno.EINVAL, f"the stream has version {version}, this driver takes {VERSION}")
    if kind not in tuple(Kind):
        raise OSError(errno.EINVAL, f"the block is of unknown kind {kind}")
    if not 0 < length <= BLOCK or position + length > total:
        raise OSError(errno.EINVAL, f"the block has {length} bytes at {position} of {total}")
    return BlockHead(Kind(kind), length, number, total, position, nonce, check)


class Outgoing:
    """A stream out of the device, from its opening on. It has at first the whole memory, then what changes, and when
    the device is stopped the config.
    """

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        with hardware.lock:
            hardware.saving.forget()
        self._buffer = memoryview(bytearray(BLOCK_HEADER.size + BLOCK))
        self._rest = self._buffer[:0]
        """What was not read of the block at hand."""
        self._nonce = secrets.token_bytes(16)
        self._number = 0
        self._position = self._total = 0
        """Of the capture at hand, or the config: bytes that are in blocks, and in all."""
        self._config: memoryview | None = None
        """The config, when it is due."""
        self._initial = False
        """Whether the capture at hand is of initial bytes."""
        self._initial_next = True

    @property
    def between_captures(self) -> bool:
        """Whether all of one capture was read and no other is begun."""
        return not self._rest and self._position == self._total

    def read(self, into: memoryview, *, last: bool) -> int:
        """Fill ``into`` with what there is, as far as the capture goes; returns how many bytes there were. ``last``
        says that the device is stopped: then everything follows, and 0 is the end. Otherwise 0 says that nothing has
        changed.
        """
        done = 0
        while done < len(into):
            if not self._rest and ((done and not last and self.between_captures) or not self._refill(last=last)):
                break
            count = min(len(into) - done, len(self._rest))
            copy(into[done : done + count], self._rest[:count])
            self._rest = self._rest[count:]
            done += count
        return done

    def left(self) -> tuple[int, int]:
        """Bytes to come of what is to be across before the device stops, and beyond them; estimated."""
        if self._number == 0:
            return (largest_capture(len(self._hardware.memory)) if self._hardware.memory else 0), 0
        under_way, dirty = len(self._rest) + self._total - self._position, self._dirty_bytes()
        if self._initial_next:
            return dirty, 0
        return (under_way, dirty) if self._initial else (0, under_way + dirty)

    def last_bytes(self) -> int:
        """Bytes to come if the device stops now, estimated; 0 at the end."""
        under_way = len(self._rest) + self._total - self._position
        if self._config is not None:
            return under_way
        return sum(self.left()) + BLOCK_HEADER.size + CONFIG_HEADER.size + self._hardware.config_size

    def begin_again(self) -> bool:
        """If most of the memory has changed since the last capture, count the next one as initial bytes, as the first
        was; returns whether that is so.
        """
        if self.between_captures and self._number and 2 * self._dirty_bytes() > len(self._hardware.memory):
            self._initial_next = True
            return True
        return False

    def _dirty_bytes(self) -> int:
        pages = len(self._hardware.memory) // PAGE_SIZE
        with self._hardware.lock:
            return bitmap_count(self._hardware.saving.dirty, pages) * PAGE_SIZE

    def _refill(self, *, last: bool) -> bool:
        """Put the next block in the buffer; returns whether there is one."""
        if self._position == self._total and not self._begin(last=last):
            return False
        count = min(BLOCK, self._total - self._position)
        block = self._buffer[: BLOCK_HEADER.size + count]
        payload = block[BLOCK_HEADER.size :]
        if self._config is not None:
            payload[:] = self._config[self._position :][:count]
        else:
            self._hardware.take_time(self._hardware.settings.chunk_time)
            with self._hardware.lock:
                self._hardware.saving.fetch(self._position, payload)
        kind = Kind.MEMORY if self._config is None else Kind.CONFIG
        head = BlockHead(kind, count, self._number, self._total, self._position, self._nonce, NO_CHECK)
        block[: BLOCK_HEADER.size] = head.pack(head.check_of(payload))
        self._number += 1
        self._position += count
        self._rest = block
        return True

    def _begin(self, *, last: bool) -> bool:
        """Begin a capture, or the config if this is the last; returns whether there is one."""
        if self._config is not None:
            return False
        hardware, size = self._hardware, 0
        if hardware.memory:
            hardware.take_time(hardware.settings.capture_time)
            with hardware.lock:
                size = hardware.saving.capture(logging=True)
        if size:
            self._initial, self._initial_next = self._initial_next, False
        elif last:
            with hardware.lock:
                saving = hardware.saving
                self._config = memoryview(pack_config(saving.nonce, saving.captures, hardware.content()))
            size = len(self._config)
        else:
            return False
        self._position, self._total = 0, size
        return True


class Incoming:
    """A stream into the device, from its opening on. Pages reach the memory as their blocks become whole."""

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._load = Load(hardware.memory)
        self._bytes = bytearray()
        """Of the block at hand: its header, and then its payload."""
        self._head: BlockHead | None = None
        self._nonce = b""
        self._number = 0
        self._position = self._total = 0
        """Of the capture at hand, or the config."""
        self._config = bytearray()
        self._content: bytes | None = None
        """The content of the config, when it was there and checked."""
        self._refused = False

    def write(self, data: Buffer) -> None:
        """Take the next bytes. Raises OSError, and refuses everything else after that."""
        if self._refused:
            raise OSError(errno.EINVAL, "the stream was refused before")
        rest = memoryview(data)
        try:
            while rest:
                rest = self._take(rest)
        except OSError:
            self._refused = True
            raise

    def complete(self) -> bytes:
        """The stream has ended: returns the content of the config. Raises OSError, EINVAL, if it is not whole."""
        if self._refused or self._content is None or self._bytes or self._head is not None:
            raise OSError(errno.EINVAL, "the stream is not whole, or was refused")
        return self._content

    def _take(self, data: memoryview) -> memoryview:
        """Take bytes of one header or payload; returns the rest."""
        if self._content is not None:
            raise OSError(errno.EINVAL, "the stream goes on after its end")
        wanted = BLOCK_HEADER.size if self._head is None else self._head.length
        count = min(wanted - len(self._bytes), len(data))
        self._bytes += data[:count]
        if len(self._bytes) == wanted:
            whole, self._bytes = self._bytes, bytearray()
            if self._head is None:
                self._head = parse_block_head(whole)
                self._check_order(self._head)
            else:
                head, self._head = self._head, None
                if head.check_of(whole) != head.check:
                    raise OSError(errno.EBADMSG, f"block {head.number} is corrupt")
                self._use(head, whole)
        return data[count:]

    def _check_order(self, head: BlockHead) -> None:
        if head.number != self._number:
            raise OSError(errno.EINVAL, f"block {head.number} comes where {self._number} is due")
        if self._number and head.nonce != self._nonce:
            raise OSError(errno.EINVAL, f"block {head.number} belongs to another stream")
        if self._position < self._total:
            if (head.position, head.total) != (self._position, self._total):
                raise OSError(errno.EINVAL, f"block {head.number} does not go on where the one before ended")
        elif head.position:
            raise OSError(errno.EINVAL, f"block {head.number} starts in the middle")
        if head.kind is Kind.CONFIG and head.total != CONFIG_HEADER.size + self._hardware.config_size:
            raise OSError(errno.EINVAL, f"the config has {head.total} bytes, which do not fit this device")
        if (head.kind is Kind.CONFIG) != bool(self._config) and head.position:
            raise OSError(errno.EINVAL, f"block {head.number} is of another kind than the one before")

    def _use(self, head: BlockHead, payload: bytearray) -> None:
        """Let the device have a block that is right."""
        self._nonce = head.nonce
        self._number += 1
        self._position, self._total = head.position + head.length, head.total
        if head.kind is Kind.CONFIG:
            self._config += payload
            if self._position == self._total:
                self._content = self._load.complete(bytes(self._config), self._hardware.config_size)
            return
        if not self._hardware.memory:
            raise OSError(errno.EINVAL, "the stream has device memory, and here is none")
        self._hardware.memory_changes()
        self._hardware.take_time(self._hardware.settings.chunk_time)
        if head.position == 0:
            self._load.begin_capture(head.total)
        self._load.take(head.position, memoryview(payload))
