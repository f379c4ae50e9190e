"""What the device does while it runs: a thread that writes pages, at a steady rate and in a chosen pattern.

Pages, order and content follow from the seed; when each is written does not. The thread takes the lock once a slice of
about 10 ms, and whatever it does to memory and to the records of what is dirty it does under that lock.
"""

from __future__ import annotations

import random
import threading
import time

from vfiostream.uapi.four_region import PAGE_SIZE
from vfiostream.vendor.contents import POOL_SIZE, STAMP, make_pool
from vfiostream.vendor.guest import GuestMemory
from vfiostream.vendor.saving import Saving
from vfiostream.vendor.settings import Pattern, Settings

SLICE = 0.01
"""Seconds between two batches of writes."""
CATCH_UP = 0.25
"""Seconds of work that are made up for after a stall; what is older is dropped."""
HOT_SHARE = 0.1
HOT_WRITES = 0.9


class PageChoice:
    """An endless choice of pages among ``pages`` (at least one), in a pattern."""

    def __init__(self, pattern: Pattern, pages: int, source: random.Random) -> None:
        self.pages = pages
        self._pattern = pattern
        self._source = source
        self._all = range(pages)
        hot = max(1, round(pages * HOT_SHARE))
        first = source.randrange(pages - hot + 1)
        self._hot = range(first, first + hot)
        """One stretch, as what is busy in real memory tends to lie together."""
        self._next = 0

    def take(self, count: int) -> list[int]:
        match self._pattern:
            case "uniform":
                return self._source.choices(self._all, k=count)
            case "sequential":
                first, self._next = self._next, (self._next + count) % self.pages
                return [(first + n) % self.pages for n in range(count)]
            case "hotspot":
                both = (self._hot, self._all)
                ranges = self._source.choices(both, cum_weights=(HOT_WRITES, 1.0), k=count)
                draw = self._source.random
                return [pages[int(draw() * len(pages))] for pages in ranges]


class Workload:
    """The thread, started at once and idle until :meth:`run`.

    ``lock`` is the device's lock, which callers of the methods do not hold unless it is said.
    """

    def __init__(
        self, settings: Settings, lock: threading.Condition, memory: memoryview, saving: Saving, guest: GuestMemory
    ) -> None:
        self._settings = settings
        self._lock = lock
        self._memory = memory
        self._saving = saving
        self._guest = guest
        self.written = 0
        """Pages written so far, of device and guest; part of the config, and the stamp of the last page."""
        size = min(POOL_SIZE, max(len(memory), 64 * PAGE_SIZE))
        self.pool = make_pool(settings.data, settings.seed, size)
        self.stamped = settings.data != "zeros"
        self._pages = [self.pool[start : start + PAGE_SIZE] for start in range(0, size, PAGE_SIZE)]
        self._device_source = random.Random(f"{settings.seed} device pages")
        self._guest_source = random.Random(f"{settings.seed} guest pages")
        self._device_choice = self._choice(len(memory) // PAGE_SIZE, self._device_source)
        self._guest_choice: PageChoice | None = None
        self.logging_guest = False
        """Whether writes to guest memory are recorded. Set under the lock."""
        self._quiet = False
        self._running = False
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="vfiostream-workload", daemon=True)
        self._thread.start()

    def run(self, running: bool, *, quiet: bool = False) -> None:
        """Start or stop writing. Nothing is written after this has returned from stopping, and no guest memory after
        it has returned from making it ``quiet``.
        """
        with self._lock:
            self._running = running
            self._quiet = quiet
            self._lock.notify_all()

    def close(self) -> None:
        """End the thread."""
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        self._thread.join()

    def _choice(self, pages: int, source: random.Random) -> PageChoice | None:
        return PageChoice(self._settings.pattern, pages, source) if pages else None

    def _work(self) -> None:
        rate = self._settings.dirty_rate / PAGE_SIZE
        with self._lock:
            while not self._closing:
                if not self._running or rate == 0:
                    self._lock.wait()
                    due, last = 0.0, time.monotonic()
                    continue
                now = time.monotonic()
                due = min(due + (now - last) * rate, max(1.0, CATCH_UP * rate))
                last = now
                count = int(due)
                due -= count
                if count:
                    self.write(count)
                self._lock.wait(max(SLICE, (1 - due) / rate))

    def write(self, count: int) -> None:
        """Write ``count`` pages of the device and, unless it is quiet, as many of the guest, now, whether running or
        not.
        """
        with self._lock:
            self._write_device(count)
            if not self._quiet:
                self._write_guest(count)

    def _write_device(self, count: int) -> None:
        if self._device_choice is None:
            return
        for page in self._device_choice.take(count):
            self._write(self._memory, page)
            self._saving.dirty[page >> 3] |= 1 << (page & 7)

    def _write_guest(self, count: int) -> None:
        if self._guest.pages == 0:
            return
        if self._guest_choice is None or self._guest_choice.pages != self._guest.pages:
            self._guest_choice = PageChoice(self._settings.pattern, self._guest.pages, self._guest_source)
        for number in self._guest_choice.take(count):
            mapping, page = self._guest.locate(number)
            self._write(mapping.view, page)
            if self.logging_guest:
                mapping.dirty[page >> 3] |= 1 << (page & 7)

    def _write(self, memory: memoryview, page: int) -> None:
        start = page * PAGE_SIZE
        self.written += 1
        memory[start : start + PAGE_SIZE] = self._pages[self.written % len(self._pages)]
        if self.stamped:
            STAMP.pack_into(memory, start, self.written)
