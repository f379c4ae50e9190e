"""The four-region interface of 2019, from the driver's side: the control region that makes the device act.

Decisions where the interface leaves a choice:

- A state written without LOGGING ends the logging session, even if the state stays the same: all memory counts as dirty
  again. Otherwise writing the state the device has is a no-op.
- Data may be loaded in STOP only, EBUSY otherwise. A device with a load that was begun and not completed stays in STOP:
  other states are refused with EINVAL until a load is completed or the device is reset.
"""

from __future__ import annotations

import errno
import logging
import struct
from fnmatch import fnmatchcase

from vfiostream.buffers import Buffer
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
from vfiostream.uapi.vfio import PCI_NUM_REGIONS, REGION_TYPE_PCI_VENDOR
from vfiostream.vendor import pci
from vfiostream.vendor.capture import CONFIG_HEADER, pack_config
from vfiostream.vendor.driver import Driver
from vfiostream.vendor.hardware import Hardware
from vfiostream.vendor.loading import Load
from vfiostream.vendor.regions import Region, mappable_areas, staging_region
from vfiostream.vendor.settings import Operation

logger = logging.getLogger("vfiostream.vendor")

CONTROL_REGION = PCI_NUM_REGIONS

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_BITMAP_REQUEST = struct.Struct("<QQ")


