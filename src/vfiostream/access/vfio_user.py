"""A device in another process, over vfio-user: the client.

The specification is QEMU's ``docs/interop/vfio-user.rst``. Where servers differ from it or from one another, this
module takes what can be understood: a body longer than needed (structures grow), region info that is complete only when
asked for twice, an error without errno.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from vfiostream.access.contract import Access, DeviceInfo, MappedArea, MigrationData, RegionInfo
from vfiostream.access.mapping import CannotMap, Mapping
from vfiostream.access.region_info import MAX_REGIONS, BadRegionInfo, parse_region_info
from vfiostream.access.vfio_user_channel import Channel
from vfiostream.access.vfio_user_dma import MAX_TRANSFER, GuestMemory
from vfiostream.access.vfio_user_feature import Features
from vfiostream.buffers import Buffer
from vfiostream.errors import DeviceBroken, DeviceLost, DeviceRefused, DeviceTimeout, UsageError
from vfiostream.uapi.vfio import (
    DEVICE_FLAGS_PCI,
    DEVICE_FLAGS_RESET,
    DEVICE_INFO,
    MAX_REGION_INFO,
    REGION_INFO,
    FeatureOperation,
)
from vfiostream.uapi.vfio_user import (
    DMA_FLAG_READ,
    DMA_FLAG_WRITE,
    DMA_MAP,
    DMA_UNMAP,
    MAJOR,
    MAX_BODY,
    MAX_FDS,
    MINOR,
    REGION_ACCESS,
    BadMessage,
    Command,
    pack_version,
    parse_version,
)

logger = logging.getLogger("vfiostream.access")

VERSION_TIMEOUT = 5.0
"""Seconds a server has to agree on a version: one that serves somebody else lets us connect and then says nothing."""
MAX_VERSION_BODY = 16 * 1024
"""Longest answer to VERSION that we read."""
MIN_TRANSFER = 8
"""A server that moves less at a time can't be given a whole register."""

MAX_WRITE = MAX_BODY - REGION_ACCESS.size
"""Bytes written to a region with one message: what we send is short for servers that receive it with one recv. What
they send us may be as long as they agreed to, so reads are not cut short.
"""

_CAPABILITIES: dict[str, Any] = {
    "max_msg_fds": MAX_FDS,
    "max_data_xfer_size": MAX_TRANSFER,
    "max_dma_maps": 65535,
    "pgsizes": mmap.PAGESIZE,
    "migration": {"pgsize": mmap.PAGESIZE},
}


async def connect(path: str, *, timeout: float = 60.0) -> VfioUserAccess:
    """Connect to the vfio-user server that listens on the UNIX socket ``path``.

    ``timeout`` is how many seconds the device may take for one operation. Raises
    :class:`~vfiostream.errors.UsageError` if ``path`` can't be a socket of ours,
    :class:`~vfiostream.errors.DeviceLost` if nobody listens there, :class:`~vfiostream.errors.DeviceTimeout` if the
    server is busy with somebody else, and the other errors of an access.
    """
    name = f"vfio-user:{path}"
    memory = GuestMemory()
    channel = Channel(_open_socket(path, name), name, memory.serve)
    try:
        limits = await _agree(channel, min(timeout, VERSION_TIMEOUT))
        info = await _get_info(channel, timeout)
    except BaseException:
        await channel.aclose()
        raise
    return VfioUserAccess(channel, memory, info, limits, timeout)


@dataclass(frozen=True, slots=True)
class _ServerLimits:
    """What the server said it can do, within what we do."""

    max_transfer: int
    """Bytes of data in one message, a multiple of 8; MAX_WRITE holds too."""
    max_fds: int
    """File descriptors that it takes with one message."""
    page_size: int
    """What addresses and lengths of DMA mappings are multiples of."""


