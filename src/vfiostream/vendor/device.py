"""The reference device: its regions, and the control region that makes it act.

A stand-in for a vendor's driver and hardware, whoever asks it (``server`` over vfio-user, ``inprocess`` for tests). It
refuses with OSError; the errno is what a client gets, the text is for the log of the driver.

One thread calls the methods (but :meth:`ReferenceDevice.close`), the workload's thread writes memory in between. What
both touch is under one lock, which is never held while the device takes its time (``capture_time``, ``chunk_time``,
``state_time``).

Decisions where the interface leaves a choice:

- A state written without LOGGING ends the logging session, even if the state stays the same: all memory counts as dirty
  again. Otherwise writing the state the device has is a no-op.
- Data may be loaded in STOP only, EBUSY otherwise. A device with a load that was begun and not completed stays in STOP:
  other states are refused with EINVAL until a load is completed or the device is reset.
- Reset makes a fresh device: the first content, RUNNING, no session, no load, PCI config space as at power-on. DMA
  mappings stay, they are the client's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import mmap
import os
import struct
import threading
from dataclasses import dataclass
from fnmatch import fnmatchcase

from vfiostream.buffers import Buffer
from vfiostream.errors import UsageError
from vfiostream.uapi.four_region import (
    INTERFACE_VERSION,
    MAX_VERSION,
    NATURAL,
    PACKED,
    PAGE_SIZE,
    REGION_TYPE,
    VERSION_SUBTYPE,
    Action,
    Caps,
    State,
    Subtype,
)
from vfiostream.uapi.vfio import PCI_BAR0_REGION, PCI_CONFIG_REGION, PCI_NUM_REGIONS, REGION_TYPE_PCI_VENDOR
from vfiostream.vendor import pci
from vfiostream.vendor.capture import CONFIG_HEADER, pack_config
from vfiostream.vendor.contents import STAMP, fill, make_pool
from vfiostream.vendor.faults import FaultPlan
from vfiostream.vendor.guest import GuestMemory
from vfiostream.vendor.loading import Load
from vfiostream.vendor.saving import Saving
from vfiostream.vendor.settings import Mmap, Operation, Settings
from vfiostream.vendor.workload import Workload

logger = logging.getLogger("vfiostream.vendor")

CONTROL_REGION = PCI_NUM_REGIONS
CONFIG_REGION = PCI_NUM_REGIONS + 1
MEMORY_REGION = PCI_NUM_REGIONS + 2
BITMAP_REGION = PCI_NUM_REGIONS + 3
VERSION_REGION = PCI_NUM_REGIONS + 4
NUM_REGIONS = PCI_NUM_REGIONS + 5
NUM_IRQS = 5
"""The five of a PCI device, with no interrupt in any of them."""

DIGEST_SIZE = 32
"""Bytes at the start of BAR 0: BLAKE2b of device memory and config content. The device state follows, a u32."""

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_BITMAP_REQUEST = struct.Struct("<QQ")


@dataclass(slots=True)
class Region:
    """One region; a staging region is a memfd (``fd``), mapped here as ``view``."""

    size: int = 0
    readable: bool = False
    writable: bool = False
    type: tuple[int, int] | None = None
    mappable: tuple[tuple[int, int], ...] = ()
    """(offset, length) of what a client may map."""
    fd: int | None = None
    view: memoryview | None = None

    @property
    def sparse(self) -> bool:
        """Whether only parts can be mapped, which the client has to be told."""
        return bool(self.mappable) and self.mappable != ((0, self.size),)


def _mappable(size: int, how: Mmap) -> tuple[tuple[int, int], ...]:
    if how == "none":
        return ()
    if how == "whole":
        return ((0, size),)
    middle = max(1, size // PAGE_SIZE // 2) * PAGE_SIZE
    areas = ((PAGE_SIZE, middle), (middle + PAGE_SIZE, size))
    return tuple((start, end - start) for start, end in areas if start < end)


def _staging_region(subtype: Subtype, size: int, how: Mmap) -> Region:
    fd = os.memfd_create(f"vfiostream-{subtype.name.lower()}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    # A client gets this fd. Without the seals it could shrink the file and have our next access end in SIGBUS.
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    mapped = mmap.mmap(fd, size, mmap.MAP_SHARED | mmap.MAP_POPULATE)
    return Region(size, True, True, (REGION_TYPE, subtype), _mappable(size, how), fd, memoryview(mapped))


class ReferenceDevice:
    """One device, running from the start. :meth:`close` it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.layout = PACKED if settings.layout == "packed" else NATURAL
        self.caps = Caps(0)
        if settings.memory:
            self.caps |= Caps.DEVICE_MEMORY
        if settings.dirty_tracking:
            self.caps |= Caps.SYSTEM_MEMORY
        self.state = State.RUNNING
        self._faults = FaultPlan(settings.faults)
        self._closed = False
        self._interrupted = threading.Event()
        self._lock = threading.Condition()
        self._memory = memoryview(b"")
        if settings.memory:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
            try:
                self._memory = memoryview(mmap.mmap(-1, settings.memory, flags))
            except (OSError, OverflowError) as error:
                raise UsageError(f"there is no room for {settings.memory} bytes of device memory: use less") from error
        self._config = b""
        self._saving = Saving(self._memory, settings.memory_region)
        self._guest = GuestMemory()
        self._load: Load | None = None
        self._config_size: int | None = None
        self._memory_pos = 0
        self._start_addr = 0
        self._pci = pci.ConfigSpace()
        self._epoch = 0
        """Counts changes of memory and config that the workload did not make."""
        self._digest: tuple[tuple[int, int], bytes] | None = None
        self.regions = self._make_regions()
        self.workload = Workload(settings, self._lock, self._memory, self._saving, self._guest)
        self._power_on()
        self.workload.run(True)

    def _make_regions(self) -> list[Region]:
        regions = [Region() for _ in range(NUM_REGIONS)]
        regions[PCI_BAR0_REGION] = Region(pci.BAR0_SIZE, readable=True)
        regions[PCI_CONFIG_REGION] = Region(pci.SIZE, readable=True, writable=True)
        regions[CONTROL_REGION] = Region(self.layout.size, True, True, (REGION_TYPE, Subtype.CONTROL))
        how = self.settings.mmap
        regions[CONFIG_REGION] = _staging_region(Subtype.CONFIG, self.settings.config_region, how)
        if Caps.DEVICE_MEMORY in self.caps:
            regions[MEMORY_REGION] = _staging_region(Subtype.MEMORY, self.settings.memory_region, how)
        if Caps.SYSTEM_MEMORY in self.caps:
            regions[BITMAP_REGION] = _staging_region(Subtype.BITMAP, self.settings.bitmap_region, how)
        own_type = (REGION_TYPE_PCI_VENDOR | pci.VENDOR, VERSION_SUBTYPE)
        regions[VERSION_REGION] = Region(MAX_VERSION, True, True, own_type)
        return regions

    def _power_on(self) -> None:
        fill(self._memory, self.workload.pool, stamped=self.workload.stamped)
        self._config = make_pool(self.settings.data, self.settings.seed + 1, self.settings.config)
        self.workload.written = 0
        self._epoch += 1

    # ---- what a client can do

    def read(self, index: int, offset: int, into: memoryview) -> None:
        """Read ``len(into)`` bytes of a region. Raises OSError, Hang, Exit."""
        region = self._checked(index, offset, len(into), "read")
        if region.view is not None:
            into[:] = region.view[offset : offset + len(into)]
        elif index == CONTROL_REGION:
            into[:] = self._read_control(offset, len(into))
        elif index == PCI_CONFIG_REGION:
            into[:] = self._pci.read(offset, len(into))
        elif index == PCI_BAR0_REGION:
            into[:] = self._read_bar0(offset, len(into))
        else:
            into[:] = self.settings.version.encode().ljust(MAX_VERSION, b"\0")[offset : offset + len(into)]

    def write(self, index: int, offset: int, data: Buffer) -> None:
        """Write to a region; returns when what it asks for is done. Raises OSError, Hang, Exit."""
        region = self._checked(index, offset, len(data), "write")
        if not region.writable:
            raise OSError(errno.EPERM, f"region {index} can't be written")
        if region.view is not None:
            region.view[offset : offset + len(data)] = data
        elif index == CONTROL_REGION:
            self._write_control(offset, bytes(data))
        elif index == PCI_CONFIG_REGION:
            self._pci.write(offset, data)
        else:
            self._check_version(offset, bytes(data))

    def dma_map(self, iova: int, length: int, fd: int, offset: int, *, writable: bool) -> None:
        """Map guest memory; the caller keeps ``fd``. Raises OSError."""
        with self._lock:
            self._guest.map(iova, length, fd, offset, writable=writable)

    def dma_unmap(self, iova: int, length: int) -> None:
        """Take back mappings; they are not accessed after this returns. Raises OSError."""
        with self._lock:
            self._guest.unmap(iova, length)

    def client_gone(self) -> None:
        """The client went away: its guest memory is not ours any more. All else stays as it is."""
        with self._lock:
            self._guest.unmap_all()

    def reset(self) -> None:
        """``VFIO_DEVICE_RESET``; see the decisions at the top."""
        with self._lock:
            self._end_session()
            self._load = self._config_size = None
            self._power_on()
            self._pci.reset()
            self.state = State.RUNNING
            self.workload.run(True)
        logger.debug("device was reset")

    def close(self) -> None:
        """Let go of everything; a call that waits in another thread ends with ENODEV. May be called again."""
        if self._closed:
            return
        self._closed = True
        self.interrupt()
        self.workload.close()
        self.client_gone()
        for region in self.regions:
            if region.view is not None and region.fd is not None:
                os.close(region.fd)
                with contextlib.suppress(BufferError):  # somebody still looks at it: it goes when they let go
                    region.view.release()

    def _checked(self, index: int, offset: int, count: int, what: str) -> Region:
        if not 0 <= index < NUM_REGIONS:
            raise OSError(errno.EINVAL, f"there is no region {index}")
        region = self.regions[index]
        if count <= 0 or offset < 0 or offset + count > region.size:
            raise OSError(
                errno.EINVAL, f"a {what} of {count} bytes at {offset} leaves the {region.size} of region {index}"
            )
        return region

    # ---- control region

    def _read_control(self, offset: int, count: int) -> bytes:
        fields = self.layout
        if count == 4:
            if offset == fields.version:
                self._faults.strike(Operation.GET_VERSION)
                return _U32.pack(INTERFACE_VERSION)
            if offset == fields.caps:
                self._faults.strike(Operation.GET_CAPS)
                return _U32.pack(self.caps)
            if offset in (fields.device_state, fields.config_action, fields.memory_action):
                return bytes(4)
        if count == 8:
            if offset == fields.config_size:
                self._faults.strike(Operation.GET_CONFIG_SIZE)
                return _U64.pack(CONFIG_HEADER.size + len(self._config))
            if offset == fields.memory_size:
                self._faults.strike(Operation.GET_MEMORY_SIZE)
                return _U64.pack(self._capture())
            if offset in (fields.memory_pos, fields.start_addr, fields.page_nr):
                return bytes(8)
        raise OSError(errno.EINVAL, f"a read of {count} bytes at {offset} of the control region is not one of a field")

    def _write_control(self, offset: int, data: bytes) -> None:
        fields = self.layout
        if len(data) == 4:
            (value,) = _U32.unpack(data)
            if offset == fields.device_state:
                self._faults.strike(Operation.SET_STATE)
                return self._set_state(value)
            if offset == fields.config_action:
                return self._act_on_config(value)
            if offset == fields.memory_action:
                return self._act_on_memory(value)
        if len(data) == 8:
            (value,) = _U64.unpack(data)
            if offset == fields.config_size:
                self._faults.strike(Operation.SET_CONFIG_SIZE)
                return self._set_config_size(value)
            if offset == fields.memory_size:
                self._faults.strike(Operation.SET_MEMORY_SIZE)
                return self._set_memory_size(value)
            if offset == fields.memory_pos:
                self._require(Caps.DEVICE_MEMORY)
                self._memory_pos = value
                return None
            if offset == fields.start_addr:
                self._require(Caps.SYSTEM_MEMORY)
                self._start_addr = value
                return None
            if offset == fields.page_nr:
                return self._get_bitmap(self._start_addr, value)
        if len(data) == 16 and offset == fields.start_addr:
            return self._get_bitmap(*_BITMAP_REQUEST.unpack(data))
        raise OSError(
            errno.EINVAL, f"a write of {len(data)} bytes at {offset} of the control region is not one to a field"
        )

    def _require(self, cap: Caps) -> None:
        if cap not in self.caps:
            raise OSError(errno.EOPNOTSUPP, f"this device does not have {cap.name}")

    def interrupt(self) -> None:
        """End what takes its time now, and let nothing take time any more: the device is about to be closed. For any
        thread.
        """
        self._interrupted.set()

    def _take_time(self, seconds: float) -> None:
        if seconds and self._interrupted.wait(seconds):
            raise OSError(errno.ENODEV, "the device was closed")

    def _set_state(self, value: int) -> None:
        if value not in tuple(State):
            raise OSError(errno.EINVAL, f"{value} is not a device state")
        state = State(value)
        if self._load is not None and state is not State.STOP:
            raise OSError(errno.EINVAL, f"{state.name} is refused: a load was begun and is not complete")
        if state is not self.state:
            self._take_time(self.settings.state_time)
        with self._lock:
            if state.logging:
                self.workload.logging_guest = self.settings.dirty_tracking
            else:
                self._end_session()
            logger.debug("device state %s -> %s", self.state.name, state.name)
            self.state = state
            self.workload.run(state.running)

    def _end_session(self) -> None:
        self._saving.forget()
        self.workload.logging_guest = False
        self._guest.clear_dirty()

    # ---- save

    def _capture(self) -> int:
        self._require(Caps.DEVICE_MEMORY)
        self._take_time(self.settings.capture_time)
        with self._lock:
            size = self._saving.capture(logging=self.state.logging)
        logger.debug("capture %d of the stream has %d bytes", self._saving.captures, size)
        return size

    def _content(self) -> bytes:
        """The config: how much was written so far, and what stays the same."""
        return STAMP.pack(self.workload.written) + self._config[STAMP.size :]

    def _get_bitmap(self, start: int, pages: int) -> None:
        self._faults.strike(Operation.GET_BITMAP)
        self._require(Caps.SYSTEM_MEMORY)
        region = self.regions[BITMAP_REGION]
        assert region.view is not None
        if not self.state.logging:
            region.view[:] = bytes(region.size)
            return
        if not 0 < pages <= region.size * 8:
            raise OSError(errno.EINVAL, f"a bitmap of {pages} pages does not fit the region of {region.size} bytes")
        if start % PAGE_SIZE:
            raise OSError(errno.EINVAL, f"a bitmap can't start at {start:#x}, which is no page")
        with self._lock:
            bitmap = self._guest.take_dirty(start, pages)
        region.view[: len(bitmap)] = bitmap

    # ---- both ways

    def _act_on_config(self, action: int) -> None:
        region = self.regions[CONFIG_REGION]
        assert region.view is not None
        if action == Action.GET_BUFFER:
            self._faults.strike(Operation.GET_CONFIG)
            with self._lock:
                snapshot = pack_config(self._saving.nonce, self._saving.captures, self._content())
            region.view[: len(snapshot)] = snapshot
        elif action == Action.SET_BUFFER:
            self._faults.strike(Operation.SET_CONFIG)
            self._require_stop()
            if self._config_size is None:
                raise OSError(errno.EINVAL, "the size of the config was not set")
            load = self._load or Load(self._memory)
            self._set_content(load.complete(bytes(region.view[: self._config_size]), len(self._config)))
            self._load = self._config_size = None
        else:
            raise OSError(errno.EINVAL, f"{action} is not an action on the config")

    def _act_on_memory(self, action: int) -> None:
        self._require(Caps.DEVICE_MEMORY)
        region = self.regions[MEMORY_REGION]
        assert region.view is not None
        if action == Action.GET_BUFFER:
            self._faults.strike(Operation.GET_MEMORY)
            self._take_time(self.settings.chunk_time)
            with self._lock:
                self._saving.fetch(self._memory_pos, region.view)
        elif action == Action.SET_BUFFER:
            self._faults.strike(Operation.SET_MEMORY)
            self._require_stop()
            if self._load is None:
                raise OSError(errno.EINVAL, "the size of the memory was not set")
            self._epoch += 1
            self._take_time(self.settings.chunk_time)
            self._load.take(self._memory_pos, region.view)
        else:
            raise OSError(errno.EINVAL, f"{action} is not an action on the memory")

    # ---- load

    def _require_stop(self) -> None:
        if self.state is not State.STOP:
            raise OSError(errno.EBUSY, f"data can be loaded in STOP only, not in {self.state.name}")

    def _set_config_size(self, size: int) -> None:
        self._require_stop()
        if size > self.settings.config_region:
            raise OSError(errno.ENOSPC, f"a config of {size} bytes does not fit its region")
        self._config_size = size

    def _set_memory_size(self, size: int) -> None:
        self._require(Caps.DEVICE_MEMORY)
        self._require_stop()
        load = self._load or Load(self._memory)
        load.begin_capture(size)
        if size:
            self._load = load

    def _set_content(self, content: bytes) -> None:
        with self._lock:
            (self.workload.written,) = STAMP.unpack_from(content)
            self._config = content
            self._epoch += 1
            # The load wrote pages without marking them, so what was captured before it, or during it, is void.
            self._saving.forget()

    # ---- the other regions

    def _read_bar0(self, offset: int, count: int) -> bytes:
        content = bytearray(pci.BAR0_SIZE)
        if offset < DIGEST_SIZE:
            content[:DIGEST_SIZE] = self.digest()
        _U32.pack_into(content, DIGEST_SIZE, self.state)
        return bytes(content[offset : offset + count])

    def digest(self) -> bytes:
        """BLAKE2b of device memory and config content, as they are now."""
        with self._lock:
            key = (self._epoch, self.workload.written)
            if self._digest is None or self._digest[0] != key:
                sums = hashlib.blake2b(self._memory, digest_size=DIGEST_SIZE)
                sums.update(self._content())
                self._digest = key, sums.digest()
            return self._digest[1]

    def _check_version(self, offset: int, data: bytes) -> None:
        if offset != 0:
            raise OSError(errno.EINVAL, "a version is written in one piece, at offset 0")
        try:
            version = data.rstrip(b"\0").decode()
        except UnicodeDecodeError as error:
            raise OSError(errno.EINVAL, "the version written is not text") from error
        if version != self.settings.version and not any(fnmatchcase(version, one) for one in self.settings.accept):
            raise OSError(errno.EINVAL, f"streams of version {version!r} are not taken here")
