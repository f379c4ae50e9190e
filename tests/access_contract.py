"""What every access must do. A test module subclasses :class:`AccessContract` and gives it a device.

Needed of the device: regions of memory that nothing else changes, one that can't be mapped, and a way to make it read
and write guest memory. A device with a choice of mmap (whole, sparse, none) is given once for each.

:class:`FeatureContract` is what an access does by ``VFIO_DEVICE_FEATURE``, for devices that have the migration states
of Linux 5.18, or a log of their DMA; what a device does not have is skipped.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import anyio
import anyio.lowlevel
import pytest

from vfiostream.access.contract import Access, MigrationData
from vfiostream.errors import DeviceLost, DeviceRefused
from vfiostream.uapi.vfio import Feature, FeatureOperation, MigrationFlags, MigrationState

PAGE = mmap.PAGESIZE
IOVA = 0x10_0000_0000

GET, SET, PROBE = FeatureOperation.GET, FeatureOperation.SET, FeatureOperation.PROBE
NO_FEATURE = 0xFFF0
ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = MigrationState


class Subject(ABC):
    """A device under test, open. A region it does not have is None, and the tests that need it are skipped."""

    access: Access
    memory: int
    """Read and write, at least 256 bytes; may be one of the next two."""
    unmappable: int
    """Readable; its content is left alone."""
    whole: int | None
    """Read and write, mappable from its first byte to its last, at least 128 KiB."""
    sparse: int | None
    """Read and write, mappable in at least two areas that do not cover it."""

    @abstractmethod
    async def device_reads(self, iova: int, length: int) -> bytes:
        """Make the device read guest memory; raises what the access raises, or ``pytest.skip`` where it has no way."""

    @abstractmethod
    async def device_writes(self, iova: int, data: bytes) -> None:
        """Make the device write guest memory, as above."""


def pattern(length: int, seed: int = 0) -> bytes:
    """Bytes that differ from page to page and from seed to seed."""
    period = bytes((n * 7 + seed * 13) & 0xFF for n in range(251))
    return (period * (length // len(period) + 1))[:length]


@contextmanager
def guest_memory(length: int) -> Iterator[tuple[int, mmap.mmap]]:
    """Memory of a guest: a file descriptor of it, and our own view."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, length)
        with mmap.mmap(fd, length) as memory:
            yield fd, memory
    finally:
        os.close(fd)


async def read(access: Access, index: int, offset: int, length: int) -> bytes:
    into = bytearray(length)
    await access.read_into(index, offset, memoryview(into))
    return bytes(into)


def need(region: int | None) -> int:
    if region is None:
        pytest.skip("the device has no such region")
    return region


