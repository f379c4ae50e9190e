"""What every transport must do, as a suite for its author to inherit from: the one our own transports are held to.

:class:`TransportContract` holds for everything that moves bytes, a file too; :class:`PipeContract` adds what holds
where both ends are open at once, and :class:`LinkContract` what holds where the other end answers. A test class says
how its transport is made by overriding :meth:`TransportContract.sender` and :meth:`~TransportContract.receiver` or,
where both ends are open at once, :meth:`PipeContract.pair`::

    class TestCarrierPigeon(LinkContract):
        @asynccontextmanager
        async def pair(self):
            async with connect("pigeon:there") as sender, listen("pigeon:here") as listener:
                yield sender, await listener.accept()

It needs the extra ``testing``. anyio's plugin for pytest runs the tests on what the fixture ``anyio_backend`` names:
without one of your own, on asyncio and on trio. In ``conftest.py``,
``pytest.register_assert_rewrite("vfiostream.testing")`` makes a failed assertion tell values, and with
``filterwarnings = ["error"]`` a descriptor that is left open fails a test.

Both ends of a link are closed by the suite; between them it has to hold 2000 bytes and less than 64 MiB. Nothing here
waits for time to pass: ``wait_all_tasks_blocked`` says when a task has come to where it waits, so a transport with a
task that never rests can't be tested with this. All that a test does has 30 seconds.
"""

from __future__ import annotations

import mmap
import os
import random
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest

from vfiostream.buffers import Buffer
from vfiostream.errors import ConnectionLost, LocalProtocolError, TransportError
from vfiostream.transports.contract import Transport

KIB = 1024
MIB = 1024 * KIB
IOV_MAX = os.sysconf("SC_IOV_MAX")
MORE_THAN_FITS = 64 * MIB
"""More than a link takes when nobody reads: Linux's socket buffers hold 6 + 4 MiB by default, 32 + 4 where tuned."""

NOISE = random.Random(1).randbytes(3 * MIB + 7)
"""Bytes no stretch of which repeats, so that what is lost, doubled or swapped shows."""

SENDS: dict[str, list[list[Buffer]]] = {
    "nothing": [[]],
    "only empty buffers": [[b"", bytearray(), memoryview(b"")]],
    "one byte": [[NOISE[:1]]],
    "empty between": [[b"", NOISE[:1], b"", b"", NOISE[1:3], b""], [b""], [NOISE[3:9]]],
    "64 KiB": [[NOISE[: 64 * KIB]]],
    "3 MiB": [[NOISE]],
    "many calls": [[NOISE[n * 1000 : (n + 1) * 1000]] for n in range(200)],
    "mixed sizes": [[NOISE[:0], NOISE[:1], NOISE[1 : 64 * KIB], NOISE[64 * KIB :]], [NOISE[:5]]],
    "more buffers than the kernel takes": [[NOISE[n * 3 : n * 3 + n % 4] for n in range(2 * IOV_MAX + 5)]],
    "large ones beyond the kernel's limit": [[NOISE[n * 2000 : (n + 1) * 2000] for n in range(IOV_MAX + 300)]],
    "every kind of buffer": [
        [NOISE[:777], bytearray(NOISE[777:5000]), memoryview(NOISE)[5000:], memoryview(bytearray(9))]
    ],
}


def joined(sends: Sequence[Sequence[Buffer]]) -> bytes:
    return b"".join(bytes(buffer) for buffers in sends for buffer in buffers)


async def send_all(transport: Transport, sends: Sequence[Sequence[Buffer]]) -> None:
    for buffers in sends:
        await transport.send(buffers)
    await transport.finish()


async def receive_all(transport: Transport, space: memoryview | None = None) -> bytes:
    """Everything up to the end of the stream, by way of ``space``."""
    received = bytearray()
    view = memoryview(bytearray(256 * KIB)) if space is None else space
    while count := await transport.receive([view]):
        assert 0 < count <= len(view)
        received += view[:count]
    return bytes(received)


async def receive_exactly(transport: Transport, count: int) -> bytes:
    space = bytearray(count)
    with memoryview(space) as view:
        got = 0
        while got < count:
            step = await transport.receive([view[got:]])
            assert step, f"the stream ended after {got} of {count} bytes"
            got += step
    return bytes(space)