class VfioUserAccess(Access):
    """A connected vfio-user device; made by :func:`connect`.

    The server's reads and writes of guest memory by message (DMA_READ, DMA_WRITE) are answered while one of these
    methods waits for the device, and at no other time.
    """

    def __init__(
        self, channel: Channel, memory: GuestMemory, info: DeviceInfo, server: _ServerLimits, timeout: float
    ) -> None:
        self.name = channel.name
        self.info = info
        self._channel = channel
        self._memory = memory
        self._server = server
        self._timeout = timeout
        self._features = Features(channel, server.max_transfer, timeout)
        self._regions: dict[int, RegionInfo] = {}
        self._region_fds: dict[int, int] = {}
        """Descriptors of regions that are not mapped yet."""
        self._region_offsets: dict[int, int] = {}
        """Where in its descriptor a region starts."""
        self._areas: dict[int, tuple[MappedArea, ...]] = {}
        self._mappings: list[Mapping] = []

    async def region_info(self, index: int) -> RegionInfo:
        if not 0 <= index < self.info.num_regions:
            raise UsageError(f"{self.name} has no region {index}; its regions are 0 to {self.info.num_regions - 1}")
        if index not in self._regions:
            self._regions[index] = await self._ask_region_info(index)
        return self._regions[index]

    async def read_into(self, index: int, offset: int, into: memoryview) -> None:
        limit = self._server.max_transfer
        head = bytearray(REGION_ACCESS.size)
        for start in range(0, len(into), limit):
            piece = into[start : start + limit]
            operation = f"reading {len(piece)} bytes of region {index} at {offset + start:#x}"
            request = REGION_ACCESS.pack(offset + start, index, len(piece))
            reply = await self._channel.call(
                operation, Command.REGION_READ, [request], [memoryview(head), piece], timeout=self._timeout
            )
            self._check_count(operation, head, reply.size, REGION_ACCESS.size + len(piece), len(piece))

    async def write(self, index: int, offset: int, data: Buffer) -> None:
        limit = min(self._server.max_transfer, MAX_WRITE)
        whole = memoryview(data)
        head = bytearray(REGION_ACCESS.size)
        for start in range(0, len(whole), limit):
            piece = whole[start : start + limit]
            operation = f"writing {len(piece)} bytes to region {index} at {offset + start:#x}"
            request = REGION_ACCESS.pack(offset + start, index, len(piece))
            reply = await self._channel.call(
                operation, Command.REGION_WRITE, [request, piece], [memoryview(head)], timeout=self._timeout
            )
            self._check_count(operation, head, reply.size, REGION_ACCESS.size, len(piece))

    async def map(self, info: RegionInfo) -> Sequence[MappedArea]:
        self._channel.check()
        index = info.index
        if index not in self._areas and index in self._region_fds:
            fd = self._region_fds.pop(index)
            try:
                self._areas[index] = tuple(self._map_areas(info, fd, self._region_offsets[index]))
            finally:
                os.close(fd)
        return self._areas.get(index, ())

    async def dma_map(self, iova: int, length: int, fd: int, offset: int, *, writable: bool) -> None:
        self._channel.check()
        self._check_range(iova, length)
        operation = f"mapping {length:#x} bytes of guest memory at {iova:#x}"
        try:
            added = self._memory.add(iova, length, fd, offset, writable=writable)
        except CannotMap as error:
            raise UsageError(f"{operation} can't be done from {offset:#x} of file descriptor {fd}: {error}") from error
        flags = DMA_FLAG_READ | (DMA_FLAG_WRITE if writable else 0)
        # A server that takes no descriptors gets at the memory by message; the offset is one in the descriptor.
        passed = [fd] if self._server.max_fds else []
        request = DMA_MAP.pack(DMA_MAP.size, flags, offset if passed else 0, iova, length)
        try:
            await self._channel.call(operation, Command.DMA_MAP, [request], timeout=self._timeout, pass_fds=passed)
        except DeviceRefused:
            self._memory.discard(added)
            raise
        self._memory.keep_only(added)

    async def dma_unmap(self, iova: int, length: int) -> None:
        self._check_range(iova, length)
        operation = f"unmapping {length:#x} bytes of guest memory at {iova:#x}"
        request = DMA_UNMAP.pack(DMA_UNMAP.size, 0, iova, length)
        await self._channel.call(operation, Command.DMA_UNMAP, [request], timeout=self._timeout)
        self._memory.unmap(iova, length)

    async def reset(self) -> None:
        self._features.was_reset()
        await self._channel.call("resetting the device", Command.DEVICE_RESET, timeout=self._timeout)

    async def feature(self, operation: FeatureOperation, feature: int, data: bytes = b"", size: int = 0) -> bytes:
        return await self._features.do(operation, feature, data, size)

    async def set_migration_state(self, state: int) -> MigrationData | None:
        return await self._features.set_state(state)

    async def can_log_dma(self) -> bool:
        return await self._features.can_log()

    async def start_dma_log(self, page_size: int, ranges: Sequence[tuple[int, int]], *, anew: bool = True) -> None:
        await self._features.start_log(page_size, ranges, anew)

    async def read_dma_log(self, iova: int, length: int, page_size: int, bitmap: memoryview) -> None:
        await self._features.read_log(iova, length, page_size, bitmap)

    async def stop_dma_log(self) -> None:
        await self._features.stop_log()

    async def aclose(self) -> None:
        try:
            await self._channel.aclose()
        finally:
            self._memory.close()
            for mapping in self._mappings:
                mapping.close()
            for fd in self._region_fds.values():
                os.close(fd)
            self._areas.clear()
            self._mappings.clear()
            self._region_fds.clear()

    # ---- region info

    async def _ask_region_info(self, index: int) -> RegionInfo:
        body = await self._query_region(index, REGION_INFO.size)
        needed = REGION_INFO.unpack_from(body)[0]
        if needed > MAX_REGION_INFO:
            raise self._broken(f"describes region {index} in {needed} bytes (the limit is {MAX_REGION_INFO})")
        if needed > REGION_INFO.size:
            # Some servers send capabilities and descriptor only when asked with the size they want.
            body = await self._query_region(index, needed)
        try:
            info, offset = parse_region_info(index, body)
        except BadRegionInfo as error:
            raise self._broken(str(error)) from error
        if index not in self._region_fds:
            info = replace(info, mappable=())
        if info.mappable:
            self._region_offsets[index] = offset
        else:
            self._drop_region_fd(index)
        return info

    async def _query_region(self, index: int, argsz: int) -> bytes:
        """Ask once; of the descriptors that come over time, the newest is kept."""
        body = bytearray(argsz)
        reply = await self._channel.call(
            f"the query for region {index}",
            Command.GET_REGION_INFO,
            [REGION_INFO.pack(argsz, 0, index, 0, 0, 0)],
            [memoryview(body)],
            timeout=self._timeout,
            take_fd=True,
        )
        if reply.fd is not None:
            self._drop_region_fd(index)
            self._region_fds[index] = reply.fd
        if reply.size < REGION_INFO.size:
            raise self._broken(f"describes region {index} in {reply.size} bytes")
        return bytes(body[: reply.size])

    def _map_areas(self, info: RegionInfo, fd: int, offset: int) -> list[MappedArea]:
        areas = []
        for start, length in info.mappable:
            try:
                mapping = Mapping(fd, offset + start, length, writable=info.writable)
            except CannotMap as error:
                logger.warning(
                    "%s: %#x+%#x of region %d can't be mapped (%s): it is read and written by message, which is slower",
                    self.name, start, length, info.index, error,
                )  # fmt: skip
                continue
            self._mappings.append(mapping)
            areas.append(MappedArea(start, mapping.view))
        return areas

    def _drop_region_fd(self, index: int) -> None:
        fd = self._region_fds.pop(index, None)
        if fd is not None:
            os.close(fd)

    # ---- checks

    def _check_count(self, operation: str, head: bytearray, size: int, needed: int, asked: int) -> None:
        count = REGION_ACCESS.unpack(head)[2]
        if size < needed or count != asked:
            raise self._broken(f"answered {operation} with a count of {count} in {size} bytes")

    def _check_range(self, iova: int, length: int) -> None:
        page = self._server.page_size
        if iova < 0 or length <= 0 or iova + length > 1 << 64 or iova % page or length % page:
            raise UsageError(
                f"{length:#x} bytes at {iova:#x} can't be mapped for DMA; {self.name} wants multiples of {page:#x}"
            )

    def _broken(self, problem: str) -> DeviceBroken:
        return _broken(self.name, problem)


