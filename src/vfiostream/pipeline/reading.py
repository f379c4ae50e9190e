"""Reads of a device's state that does not lie in memory: into as many chunks of the budget at once as are worth it.

A call of the kernel costs two wake-ups of threads besides what it reads, as much as half a MiB or more. So where the
driver is fast, one call fills several chunks. Each still goes out as a frame of its own; and as the first of them waits
for the last, no more are asked for than the driver was seen to fill in :data:`AT_ONCE` seconds.

Only the first chunk is waited for. The others are taken where the budget has them left over, so producers that hold
some can't wait for each other, and what a slow driver keeps while it reads is not missed by the others.
"""

from __future__ import annotations

from time import monotonic

from vfiostream.devices.contract import Device
from vfiostream.pipeline.budget import Lease
from vfiostream.pipeline.outbound import Outbound

AT_ONCE = 1e-3
"""Seconds of the driver's that one call may take: 15 and more times what the call costs besides, and too little to keep
the link waiting.
"""
MOST_CHUNKS = 8
"""In one call."""


class Reading:
    """The reads of one capture or config of ``device``, in chunks of ``chunk`` bytes."""

    def __init__(self, device: Device, line: Outbound, chunk: int) -> None:
        self._device = device
        self._line = line
        self._chunk = chunk
        self._worth = 1
        """Chunks to ask for at once."""

    async def read(self) -> list[Lease]:
        """The next bytes, as much in each lease as its view has left; nothing at the end. The leases are the caller's.
        Where this fails or is cancelled they stay taken: the driver may write to them still.
        """
        leases = [await self._line.take(self._chunk)]
        while len(leases) < self._worth and (more := self._line.take_left_over(self._chunk)) is not None:
            leases.append(more)
        asked = monotonic()
        count = await self._device.read([lease.view for lease in leases])
        seconds = monotonic() - asked
        if count:
            self._line.driver.add(count, seconds)
            self._worth = min(MOST_CHUNKS, int(AT_ONCE / max(seconds, 1e-9) * count / self._chunk))
        filled = []
        for lease in leases:
            size = min(count, len(lease.view))
            count -= size
            if size:
                lease.cut(size)
                filled.append(lease)
            else:
                lease.release()
        return filled