@pytest.mark.anyio
class AccessContract:
    """Subclasses override ``subject`` with an asynchronous fixture that opens the device and closes it. It sets the
    access's own time limit, where there is one, to a few seconds: a test that hangs then fails.
    """

    @pytest.fixture
    async def subject(self) -> AsyncIterator[Subject]:
        raise NotImplementedError
        yield

    # ---- regions

    async def test_every_region_can_be_described(self, subject: Subject) -> None:
        for index in range(subject.access.info.num_regions):
            info = await subject.access.region_info(index)
            assert info.index == index
            assert info.size >= 0
            assert await subject.access.region_info(index) == info

    async def test_region_info_tells_what_can_be_mapped(self, subject: Subject) -> None:
        memory = await subject.access.region_info(subject.memory)
        assert memory.readable
        assert memory.writable
        unmappable = await subject.access.region_info(subject.unmappable)
        assert unmappable.readable
        assert unmappable.mappable == ()
        if subject.whole is not None:
            whole = await subject.access.region_info(subject.whole)
            assert whole.mappable == ((0, whole.size),)
        if subject.sparse is not None:
            sparse = await subject.access.region_info(subject.sparse)
            assert len(sparse.mappable) >= 2
            assert sum(length for _, length in sparse.mappable) < sparse.size

    @pytest.mark.parametrize("length", [1, 2, 4, 8, 16, 255])
    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    async def test_what_was_written_is_read(self, subject: Subject, length: int, kind: type) -> None:
        access, index = subject.access, subject.memory
        before = await read(access, index, 0, 256)
        data = pattern(length, seed=length)
        await access.write(index, 1, kind(data))
        after = await read(access, index, 0, 256)
        assert after == before[:1] + data + before[1 + length :]

    async def test_reading_touches_only_the_buffer_given(self, subject: Subject) -> None:
        await subject.access.write(subject.memory, 8, pattern(16))
        buffer = bytearray(b"\xa5" * 48)
        await subject.access.read_into(subject.memory, 8, memoryview(buffer)[16:32])
        assert buffer == b"\xa5" * 16 + pattern(16) + b"\xa5" * 16

    async def test_nothing_is_read_and_written_without_harm(self, subject: Subject) -> None:
        before = await read(subject.access, subject.memory, 0, 256)
        await subject.access.write(subject.memory, 0, b"")
        await subject.access.read_into(subject.memory, 0, memoryview(bytearray()))
        assert await read(subject.access, subject.memory, 0, 256) == before

    async def test_large_transfers_come_whole(self, subject: Subject) -> None:
        access, index = subject.access, need(subject.whole)
        size = (await access.region_info(index)).size
        data = pattern(size - 9)
        await access.write(index, 5, data)
        assert await read(access, index, 5, size - 9) == data

    async def test_beyond_the_end_is_refused(self, subject: Subject) -> None:
        access, index = subject.access, subject.memory
        size = (await access.region_info(index)).size
        before = await read(access, index, size - 8, 8)
        with pytest.raises(DeviceRefused):
            await read(access, index, size - 4, 8)
        with pytest.raises(DeviceRefused):
            await access.write(index, size - 4, b"\xff" * 8)
        assert await read(access, index, size - 8, 8) == before

    # ---- mapping

    async def test_a_mapped_region_is_the_region(self, subject: Subject) -> None:
        access, index = subject.access, need(subject.whole)
        info = await access.region_info(index)
        (area,) = await access.map(info)
        assert (area.offset, len(area.view)) == (0, info.size)
        data = pattern(info.size)
        area.view[:] = data
        assert await read(access, index, 0, info.size) == data
        await access.write(index, PAGE - 4, b"written!")
        assert bytes(area.view[PAGE - 4 : PAGE + 4]) == b"written!"

    async def test_mapped_areas_are_where_they_were_announced(self, subject: Subject) -> None:
        access, index = subject.access, need(subject.sparse)
        info = await access.region_info(index)
        areas = await access.map(info)
        assert [(area.offset, len(area.view)) for area in areas] == sorted(info.mappable)
        data = pattern(info.size)
        await access.write(index, 0, data)
        for area in areas:
            assert area.view == data[area.offset : area.offset + len(area.view)]
            area.view[:8] = b"via mmap"
            assert await read(access, index, area.offset, 8) == b"via mmap"

    async def test_mapping_twice_gives_the_same_areas(self, subject: Subject) -> None:
        access, index = subject.access, need(subject.sparse)
        info = await access.region_info(index)
        first, second = await access.map(info), await access.map(info)
        assert [area.offset for area in first] == [area.offset for area in second]
        assert all(one.view is other.view for one, other in zip(first, second, strict=True))

    async def test_what_cannot_be_mapped_has_no_areas(self, subject: Subject) -> None:
        info = await subject.access.region_info(subject.unmappable)
        assert list(await subject.access.map(info)) == []

    # ---- guest memory

    async def test_the_device_reaches_guest_memory(self, subject: Subject) -> None:
        with guest_memory(4 * PAGE) as (fd, memory):
            memory[PAGE : 2 * PAGE] = pattern(PAGE)
            await subject.access.dma_map(IOVA, 2 * PAGE, fd, PAGE, writable=True)
            assert await subject.device_reads(IOVA, PAGE) == pattern(PAGE)
            await subject.device_writes(IOVA + PAGE, pattern(PAGE, seed=1))
            assert memory[2 * PAGE : 3 * PAGE] == pattern(PAGE, seed=1)
            assert memory[3 * PAGE :] == bytes(PAGE)
            await subject.access.dma_unmap(IOVA, 2 * PAGE)

    async def test_the_callers_descriptor_may_be_closed(self, subject: Subject) -> None:
        with guest_memory(PAGE) as (fd, memory):
            memory[:4] = b"here"
            own = os.dup(fd)
            await subject.access.dma_map(IOVA, PAGE, own, 0, writable=True)
            os.close(own)  # raises if the access closed it
            assert await subject.device_reads(IOVA, 4) == b"here"

    async def test_after_unmapping_the_device_reaches_nothing(self, subject: Subject) -> None:
        with guest_memory(PAGE) as (fd, memory):
            await subject.access.dma_map(IOVA, PAGE, fd, 0, writable=True)
            await subject.device_writes(IOVA, b"before")
            await subject.access.dma_unmap(IOVA, PAGE)
            with pytest.raises(DeviceRefused):
                await subject.device_writes(IOVA, b"after!")
            with pytest.raises(DeviceRefused):
                await subject.device_reads(IOVA, 6)
            assert memory[:6] == b"before"

    async def test_read_only_guest_memory_is_not_written(self, subject: Subject) -> None:
        with guest_memory(PAGE) as (fd, memory):
            memory[:4] = b"keep"
            await subject.access.dma_map(IOVA, PAGE, fd, 0, writable=False)
            assert await subject.device_reads(IOVA, 4) == b"keep"
            with pytest.raises(DeviceRefused):
                await subject.device_writes(IOVA, b"lost")
            assert memory[:4] == b"keep"

    async def test_unmapping_what_is_not_mapped_is_refused(self, subject: Subject) -> None:
        with pytest.raises(DeviceRefused):
            await subject.access.dma_unmap(IOVA, PAGE)

    # ---- reset, cancellation, closing

    async def test_reset(self, subject: Subject) -> None:
        if not subject.access.info.can_reset:
            pytest.skip("the device can't be reset")
        await subject.access.reset()
        await subject.access.write(subject.memory, 0, b"alive")
        assert await read(subject.access, subject.memory, 0, 5) == b"alive"

    async def test_a_call_under_cancellation_raises_it(self, subject: Subject) -> None:
        await subject.access.write(subject.memory, 0, b"before")
        with anyio.CancelScope() as scope:
            scope.cancel()
            await subject.access.write(subject.memory, 0, b"under!")
        assert scope.cancelled_caught
        await subject.access.write(subject.memory, 0, b"after!")
        assert await read(subject.access, subject.memory, 0, 6) == b"after!"

    async def test_a_cancelled_call_comes_before_the_next(self, subject: Subject) -> None:
        access, index = subject.access, subject.memory
        for seed in range(20):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(access.write, index, 0, pattern(256, seed=seed))
                tasks.start_soon(read, access, index, 0, 256)
                await anyio.lowlevel.checkpoint()
                tasks.cancel_scope.cancel()
            await access.write(index, 0, pattern(256, seed=seed + 100))
            assert await read(access, index, 0, 256) == pattern(256, seed=seed + 100)

    async def test_several_tasks_each_get_their_own_answer(self, subject: Subject) -> None:
        access, index = subject.access, subject.memory
        await access.write(index, 0, pattern(256))

        async def look(offset: int) -> None:
            for _ in range(10):
                assert await read(access, index, offset, 16) == pattern(256)[offset : offset + 16]

        async with anyio.create_task_group() as tasks:
            for offset in range(0, 256, 16):
                tasks.start_soon(look, offset)

    async def test_closing_again_and_under_cancellation(self, subject: Subject) -> None:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await subject.access.aclose()
        await subject.access.aclose()

    async def test_after_closing_the_device_is_lost(self, subject: Subject) -> None:
        await subject.access.aclose()
        with pytest.raises(DeviceLost):
            await read(subject.access, subject.memory, 0, 4)
        with pytest.raises(DeviceLost):
            await subject.access.write(subject.memory, 0, b"late")
        with pytest.raises(DeviceLost):
            await subject.access.reset()

    async def test_closing_ends_the_mapped_views(self, subject: Subject) -> None:
        access = subject.access
        (area,) = await access.map(await access.region_info(need(subject.whole)))
        await access.aclose()
        with pytest.raises(ValueError, match="released"):
            area.view[0]

    async def test_a_feature_that_is_not_there(self, subject: Subject) -> None:
        for operation in (GET, SET, PROBE | GET, PROBE | SET):
            with pytest.raises(DeviceRefused) as caught:
                await subject.access.feature(operation, NO_FEATURE, size=8 if operation == GET else 0)
            assert caught.value.errno == errno.ENOTTY
        await subject.access.write(subject.memory, 0, b"alive")

    async def test_closing_while_somebody_holds_a_slice(self, subject: Subject) -> None:
        access = subject.access
        (area,) = await access.map(await access.region_info(need(subject.whole)))
        area.view[:4] = b"held"
        with area.view[:4] as held:
            await access.aclose()
            assert bytes(held) == b"held"