def _open_socket(path: str, name: str) -> socket.socket:
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        opened.setblocking(False)
        opened.connect(path)
    except OSError as error:
        opened.close()
        raise _cannot_connect(path, name, error) from error
    except ValueError as error:
        opened.close()
        raise UsageError(f"{name}: no socket can have such a path ({error}); check the address") from error
    return opened


def _cannot_connect(path: str, name: str, error: OSError) -> UsageError | DeviceLost | DeviceTimeout:
    serve = f"`vfiostream device serve {path}` starts a reference device"
    if error.errno == errno.ENOENT:
        return DeviceLost(f"{name}: there is no such socket; start the device's process first ({serve})")
    if error.errno == errno.ECONNREFUSED and not _is_socket(path):
        return UsageError(f"{name}: that is not a socket; give the path the device's process listens on ({serve})")
    if error.errno == errno.ECONNREFUSED:
        return DeviceLost(f"{name}: nobody listens there any more; start the device's process again ({serve})")
    if error.errno in (errno.EACCES, errno.EPERM):
        return UsageError(f"{name}: no permission to connect; run as the user who runs the device's process")
    if error.errno == errno.EAGAIN:  # its queue of connections is full
        return DeviceTimeout(_busy(name))
    return UsageError(f"{name}: can't connect ({error.strerror or error}); check the address")


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except OSError:
        return True  # gone since: what it was no longer matters