def parts_of(view: memoryview, sizes: Sequence[int]) -> Iterator[memoryview]:
    """``view`` cut into parts of ``sizes``."""
    start = 0
    for size in sizes:
        yield view[start : start + size]
        start += size


async def receive_until_gone(transport: Transport) -> bytes:
    """Everything up to the end of the stream, or to where the connection is lost."""
    received = bytearray()
    space = bytearray(256 * KIB)
    while True:
        try:
            count = await transport.receive([memoryview(space)])
        except ConnectionLost:
            return bytes(received)
        if count == 0:
            return bytes(received)
        received += space[:count]


async def send_for_ever(transport: Transport) -> None:
    while True:
        await transport.send([NOISE])
        await anyio.lowlevel.checkpoint()


def cancelled() -> anyio.CancelScope:
    """A scope in which everything is cancelled at its first chance."""
    scope = anyio.CancelScope()
    scope.cancel()
    return scope


@asynccontextmanager
async def time_limit() -> AsyncIterator[None]:
    """Turns what hangs into a failure; no test depends on how long something takes."""
    with anyio.fail_after(30):
        yield


class TransportContract(ABC):
    """For everything that moves bytes, also if it has to be finished before it can be read."""

    pytestmark = pytest.mark.anyio

    folder: Path
    """An empty folder of the test's own."""

    @pytest.fixture(autouse=True)
    def _own_folder(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    @abstractmethod
    def sender(self) -> AbstractAsyncContextManager[Transport]:
        """A transport to send with, open within the context."""

    @abstractmethod
    def receiver(self) -> AbstractAsyncContextManager[Transport]:
        """The other end of :meth:`sender`'s last one, asked for within its context and after its ``finish``."""

    async def moved(self, sends: Sequence[Sequence[Buffer]], space: memoryview) -> bytes:
        """What arrives of ``sends`` by way of ``space``."""
        async with self.sender() as sender:
            await send_all(sender, sends)
            async with self.receiver() as receiver:
                return await receive_all(receiver, space)

    @pytest.mark.parametrize("view_size", [64 * KIB - 1, 4 * MIB])
    @pytest.mark.parametrize("name", SENDS)
    async def test_bytes_arrive_whole_and_in_order(self, name: str, view_size: int) -> None:
        async with time_limit():
            assert await self.moved(SENDS[name], memoryview(bytearray(view_size))) == joined(SENDS[name])

    @pytest.mark.parametrize("view_size", [1, 13])
    async def test_bytes_arrive_in_small_views(self, view_size: int) -> None:
        async with time_limit():
            sends = [[NOISE[:100]], [NOISE[100:101], NOISE[101:300]]]
            assert await self.moved(sends, memoryview(bytearray(view_size))) == NOISE[:300]

    async def test_what_receive_does_not_count_is_left_alone(self) -> None:
        space = bytearray(b"\xa5" * 100)
        async with time_limit():
            assert await self.moved([[NOISE[:50]]], memoryview(space)) == NOISE[:50]
        assert space[50:] == b"\xa5" * 50

    async def test_from_mapped_memory_to_mapped_memory_with_no_view_left_behind(self) -> None:
        with mmap.mmap(-1, len(NOISE)) as source, mmap.mmap(-1, 64 * KIB) as target:
            source[:] = NOISE
            with memoryview(source) as whole, whole[4096:] as tail, memoryview(target) as space:
                async with time_limit():
                    assert await self.moved([[tail, whole]], space) == NOISE[4096:] + NOISE
        # Leaving the block closes both, which raises BufferError if a view is left anywhere.

    async def test_views_are_filled_in_order(self) -> None:
        sizes = [1, 7, 200, 3, 400, 100]
        space = bytearray(sum(sizes))
        received = bytearray()
        async with time_limit(), self.sender() as sender:
            await send_all(sender, [[NOISE[:1999]]])
            async with self.receiver() as receiver:
                while count := await receiver.receive(list(parts_of(memoryview(space), sizes))):
                    received += space[:count]
        assert received == NOISE[:1999]

    async def test_more_views_than_the_kernel_takes(self) -> None:
        many = 2 * IOV_MAX + 5
        space = bytearray(many)
        received = bytearray()
        async with time_limit(), self.sender() as sender:
            await send_all(sender, [[NOISE[:1999]]])
            async with self.receiver() as receiver:
                while count := await receiver.receive(list(parts_of(memoryview(space), [1] * many))):
                    received += space[:count]
        assert received == NOISE[:1999]

    async def test_the_end_comes_once_everything_was_read_and_stays(self) -> None:
        async with time_limit(), self.sender() as sender:
            await send_all(sender, [[NOISE[:1000]]])
            async with self.receiver() as receiver:
                assert await receive_exactly(receiver, 1000) == NOISE[:1000]
                for _ in range(3):
                    assert await receiver.receive([memoryview(bytearray(10))]) == 0

    async def test_buffers_may_be_reused_after_send(self) -> None:
        buffer = bytearray(NOISE[:2000])
        async with time_limit(), self.sender() as sender:
            await sender.send([buffer])
            buffer[:] = bytes(2000)
            await sender.finish()
            async with self.receiver() as receiver:
                assert await receive_all(receiver) == NOISE[:2000]

    async def test_a_send_cancelled_before_its_first_byte_leaves_the_transport_as_it_was(self) -> None:
        async with time_limit(), self.sender() as sender:
            await sender.send([b"one "])
            with cancelled():
                await sender.send([b"never "])
                pytest.fail("send did not notice that it was cancelled")
            await sender.send([b"two"])
            await sender.finish()
            async with self.receiver() as receiver:
                assert await receive_all(receiver) == b"one two"

    async def test_a_receive_cancelled_at_once_loses_nothing(self) -> None:
        async with time_limit(), self.sender() as sender:
            await send_all(sender, [[NOISE[:1000]]])
            async with self.receiver() as receiver:
                received = bytearray()
                space = bytearray(100)
                with cancelled():
                    received += space[: await receiver.receive([memoryview(space)])]
                assert bytes(received) + await receive_all(receiver) == NOISE[:1000]

    async def test_nothing_is_sent_after_finish(self) -> None:
        async with time_limit(), self.sender() as sender:
            await sender.finish()
            with pytest.raises(LocalProtocolError):
                await sender.send([b"late"])
            with pytest.raises(LocalProtocolError):
                await sender.finish()

    async def test_use_after_close(self) -> None:
        async with time_limit(), self.sender() as sender:
            await send_all(sender, [[b"x"]])
            async with self.receiver() as receiver:
                await receiver.aclose()
                with pytest.raises(TransportError, match="closed"):
                    await receiver.receive([memoryview(bytearray(1))])
            await sender.aclose()
            with pytest.raises(TransportError, match="closed"):
                await sender.send([b"x"])
            with pytest.raises(TransportError, match="closed"):
                await sender.finish()

    async def test_close_again_and_under_cancellation(self) -> None:
        async with time_limit(), self.sender() as sender:
            await sender.finish()
            async with self.receiver() as receiver:
                for transport in (sender, receiver):
                    with cancelled():
                        await transport.aclose()
                    await transport.aclose()
                with pytest.raises(TransportError, match="closed"):
                    await sender.send([b"x"])
                with pytest.raises(TransportError, match="closed"):
                    await receiver.receive([memoryview(bytearray(1))])

    async def test_it_says_what_it_is(self) -> None:
        async with time_limit(), self.sender() as sender:
            await sender.finish()
            async with self.receiver() as receiver:
                assert sender.address
                assert receiver.address
                assert sender.answers is receiver.answers


class PipeContract(TransportContract):
    """For transports of which both ends are open at once, if only in one direction."""

    @abstractmethod
    def pair(self) -> AbstractAsyncContextManager[tuple[Transport, Transport]]:
        """Both ends of a new link, as the sender's and the receiver's."""

    @asynccontextmanager
    async def link(self) -> AsyncIterator[tuple[Transport, Transport]]:
        async with time_limit(), self.pair() as (sender, receiver), sender, receiver:
            yield sender, receiver

    @asynccontextmanager
    async def sender(self) -> AsyncIterator[Transport]:
        async with self.link() as (sender, self._receiver):
            yield sender

    @asynccontextmanager
    async def receiver(self) -> AsyncIterator[Transport]:
        yield self._receiver

    async def moved(self, sends: Sequence[Sequence[Buffer]], space: memoryview) -> bytes:
        received = bytearray()
        async with self.link() as (sender, receiver), anyio.create_task_group() as tasks:
            tasks.start_soon(send_all, sender, sends)
            received += await receive_all(receiver, space)
        return bytes(received)

    async def test_send_waits_while_nobody_reads_and_goes_on_after(self) -> None:
        chunk = NOISE[:MIB]
        sent = 0

        async def send_much(transport: Transport) -> None:
            nonlocal sent
            while sent < MORE_THAN_FITS:
                await transport.send([chunk])
                sent += len(chunk)
            await transport.finish()

        async with self.link() as (sender, receiver), anyio.create_task_group() as tasks:
            tasks.start_soon(send_much, sender)
            await anyio.wait_all_tasks_blocked()
            assert sent < MORE_THAN_FITS
            received = 0
            space = bytearray(MIB)
            for _ in range(MORE_THAN_FITS // MIB):
                part = await receive_exactly(receiver, MIB)
                assert part == chunk
                received += len(part)
            assert received == MORE_THAN_FITS
            assert await receiver.receive([memoryview(space)]) == 0
        assert sent == MORE_THAN_FITS

    async def test_a_cancelled_receive_that_waited_loses_nothing(self) -> None:
        async with self.link() as (sender, receiver):
            with anyio.CancelScope() as waiting:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(receiver.receive, [memoryview(bytearray(100))])
                    await anyio.wait_all_tasks_blocked()
                    waiting.cancel()
            await send_all(sender, [[NOISE[:1000]]])
            assert await receive_all(receiver) == NOISE[:1000]

    async def test_a_receive_cancelled_as_bytes_arrive_returns_them_or_leaves_them(self) -> None:
        received = bytearray()

        async def receive_once(transport: Transport) -> None:
            space = bytearray(100)
            count = await transport.receive([memoryview(space)])
            received.extend(space[:count])

        async with self.link() as (sender, receiver):
            for turn in range(8):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(receive_once, receiver)
                    await anyio.wait_all_tasks_blocked()
                    await sender.send([bytes([turn])])
                    for _ in range(turn % 4):
                        await anyio.lowlevel.checkpoint()
                    tasks.cancel_scope.cancel()
            await sender.finish()
            received += await receive_all(receiver)
        assert received == bytes(range(8))

    async def test_a_send_cancelled_part_way_tears(self) -> None:
        chunk = NOISE[:MIB]
        async with self.link() as (sender, receiver):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(sender.send, [chunk] * (MORE_THAN_FITS // MIB))
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
            with pytest.raises(TransportError):
                await sender.send([b"more"])
            with pytest.raises(TransportError):
                await sender.finish()
            await sender.aclose()
            received = await receive_until_gone(receiver)
            assert 0 < len(received) < MORE_THAN_FITS
            assert received == (chunk * (len(received) // MIB + 1))[: len(received)]

    async def test_a_send_that_stopped_part_way_leaves_no_view_behind(self) -> None:
        async def send_and_lose(transport: Transport, view: memoryview) -> None:
            with pytest.raises(ConnectionLost) as caught:
                await transport.send([view])
            failures.append(caught.value)

        failures: list[ConnectionLost] = []
        with mmap.mmap(-1, MORE_THAN_FITS) as mapped, memoryview(mapped) as view:
            async with self.link() as (sender, _), anyio.create_task_group() as tasks:
                tasks.start_soon(sender.send, [view])
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
            async with self.link() as (sender, receiver), anyio.create_task_group() as tasks:
                tasks.start_soon(send_and_lose, sender, view)
                await anyio.wait_all_tasks_blocked()
                await receiver.aclose()
        # Leaving the block closes the mapping, which raises BufferError if a view is left in a frame of a traceback.
        assert len(failures) == 1

    async def test_the_peer_closes_while_nobody_sends(self) -> None:
        async with self.link() as (sender, receiver):
            await receiver.aclose()
            with pytest.raises(ConnectionLost):
                await send_for_ever(sender)
            with pytest.raises(ConnectionLost):
                await sender.send([b"x"])
            with pytest.raises(ConnectionLost):
                await sender.finish()

    async def test_the_peer_closes_while_a_send_waits(self) -> None:
        async def send_and_lose(transport: Transport) -> None:
            with pytest.raises(ConnectionLost):
                await transport.send([bytes(MORE_THAN_FITS)])

        async with self.link() as (sender, receiver), anyio.create_task_group() as tasks:
            tasks.start_soon(send_and_lose, sender)
            await anyio.wait_all_tasks_blocked()
            await receiver.aclose()

    async def test_the_peer_closes_while_a_receive_waits(self) -> None:
        async with self.link() as (sender, receiver), anyio.create_task_group() as tasks:
            tasks.start_soon(receive_until_gone, receiver)
            await anyio.wait_all_tasks_blocked()
            await sender.aclose()

    async def test_what_was_sent_before_closing_can_be_read(self) -> None:
        async with self.link() as (sender, receiver):
            await sender.send([b"last words"])
            await sender.aclose()
            assert await receive_until_gone(receiver) == b"last words"

    async def test_close_while_a_receive_waits(self) -> None:
        async def receive_and_be_closed(transport: Transport) -> None:
            with pytest.raises(TransportError, match="closed"):
                await transport.receive([memoryview(bytearray(1))])

        async with self.link() as (_, receiver), anyio.create_task_group() as tasks:
            tasks.start_soon(receive_and_be_closed, receiver)
            await anyio.wait_all_tasks_blocked()
            await receiver.aclose()

    async def test_close_while_a_send_waits(self) -> None:
        async def send_and_be_closed(transport: Transport) -> None:
            with pytest.raises(TransportError, match="closed"):
                await transport.send([bytes(MORE_THAN_FITS)])

        async with self.link() as (sender, _), anyio.create_task_group() as tasks:
            tasks.start_soon(send_and_be_closed, sender)
            await anyio.wait_all_tasks_blocked()
            await sender.aclose()


class LinkContract(PipeContract):
    """For transports with somebody at the other end, who answers."""

    async def test_somebody_may_answer(self) -> None:
        async with self.link() as (sender, receiver):
            assert sender.answers
            await sender.send([b"question"])
            assert await receive_exactly(receiver, 8) == b"question"
            await receiver.send([b"answer"])
            assert await receive_exactly(sender, 6) == b"answer"

    async def test_both_directions_at_once(self) -> None:
        back = NOISE[::-1]
        received: dict[str, bytes] = {}

        async def receive_as(name: str, transport: Transport) -> None:
            received[name] = await receive_all(transport)

        async with self.link() as (sender, receiver), anyio.create_task_group() as tasks:
            tasks.start_soon(send_all, sender, [[NOISE]] * 4)
            tasks.start_soon(send_all, receiver, [[back]] * 4)
            tasks.start_soon(receive_as, "there", receiver)
            tasks.start_soon(receive_as, "back", sender)
        assert received["there"] == NOISE * 4
        assert received["back"] == back * 4

    async def test_an_answer_after_the_other_end_has_finished(self) -> None:
        async with self.link() as (sender, receiver):
            await send_all(sender, [[b"all of it"]])
            assert await receive_all(receiver) == b"all of it"
            await send_all(receiver, [[b"thanks"]])
            assert await receive_all(sender) == b"thanks"

    async def test_receive_works_on_after_the_other_direction_was_torn(self) -> None:
        async with self.link() as (sender, receiver):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(sender.send, [bytes(MORE_THAN_FITS)])
                await anyio.wait_all_tasks_blocked()
                tasks.cancel_scope.cancel()
            await send_all(receiver, [[b"I gave up"]])
            assert await receive_all(sender) == b"I gave up"

    async def test_a_link_that_was_lost_never_looks_finished(self) -> None:
        """The system reports a reset once, perhaps to the direction that sends, and an end of the stream from then."""
        async with self.link() as (sender, receiver):
            await sender.send([b"unread"])
            await anyio.wait_all_tasks_blocked()
            await receiver.aclose()
            with pytest.raises(ConnectionLost):
                await send_for_ever(sender)
            for _ in range(3):
                with pytest.raises(ConnectionLost):
                    await sender.receive([memoryview(bytearray(1))])