class FourRegionDriver(Driver):
    """Regions 9 to 12, and the version in region 13."""

    def __init__(self, hardware: Hardware) -> None:
        super().__init__(hardware)
        settings = self.settings
        self.layout = PACKED if settings.layout == "packed" else NATURAL
        self.caps = Caps(0)
        if settings.memory:
            self.caps |= Caps.DEVICE_MEMORY
        if settings.dirty_tracking:
            self.caps |= Caps.SYSTEM_MEMORY
        self._state = State.RUNNING
        self._load: Load | None = None
        self._config_size: int | None = None
        self._memory_pos = 0
        self._start_addr = 0
        control = Region(self.layout.size, True, True, (REGION_TYPE, Subtype.CONTROL))
        self._config_region = self._staging(Subtype.CONFIG, settings.config_region)
        self._memory_region = self._staging(Subtype.MEMORY, settings.memory_region) if settings.memory else Region()
        self._bitmap_region = (
            self._staging(Subtype.BITMAP, settings.bitmap_region) if settings.dirty_tracking else Region()
        )
        version = Region(MAX_VERSION, True, True, (REGION_TYPE_PCI_VENDOR | pci.VENDOR, VERSION_SUBTYPE))
        self.regions = (control, self._config_region, self._memory_region, self._bitmap_region, version)

    def _staging(self, subtype: Subtype, size: int) -> Region:
        areas = mappable_areas(size, self.settings.mmap)
        return staging_region(subtype.name.lower(), (REGION_TYPE, subtype), size, areas)

    @property
    def state(self) -> int:
        return self._state

    def read(self, index: int, offset: int, into: memoryview) -> None:
        if index == CONTROL_REGION:
            into[:] = self._read_control(offset, len(into))
        else:
            into[:] = self.settings.version.encode().ljust(MAX_VERSION, b"\0")[offset : offset + len(into)]

    def write(self, index: int, offset: int, data: Buffer) -> None:
        if index == CONTROL_REGION:
            self._write_control(offset, bytes(data))
        else:
            self._check_version(offset, bytes(data))

    def reset(self) -> None:
        self._load = self._config_size = None
        self._state = State.RUNNING

    def client_gone(self) -> None:
        pass  # what it has begun goes on, as if the client were slow

    def break_down(self) -> None:
        raise NotImplementedError  # there is no such state, and settings have no such fault

    # ---- control region

    def _read_control(self, offset: int, count: int) -> bytes:
        fields = self.layout
        if count == 4:
            if offset == fields.version:
                self.strike(Operation.GET_VERSION)
                return _U32.pack(INTERFACE_VERSION)
            if offset == fields.caps:
                self.strike(Operation.GET_CAPS)
                return _U32.pack(self.caps)
            if offset in (fields.device_state, fields.config_action, fields.memory_action):
                return bytes(4)
        if count == 8:
            if offset == fields.config_size:
                self.strike(Operation.GET_CONFIG_SIZE)
                return _U64.pack(CONFIG_HEADER.size + self.hardware.config_size)
            if offset == fields.memory_size:
                self.strike(Operation.GET_MEMORY_SIZE)
                return _U64.pack(self._capture())
            if offset in (fields.memory_pos, fields.start_addr, fields.page_nr):
                return bytes(8)
        raise OSError(errno.EINVAL, f"a read of {count} bytes at {offset} of the control region is not one of a field")

    def _write_control(self, offset: int, data: bytes) -> None:
        fields = self.layout
        if len(data) == 4:
            (value,) = _U32.unpack(data)
            if offset == fields.device_state:
                self.strike(Operation.SET_STATE)
                return self._set_state(value)
            if offset == fields.config_action:
                return self._act_on_config(value)
            if offset == fields.memory_action:
                return self._act_on_memory(value)
        if len(data) == 8:
            (value,) = _U64.unpack(data)
            if offset == fields.config_size:
                self.strike(Operation.SET_CONFIG_SIZE)
                return self._set_config_size(value)
            if offset == fields.memory_size:
                self.strike(Operation.SET_MEMORY_SIZE)
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

    def _set_state(self, value: int) -> None:
        if value not in tuple(State):
            raise OSError(errno.EINVAL, f"{value} is not a device state")
        state = State(value)
        if self._load is not None and state is not State.STOP:
            raise OSError(errno.EINVAL, f"{state.name} is refused: a load was begun and is not complete")
        if state is not self._state:
            self.hardware.take_time(self.settings.state_time)
        with self.hardware.lock:
            if state.logging:
                self.hardware.log_guest(self.settings.dirty_tracking)
            else:
                self._end_session()
            logger.debug("device state %s -> %s", self._state.name, state.name)
            self._state = state
            self.hardware.workload.run(state.running)

    def _end_session(self) -> None:
        self.hardware.saving.forget()
        self.hardware.log_guest(False)

    # ---- save

    def _capture(self) -> int:
        self._require(Caps.DEVICE_MEMORY)
        self.hardware.take_time(self.settings.capture_time)
        with self.hardware.lock:
            size = self.hardware.saving.capture(logging=self._state.logging)
        logger.debug("capture %d of the stream has %d bytes", self.hardware.saving.captures, size)
        return size

    def _get_bitmap(self, start: int, pages: int) -> None:
        self.strike(Operation.GET_BITMAP)
        self._require(Caps.SYSTEM_MEMORY)
        region = self._bitmap_region
        assert region.view is not None
        if not self._state.logging:
            region.view[:] = bytes(region.size)
            return
        if not 0 < pages <= region.size * 8:
            raise OSError(errno.EINVAL, f"a bitmap of {pages} pages does not fit the region of {region.size} bytes")
        if start % PAGE_SIZE:
            raise OSError(errno.EINVAL, f"a bitmap can't start at {start:#x}, which is no page")
        with self.hardware.lock:
            bitmap = self.hardware.guest.take_dirty(start, pages)
        region.view[: len(bitmap)] = bitmap

    # ---- both ways

    def _act_on_config(self, action: int) -> None:
        region = self._config_region
        assert region.view is not None
        if action == Action.GET_BUFFER:
            self.strike(Operation.GET_CONFIG)
            saving = self.hardware.saving
            with self.hardware.lock:
                snapshot = pack_config(saving.nonce, saving.captures, self.hardware.content())
            region.view[: len(snapshot)] = snapshot
        elif action == Action.SET_BUFFER:
            self.strike(Operation.SET_CONFIG)
            self._require_stop()
            if self._config_size is None:
                raise OSError(errno.EINVAL, "the size of the config was not set")
            load = self._load or Load(self.hardware.memory)
            snapshot = bytes(region.view[: self._config_size])
            self.hardware.set_content(load.complete(snapshot, self.hardware.config_size))
            self._load = self._config_size = None
        else:
            raise OSError(errno.EINVAL, f"{action} is not an action on the config")

    def _act_on_memory(self, action: int) -> None:
        self._require(Caps.DEVICE_MEMORY)
        region = self._memory_region
        assert region.view is not None
        if action == Action.GET_BUFFER:
            self.strike(Operation.GET_MEMORY)
            self.hardware.take_time(self.settings.chunk_time)
            with self.hardware.lock:
                self.hardware.saving.fetch(self._memory_pos, region.view)
        elif action == Action.SET_BUFFER:
            self.strike(Operation.SET_MEMORY)
            self._require_stop()
            if self._load is None:
                raise OSError(errno.EINVAL, "the size of the memory was not set")
            self.hardware.memory_changes()
            self.hardware.take_time(self.settings.chunk_time)
            self._load.take(self._memory_pos, region.view)
        else:
            raise OSError(errno.EINVAL, f"{action} is not an action on the memory")

    # ---- load

    def _require_stop(self) -> None:
        if self._state is not State.STOP:
            raise OSError(errno.EBUSY, f"data can be loaded in STOP only, not in {self._state.name}")

    def _set_config_size(self, size: int) -> None:
        self._require_stop()
        if size > self.settings.config_region:
            raise OSError(errno.ENOSPC, f"a config of {size} bytes does not fit its region")
        self._config_size = size

    def _set_memory_size(self, size: int) -> None:
        self._require(Caps.DEVICE_MEMORY)
        self._require_stop()
        load = self._load or Load(self.hardware.memory)
        load.begin_capture(size)
        if size:
            self._load = load

    # ---- the version

    def _check_version(self, offset: int, data: bytes) -> None:
        if offset != 0:
            raise OSError(errno.EINVAL, "a version is written in one piece, at offset 0")
        try:
            version = data.rstrip(b"\0").decode()
        except UnicodeDecodeError as error:
            raise OSError(errno.EINVAL, "the version written is not text") from error
        if version != self.settings.version and not any(fnmatchcase(version, one) for one in self.settings.accept):
            raise OSError(errno.EINVAL, f"streams of version {version!r} are not taken here")