def _busy(name: str) -> str:
    return f"{name} does not answer: is another client using the device?"


async def _agree(channel: Channel, timeout: float) -> _ServerLimits:
    """Agree on a version; returns what the server can do."""
    body = bytearray(MAX_VERSION_BODY)
    try:
        reply = await channel.call(
            "the negotiation of a version",
            Command.VERSION,
            [pack_version(MAJOR, MINOR, _CAPABILITIES)],
            [memoryview(body)],
            timeout=timeout,
        )
    except DeviceTimeout as error:
        raise DeviceTimeout(_busy(channel.name)) from error
    if reply.size > MAX_VERSION_BODY:
        raise _broken(channel.name, f"answered VERSION with {reply.size} bytes (the limit is {MAX_VERSION_BODY})")
    try:
        major, minor, said = parse_version(bytes(body[: reply.size]))
    except BadMessage as error:
        raise _broken(channel.name, f"sent a bad VERSION ({error})") from error
    if major != MAJOR or minor > MINOR:
        raise _broken(channel.name, f"answered version {MAJOR}.{MINOR} with {major}.{minor}")
    # A larger reply than we proposed would not be believed: see MAX_MESSAGE.
    max_transfer = min(_number(channel.name, said, "max_data_xfer_size", MIN_TRANSFER), MAX_TRANSFER)
    page_sizes = _number(channel.name, said, "pgsizes", 1)
    return _ServerLimits(
        max_transfer=max_transfer & ~7,  # so that no aligned field is cut
        max_fds=_number(channel.name, said, "max_msg_fds", 0),
        page_size=page_sizes & -page_sizes,
    )


def _number(name: str, capabilities: dict[str, Any], key: str, least: int) -> int:
    value = capabilities[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise _broken(name, f"says that its {key} is {str(value)[:40]!r}")
    return value


async def _get_info(channel: Channel, timeout: float) -> DeviceInfo:
    body = bytearray(DEVICE_INFO.size)
    reply = await channel.call(
        "the query for device info",
        Command.DEVICE_GET_INFO,
        [DEVICE_INFO.pack(DEVICE_INFO.size, 0, 0, 0)],
        [memoryview(body)],
        timeout=timeout,
    )
    if reply.size < DEVICE_INFO.size:
        raise _broken(channel.name, f"describes the device in {reply.size} bytes")
    _argsz, flags, num_regions, num_irqs = DEVICE_INFO.unpack(body)
    if num_regions > MAX_REGIONS:
        raise _broken(channel.name, f"says that the device has {num_regions} regions (the limit is {MAX_REGIONS})")
    return DeviceInfo(
        is_pci=bool(flags & DEVICE_FLAGS_PCI),
        can_reset=bool(flags & DEVICE_FLAGS_RESET),
        num_regions=num_regions,
        num_irqs=num_irqs,
    )


def _broken(name: str, problem: str) -> DeviceBroken:
    return DeviceBroken(f"{name}: the server {problem}, which makes no sense; see its log")
