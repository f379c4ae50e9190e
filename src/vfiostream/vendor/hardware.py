"""What every reference device has, whatever interface its driver speaks: memory, config, and a workload that writes
them and the guest.

One thread calls the methods (but :meth:`Hardware.interrupt`), the workload's thread writes memory in between. What both
touch is under :attr:`Hardware.lock`, which is never held while the device takes its time (``capture_time``,
``chunk_time``, ``state_time``).
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import threading

from vfiostream.errors import UsageError
from vfiostream.vendor import pci
from vfiostream.vendor.contents import STAMP, fill, make_pool
from vfiostream.vendor.faults import FaultPlan
from vfiostream.vendor.guest import GuestMemory
from vfiostream.vendor.saving import Saving
from vfiostream.vendor.settings import Settings
from vfiostream.vendor.workload import Workload

DIGEST_SIZE = 32
"""Bytes of the digest: BLAKE2b of device memory and config content."""


class Hardware:
    """One device, with the workload running from the start. :meth:`close` it."""

    def __init__(self, settings: Settings, chunk: int) -> None:
        """``chunk`` is how many bytes of a capture the driver fetches at a time."""
        self.settings = settings
        self.faults = FaultPlan(settings.faults)
        self.lock = threading.Condition()
        self.memory = memoryview(b"")
        if settings.memory:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
            try:
                self.memory = memoryview(mmap.mmap(-1, settings.memory, flags))
            except (OSError, OverflowError) as error:
                raise UsageError(f"there is no room for {settings.memory} bytes of device memory: use less") from error
        self.saving = Saving(self.memory, chunk)
        self.guest = GuestMemory()
        self.pci = pci.ConfigSpace()
        self.workload = Workload(settings, self.lock, self.memory, self.saving, self.guest)
        self._interrupted = threading.Event()
        self._config = b""
        self._epoch = 0
        """Counts changes of memory and config that the workload did not make."""
        self._digest: tuple[tuple[int, int], bytes] | None = None
        self._fill()
        self.workload.run(True)

    def power_on(self) -> None:
        """Make it a fresh device: the first content, PCI config space as at power-on, nothing captured or logged, and
        running. DMA mappings stay, they are the client's.
        """
        with self.lock:
            self.saving.forget()
            self.log_guest(False)
            self._fill()
            self.pci.reset()
            self.workload.run(True)

    def _fill(self) -> None:
        fill(self.memory, self.workload.pool, stamped=self.workload.stamped)
        self._config = make_pool(self.settings.data, self.settings.seed + 1, self.settings.config)
        self.workload.written = 0
        self._epoch += 1

    def close(self) -> None:
        """Let go of everything."""
        self.interrupt()
        self.workload.close()
        self.client_gone()

    def client_gone(self) -> None:
        """The client went away: its guest memory is not ours any more."""
        with self.lock:
            self.guest.unmap_all()

    def interrupt(self) -> None:
        """End what takes its time now, and let nothing take time any more: the device is about to be closed. For any
        thread.
        """
        self._interrupted.set()

    def take_time(self, seconds: float) -> None:
        """Be busy for so long. Raises OSError, ENODEV, when :meth:`interrupt` ends it."""
        if seconds and self._interrupted.wait(seconds):
            raise OSError(errno.ENODEV, "the device was closed")

    def log_guest(self, on: bool) -> None:
        """Record which guest pages are written, or forget what was recorded and stop. Under the lock."""
        self.workload.logging_guest = on
        if not on:
            self.guest.clear_dirty()

    # ---- what a load changes

    @property
    def config_size(self) -> int:
        """Bytes of config content."""
        return len(self._config)

    def content(self) -> bytes:
        """The config: how much was written so far, and what stays the same. Under the lock while running."""
        return STAMP.pack(self.workload.written) + self._config[STAMP.size :]

    def set_content(self, content: bytes) -> None:
        """A load is complete: its config."""
        with self.lock:
            (self.workload.written,) = STAMP.unpack_from(content)
            self._config = content
            self._epoch += 1
            # The load wrote pages without marking them, so what was captured before it, or during it, is void.
            self.saving.forget()

    def memory_changes(self) -> None:
        """To be said before a load writes memory."""
        self._epoch += 1

    def digest(self) -> bytes:
        """BLAKE2b of device memory and config content, as they are now."""
        with self.lock:
            key = (self._epoch, self.workload.written)
            if self._digest is None or self._digest[0] != key:
                sums = hashlib.blake2b(self.memory, digest_size=DIGEST_SIZE)
                sums.update(self.content())
                self._digest = key, sums.digest()
            return self._digest[1]
