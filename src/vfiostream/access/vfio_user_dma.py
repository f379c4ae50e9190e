"""Guest memory for a vfio-user server that asks for it by message instead of mapping it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vfiostream.access.mapping import Mapping
from vfiostream.buffers import Buffer
from vfiostream.uapi.vfio_user import DMA_ACCESS, Command

MAX_TRANSFER = 1048576
"""Bytes of guest memory that one message may read or write: the ``max_data_xfer_size`` we announce."""


@dataclass(frozen=True, slots=True)
class DmaRange:
    """Guest memory the server may reach under the addresses from ``iova`` on."""

    iova: int
    length: int
    writable: bool
    memory: Mapping

    def overlaps(self, iova: int, length: int) -> bool:
        return iova < self.iova + self.length and self.iova < iova + length


class GuestMemory:
    """The ranges that were mapped for DMA.

    After a cancelled map or unmap nobody knows whether the server has the range, so it stays here; a newer range wins
    over an older one at the same address.
    """

    def __init__(self) -> None:
        self._ranges: list[DmaRange] = []

    def add(self, iova: int, length: int, fd: int, offset: int, *, writable: bool) -> DmaRange:
        """Raises :class:`~vfiostream.access.mapping.CannotMap`. The caller keeps ``fd``."""
        added = DmaRange(iova, length, writable, Mapping(fd, offset, length, writable=writable))
        self._ranges.append(added)
        return added

    def keep_only(self, added: DmaRange) -> None:
        """The server took ``added``: what was at its addresses before is gone."""
        self._remove([old for old in self._ranges if old is not added and old.overlaps(added.iova, added.length)])

    def discard(self, refused: DmaRange) -> None:
        """The server did not take ``refused``."""
        self._remove([old for old in self._ranges if old is refused])

    def unmap(self, iova: int, length: int) -> None:
        """The server gave back the range at ``iova``."""
        self._remove([old for old in self._ranges if (old.iova, old.length) == (iova, length)])

    def close(self) -> None:
        self._remove(self._ranges)

    def serve(self, command: int, body: memoryview) -> Sequence[Buffer] | None:
        """Do what DMA_READ or DMA_WRITE asks for and return the body of the reply, in pieces; None for what is neither,
        malformed, too large, or not wholly within one range that allows it.
        """
        if command not in (Command.DMA_READ, Command.DMA_WRITE) or len(body) < DMA_ACCESS.size:
            return None
        address, count = DMA_ACCESS.unpack_from(body)
        if not 0 < count <= MAX_TRANSFER:
            return None
        write = command == Command.DMA_WRITE
        memory = self._find(address, count, writable=write)
        if memory is None:
            return None
        if not write:
            return [DMA_ACCESS.pack(address, count), memory]
        data = body[DMA_ACCESS.size :]
        if len(data) != count:
            return None
        memory[:] = data
        return [DMA_ACCESS.pack(address, count)]

    def _find(self, iova: int, length: int, *, writable: bool) -> memoryview | None:
        for one in reversed(self._ranges):
            if one.iova <= iova and iova + length <= one.iova + one.length and (one.writable or not writable):
                start = iova - one.iova
                return one.memory.view[start : start + length]
        return None

    def _remove(self, gone: Sequence[DmaRange]) -> None:
        self._ranges = [one for one in self._ranges if one not in gone]
        for one in gone:
            one.memory.close()