class FeatureSubject(ABC):
    """A device under test, open and running."""

    access: Access

    @abstractmethod
    async def device_writes_somewhere(self) -> None:
        """Make the device write some of the guest memory that is mapped; or ``pytest.skip`` where it has no way."""


async def state_of(access: Access) -> MigrationState:
    answer = await access.feature(GET, Feature.MIG_DEVICE_STATE, size=8)
    return MigrationState(struct.unpack_from("<I", answer)[0])


async def need_states(access: Access, *needed: MigrationFlags) -> None:
    try:
        (flags,) = struct.unpack("<Q", await access.feature(GET, Feature.MIGRATION, size=8))
    except DeviceRefused as refused:
        if refused.errno != errno.ENOTTY:
            raise
        pytest.skip("the device has no migration states")
    if any(not flags & one for one in needed):
        pytest.skip("the device has not all of the migration states")


async def need_log(access: Access) -> None:
    if not await access.can_log_dma():
        pytest.skip("there is no log of the device's DMA")


async def opened(access: Access, state: MigrationState) -> MigrationData:
    data = await access.set_migration_state(state)
    assert data is not None
    return data


async def read_to_end(data: MigrationData, most: int = 4096) -> bytes:
    """What there is, to its end, or in PRE_COPY to its end for now."""
    whole = bytearray()
    into = memoryview(bytearray(most))
    while True:
        try:
            count = await data.read_into([into])
        except DeviceRefused as refused:
            if refused.errno == errno.ENOMSG:
                return bytes(whole)
            raise
        assert 0 <= count <= most
        if count == 0:
            return bytes(whole)
        whole += into[:count]


