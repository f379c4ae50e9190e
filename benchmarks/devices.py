"""The data of a migration, through the device of the migration states over the kernel's own VFIO.

**A file stands for the driver**: a memfd for one that has everything at hand, a pipe that is fed at a steady rate for
one that has to get it from its device. What is measured is what we add to the driver's own time; nothing here says how
fast a device is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio

import vfiostream
from benchmarks.contents import fill_random
from benchmarks.moving import Backend
from benchmarks.pairs import Run
from benchmarks.plan import MIB, CannotRun, Plan
from benchmarks.row import Row, compare
from vfiostream.access.kernel import connect
from vfiostream.access.kernel_calls import Kernel
from vfiostream.devices.migration_states import MigrationStatesDevice
from vfiostream.guest import GuestRange
from vfiostream.pipeline.reading import MOST_CHUNKS
from vfiostream.uapi import iommufd
from vfiostream.uapi.vfio import (
    DEVICE_INFO,
    FEATURE,
    FEATURE_MIG_STATE,
    Feature,
    FeatureOperation,
    MigrationFlags,
    MigrationState,
)
from vfiostream.uapi.vfio_kernel import Ioctl

BACKENDS: dict[Backend, tuple[str, dict[str, Any]]] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
RATE = 250e6
"""Bytes a second of a driver that takes its time."""
PIPE = MIB
"""Bytes that it has at hand at most: what a user may ask for (``/proc/sys/fs/pipe-max-size``)."""
_BLOCK = 64 * 1024
_NODE = "/dev/vfio/devices/vfio0"


class FileKernel(Kernel):
    """A kernel with one device, which can be stopped and read: ``give`` opens its data."""

    def __init__(self, root: Path, give: Callable[[], int]) -> None:
        super().__init__(root)
        self._give = give
        self._state = MigrationState.RUNNING
        for node in ("/dev/iommu", _NODE):
            self.path(node).parent.mkdir(parents=True, exist_ok=True)
            self.path(node).touch()

    def ioctl(self, fd: int, request: int, argument: bytearray | int = 0) -> int:
        assert isinstance(argument, bytearray)
        if request == Ioctl.DEVICE_GET_INFO:
            DEVICE_INFO.pack_into(argument, 0, DEVICE_INFO.size, 0, 0, 0)
        elif request == Ioctl.DEVICE_FEATURE:
            self._feature(argument)
        elif request == iommufd.Ioctl.HWPT_ALLOC:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        return 0

    def _feature(self, argument: bytearray) -> None:
        _, flags = FEATURE.unpack_from(argument)
        if flags & 0xFFFF != Feature.MIG_DEVICE_STATE:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        fd = -1
        if flags & FeatureOperation.SET:
            self._state = MigrationState(FEATURE_MIG_STATE.unpack_from(argument, FEATURE.size)[0])
            fd = self._give() if self._state is MigrationState.STOP_COPY else -1
        FEATURE_MIG_STATE.pack_into(argument, FEATURE.size, self._state, fd)


@asynccontextmanager
async def device_of(folder: Path, give: Callable[[], int]) -> AsyncIterator[MigrationStatesDevice]:
    access = await connect(_NODE, kernel=FileKernel(folder, give))
    async with await MigrationStatesDevice.open(access, MigrationFlags.STOP_COPY, ()) as device:
        yield device


# ---- a driver that has everything at hand


def data_fd(plan: Plan) -> Iterator[Row]:
    """``Device.read`` into as many chunks as the source offers to a driver as fast as this one."""
    with file_of(plan.size) as file, plan.folder() as folder:
        contestants: dict[str, Callable[[], Run]] = {
            backend: partial(through_device, folder, file, plan, backend) for backend in BACKENDS
        }
        rounds = plan.rounds(contestants | {"a loop of readv": partial(read_loop, file, plan)})
    for backend in BACKENDS:
        yield compare(
            rounds,
            backend,
            "a loop of readv",
            path=f"data fd to memory, {backend}",
            must=0.9,
            note=f"a memfd stands for the driver; buffers of {plan.chunk // MIB} MiB, up to {MOST_CHUNKS} at once",
        )


@contextmanager
def file_of(size: int) -> Iterator[int]:
    """A file in memory with random content."""
    fd = os.memfd_create("driver", os.MFD_CLOEXEC)
    os.ftruncate(fd, size)
    with vfiostream.Guest((GuestRange(0, size, fd, "driver"),)) as memory:
        fill_random(memory.ranges[0].view, seed=1)
        yield fd


def read_loop(file: int, plan: Plan) -> Run:
    os.lseek(file, 0, os.SEEK_SET)
    buffers = [memoryview(bytearray(plan.chunk))]
    total = 0
    began = time.perf_counter()
    while count := os.readv(file, buffers):
        total += count
    return _whole(total, plan.size, time.perf_counter() - began)


def through_device(folder: Path, file: int, plan: Plan, backend: Backend) -> Run:
    async def read() -> Run:
        buffers = [memoryview(bytearray(plan.chunk)) for _ in range(MOST_CHUNKS)]
        async with device_of(folder, partial(_from_its_start, file)) as device:
            await device.start_precopy()
            await device.quiesce()
            await device.stop()
            await device.begin_round()
            await device.capture()
            total = 0
            began = time.perf_counter()
            while count := await device.read(buffers):
                total += count
            seconds = time.perf_counter() - began
            await device.resume()
        return _whole(total, plan.size, seconds)

    name, options = BACKENDS[backend]
    return anyio.run(read, backend=name, backend_options=options)


def _from_its_start(file: int) -> int:
    os.lseek(file, 0, os.SEEK_SET)
    return os.dup(file)


def _whole(total: int, size: int, seconds: float) -> Run:
    if total != size:
        raise CannotRun(f"of {size} bytes of the device's state {total} were read")
    return Run(size, seconds)


# ---- drivers that take their time


def several_devices(plan: Plan) -> Iterator[Row]:
    size = plan.size // 16
    with plan.folder() as folder:
        rounds = plan.rounds(
            {
                "both at once": lambda: checkpoints(folder, size, plan, [2]),
                "one after the other": lambda: checkpoints(folder, size, plan, [1, 1]),
            }
        )
    yield compare(
        rounds,
        "both at once",
        "one after the other",
        path="two devices to a checkpoint",
        must=None,
        note=f"pipes stand for the drivers, fed with {RATE / 1e6:g} MB/s each; {size // MIB} MiB a device",
    )


def checkpoints(folder: Path, size: int, plan: Plan, counts: Sequence[int]) -> Run:
    """One checkpoint after the other, of as many devices each as ``counts`` says."""

    async def save_all() -> Run:
        async with AsyncExitStack() as stack:
            sets = [
                [
                    await stack.enter_async_context(device_of(folder, drivers.enter_context(_Feeder(size)).open))
                    for _ in range(count)
                ]
                for count in counts
            ]
            content = 0
            began = time.perf_counter()
            for devices in sets:
                async with vfiostream.connect(f"file:{folder / 'checkpoint'}") as file:
                    summary = await vfiostream.save(devices, file, settings=vfiostream.Settings(chunk=plan.chunk))
                content += summary.content
                (folder / "checkpoint").unlink()
            return _whole(content, size * sum(counts), time.perf_counter() - began)

    with ExitStack() as drivers:
        return anyio.run(save_all)


class _Feeder:
    """A driver that has ``size`` bytes, and comes by :data:`RATE` of them a second."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> _Feeder:
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.join()

    def open(self) -> int:
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, PIPE)
        self._threads.append(threading.Thread(target=self._feed, args=(theirs,)))
        self._threads[-1].start()
        return ours

    def _feed(self, pipe: int) -> None:
        block = memoryview(os.urandom(_BLOCK))
        began, written = time.monotonic(), 0
        try:
            while written < self._size:
                time.sleep(max(0.0, began + written / RATE - time.monotonic()))
                written += os.write(pipe, block[: self._size - written])
        except BrokenPipeError:
            pass  # it was called off
        finally:
            os.close(pipe)


MEASUREMENTS = (data_fd, several_devices)