@pytest.mark.anyio
class FeatureContract:
    """Subclasses override ``subject``, as those of :class:`AccessContract`; its device is reset when a test ends."""

    @pytest.fixture
    async def subject(self) -> AsyncIterator[FeatureSubject]:
        raise NotImplementedError
        yield

    # ---- features

    async def test_a_feature_that_is_not_there(self, subject: FeatureSubject) -> None:
        for operation in (GET, SET, PROBE | GET, PROBE | SET):
            with pytest.raises(DeviceRefused) as caught:
                await subject.access.feature(operation, NO_FEATURE, size=8 if operation == GET else 0)
            assert caught.value.errno == errno.ENOTTY

    async def test_features_are_probed_and_got(self, subject: FeatureSubject) -> None:
        access = subject.access
        await need_states(access, MigrationFlags.STOP_COPY)
        assert await access.feature(PROBE | GET, Feature.MIGRATION) == b""
        assert await access.feature(PROBE | GET | SET, Feature.MIG_DEVICE_STATE) == b""
        assert await state_of(access) is RUNNING

    async def test_a_feature_that_can_only_be_got(self, subject: FeatureSubject) -> None:
        await need_states(subject.access)
        with pytest.raises(DeviceRefused):
            await subject.access.feature(PROBE | SET, Feature.MIGRATION)
        with pytest.raises(DeviceRefused):
            await subject.access.feature(SET, Feature.MIGRATION, bytes(8))

    # ---- states and data

    @pytest.mark.parametrize("sizes", [(4096, 4096, 4096), (4097, 7, 1 << 16), (1 << 16, 1)])
    async def test_data_is_read_to_several_places_in_order(
        self, subject: FeatureSubject, sizes: tuple[int, ...]
    ) -> None:
        access = subject.access
        await need_states(access)
        whole = bytearray()
        async with await opened(access, STOP_COPY) as data:
            while True:
                views = [memoryview(bytearray(b"\xaa" * size)) for size in sizes]
                count = await data.read_into(views)
                joined = b"".join(views)
                assert 0 <= count <= len(joined)
                assert not joined[count:].strip(b"\xaa")
                if not count:
                    break
                whole += joined[:count]
        assert await access.set_migration_state(STOP) is None
        async with await opened(access, RESUMING) as data:
            await data.write(whole)
            assert await access.set_migration_state(STOP) is None  # which a driver refuses of what is not in order

    @pytest.mark.parametrize("most", [1, 4096, 1 << 21])
    async def test_the_state_of_a_device_moves_out_and_in(self, subject: FeatureSubject, most: int) -> None:
        access = subject.access
        await need_states(access)
        async with await opened(access, STOP_COPY) as data:
            assert await state_of(access) is STOP_COPY
            whole = await read_to_end(data, 1 << 16)
            assert whole
            assert await data.read_into([memoryview(bytearray(16))]) == 0
        assert await access.set_migration_state(STOP) is None
        async with await opened(access, RESUMING) as data:
            # Cut otherwise than it was read; byte by byte only at the start, which is where it may matter.
            head = min(len(whole), 256) if most == 1 else 0
            for at in range(head):
                await data.write(whole[at : at + 1])
            for at in range(head, len(whole), max(most, 4096)):
                await data.write(memoryview(whole)[at : at + max(most, 4096)])
            assert await access.set_migration_state(STOP) is None
        assert await access.set_migration_state(RUNNING) is None
        assert await state_of(access) is RUNNING

    async def test_precopy_goes_on_in_stop_copy(self, subject: FeatureSubject) -> None:
        access = subject.access
        await need_states(access, MigrationFlags.PRE_COPY)
        data = await opened(access, PRE_COPY)
        try:
            info = await data.precopy_info()
        except DeviceRefused as refused:
            if refused.errno != errno.ENOTTY:  # not having it is right too
                raise
        else:
            assert info.initial >= 0
            assert info.dirty >= 0
        whole = await read_to_end(data)
        again = await access.set_migration_state(STOP_COPY)
        async with data if again is None else again as last:
            whole += await read_to_end(last)
        await data.aclose()
        await access.set_migration_state(STOP)
        async with await opened(access, RESUMING) as data:
            await data.write(whole)
            await access.set_migration_state(RUNNING)

    async def test_a_change_that_is_not_to_be_had(self, subject: FeatureSubject) -> None:
        access = subject.access
        await need_states(access)
        for state in (ERROR, 8, 0xFFFF_FFFF):
            with pytest.raises(DeviceRefused) as caught:
                await access.set_migration_state(state)
            assert caught.value.errno == errno.EINVAL
        assert await state_of(access) is RUNNING
        async with await opened(access, STOP_COPY):
            with pytest.raises(DeviceRefused):
                await access.set_migration_state(PRE_COPY)
            assert await state_of(access) is STOP_COPY

    async def test_a_short_stream_is_refused_when_it_ends(self, subject: FeatureSubject) -> None:
        access = subject.access
        await need_states(access)
        async with await opened(access, STOP_COPY) as data:
            whole = await read_to_end(data)
        await access.set_migration_state(STOP)
        async with await opened(access, RESUMING) as data:
            await data.write(whole[: len(whole) // 2])
            with pytest.raises(DeviceRefused):
                await access.set_migration_state(RUNNING)
        assert await state_of(access) in (RESUMING, ERROR)
        await access.reset()
        assert await state_of(access) is RUNNING

    async def test_closing_data_leaves_the_state(self, subject: FeatureSubject) -> None:
        access = subject.access
        await need_states(access)
        data = await opened(access, STOP_COPY)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await data.aclose()
        await data.aclose()
        assert await state_of(access) is STOP_COPY
        await access.set_migration_state(RUNNING)

    async def test_nothing_is_written_without_harm(self, subject: FeatureSubject) -> None:
        await need_states(subject.access)
        async with await opened(subject.access, RESUMING) as data:
            await data.write(b"")

    async def test_after_closing_the_device_is_lost(self, subject: FeatureSubject) -> None:
        access = subject.access
        await access.aclose()
        with pytest.raises(DeviceLost):
            await access.feature(GET, Feature.MIGRATION, size=8)
        with pytest.raises(DeviceLost):
            await access.set_migration_state(STOP)

    async def test_a_reset_ends_a_session(self, subject: FeatureSubject) -> None:
        access = subject.access
        await need_states(access, MigrationFlags.PRE_COPY)
        for _ in range(2):
            async with await opened(access, PRE_COPY) as data:
                await read_to_end(data)
                await access.reset()
        assert await state_of(access) is RUNNING

    # ---- the log of DMA

    async def test_the_log_has_what_was_written(self, subject: FeatureSubject) -> None:
        access = subject.access
        await need_log(access)
        pages = 100
        with guest_memory(pages * PAGE) as (fd, memory):
            await access.dma_map(IOVA, pages * PAGE, fd, 0, writable=True)
            await access.start_dma_log(PAGE, [(IOVA, pages * PAGE)])
            before = memory[:]
            await subject.device_writes_somewhere()
            changed = {n for n in range(pages) if memory[n * PAGE :][:PAGE] != before[n * PAGE :][:PAGE]}
            assert changed
            bitmap = bytearray(16)
            bitmap[13] = 0x80  # beyond the pages asked for: kept
            await access.read_dma_log(IOVA, pages * PAGE, PAGE, memoryview(bitmap))
            assert bits(bitmap) >= changed | {8 * 13 + 7}
            assert max(bits(bitmap)) == 8 * 13 + 7
            again = bytearray(16)
            await access.read_dma_log(IOVA, pages * PAGE, PAGE, memoryview(again))
            assert not any(again)
            await access.stop_dma_log()

    async def test_a_log_that_makes_no_sense(self, subject: FeatureSubject) -> None:
        access = subject.access
        await need_log(access)
        for ranges in (
            [(IOVA + 1, PAGE)],
            [(IOVA, PAGE - 1)],
            [(IOVA, 2 * PAGE), (IOVA + PAGE, 2 * PAGE)],
            [(IOVA, PAGE), (IOVA, PAGE)],
        ):
            with pytest.raises(DeviceRefused) as caught:
                await access.start_dma_log(PAGE, ranges)
            assert caught.value.errno == errno.EINVAL
        await access.start_dma_log(PAGE, [(IOVA, PAGE)])

    async def test_a_log_is_begun_anew_and_ended_when_none_runs(self, subject: FeatureSubject) -> None:
        access = subject.access
        await need_log(access)
        await access.stop_dma_log()
        for _ in range(2):
            await access.start_dma_log(PAGE, [(IOVA, 4 * PAGE)])
        await access.stop_dma_log()
        await access.stop_dma_log()


def bits(bitmap: bytes | bytearray) -> set[int]:
    """The numbers of the bits that are set."""
    value = int.from_bytes(bitmap, "little")
    return {n for n in range(8 * len(bitmap)) if value >> n & 1}
