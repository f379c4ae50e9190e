"""Rules for a device's stream, for interfaces that have one stream for everything: whole, cut short, too long, damaged,
in another order.

What is in a stream only its driver knows. So damage is done where every stream has something to lose: its first bytes,
which say what it is, must be right; of what lies in its middle a driver need not be able to tell.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from vfiostream.conformance.rules import Broken, NotTestable, Rulebook, together
from vfiostream.conformance.subject import MAX_STREAM, Subject, named, refusal
from vfiostream.errors import DeviceRefused

HEAD = 8
"""Bytes at the start of a stream that are damaged together."""


class Stream(NamedTuple):
    """The state of a device."""

    data: bytes
    pieces: tuple[int, ...]
    """How it was cut when it came out."""


class Loaded(NamedTuple):
    """What a driver said to a stream."""

    write: DeviceRefused | None
    """With what it refused the first piece that it refused; those behind it were written all the same."""
    end: DeviceRefused | None
    """With what it refused the change of state that ends the load."""

    @property
    def accepted(self) -> bool:
        return self.write is None and self.end is None

    def __str__(self) -> str:
        if self.write is not None:
            return f"refused when it was written, with {named(self.write)}"
        return "accepted" if self.end is None else f"refused at its end, with {named(self.end)}"


class StreamSubject(Subject):
    """A device with one stream."""

    _stream: Stream | None = None

    async def stream(self) -> Stream:
        """The device's state, saved when it is first asked for. Raises :class:`NotTestable` where that fails, which is
        another rule's business. Leaves the device reset.
        """
        if self._stream is None:
            try:
                self._stream = await self.save()
            except DeviceRefused as error:
                raise NotTestable(f"there is no stream to load, since saving failed: {error}") from error
            finally:
                await self.reset()
            if not self._stream.data:
                raise NotTestable("the device gave a stream of no bytes")
        return self._stream

    async def half(self) -> bytes:
        """Half a stream, to be in the midst of a load; nothing of it where :meth:`stream` has none."""
        try:
            data, _ = await self.stream()
        except NotTestable:
            return b""
        return data[: len(data) // 2]

    @abstractmethod
    async def save(self) -> Stream:
        """Save the state of the stopped device; raises what an access raises."""

    @abstractmethod
    async def begin_load(self) -> None:
        """Reset the device and let it take a stream."""

    @abstractmethod
    async def put(self, piece: bytes) -> None:
        """Give the driver a piece of the stream."""

    @abstractmethod
    async def end_load(self) -> None:
        """Ask for the state that ends the load."""

    async def write(self, data: bytes, pieces: Sequence[int]) -> None:
        """Give the driver ``data``, cut into ``pieces`` of which the last goes on."""
        for piece in _cut(data, pieces):
            await self.put(piece)

    async def load(self, data: bytes, pieces: Sequence[int]) -> Loaded:
        """Reset the device and load ``data``, cut as in :meth:`write`. What is refused does not end that."""
        await self.begin_load()
        first = None
        for piece in _cut(data, pieces):
            refused = await refusal(self.put(piece))
            first = first or refused
        return Loaded(first, await refusal(self.end_load()))

    @abstractmethod
    async def is_in_load(self) -> str | None:
        """None where the device's state is one that a refused load may end in; else what the state is called."""


def _cut(data: bytes, pieces: Sequence[int]) -> Iterator[bytes]:
    at, sizes = 0, itertools.chain(pieces, itertools.repeat(pieces[-1]))
    while at < len(data):
        piece = data[at : at + next(sizes)]
        yield piece
        at += len(piece)


def too_much() -> NotTestable:
    """What to raise for a device with more state than we keep."""
    return NotTestable(
        f"the device has more than {MAX_STREAM >> 20} MiB of state, too much to be kept and changed: test one with less"
    )


STREAM: Rulebook[StreamSubject] = Rulebook("streams")
_INVALID = "linux/vfio.h, RESUMING -> STOP; for Linux 5.8 the review in the thread, line 644"


async def _refused(subject: StreamSubject, variants: Sequence[tuple[str, bytes]]) -> None:
    """Raise :class:`Broken` unless each of ``variants`` is refused."""
    stream = await subject.stream()
    seen = []
    for what, data in variants:
        loaded = await subject.target.load(data, stream.pieces)
        if loaded.accepted:
            seen.append(f"{what} was accepted")
    together(seen)


@STREAM.rule("stream-short", "A stream that is not whole is refused, at the latest when the load ends.", _INVALID)
async def short(subject: StreamSubject) -> None:
    data, _ = await subject.stream()
    lengths = sorted({0, 1, len(data) // 2, len(data) - 1} - {len(data)})
    await _refused(subject, [(f"a stream of {n} of {len(data)} bytes", data[:n]) for n in lengths])


@STREAM.rule("stream-long", "A stream with bytes behind its end is refused.", _INVALID)
async def long(subject: StreamSubject) -> None:
    data, _ = await subject.stream()
    await _refused(subject, [(f"a stream with {n} bytes too many", data + bytes(n)) for n in (1, 4096)])


@STREAM.rule("stream-head", "A stream whose first bytes are not those of such a stream is refused.", _INVALID)
async def head(subject: StreamSubject) -> None:
    data, _ = await subject.stream()
    await _refused(subject, [("a stream with other first bytes", damaged(data, 0, HEAD))])


@STREAM.rule("stream-order", "A stream whose halves have changed places is refused.", _INVALID)
async def order(subject: StreamSubject) -> None:
    data, _ = await subject.stream()
    half = len(data) // 2
    await _refused(subject, [("a stream whose halves have changed places", data[half:] + data[:half])])


@STREAM.rule(
    "stream-body",
    "A stream that is damaged in its middle is accepted or refused, and the device answers as before.",
    _INVALID,
)
async def body(subject: StreamSubject) -> str:
    data, pieces = await subject.stream()
    loaded = await subject.target.load(damaged(data, len(data) // 2, 1), pieces)
    await subject.target.reset()
    if not loaded.accepted:
        return str(loaded)
    return "accepted: this driver can't tell, so whoever carries its stream has to check it"


@STREAM.rule(
    "stream-refused",
    "A load in which bytes were refused can't be ended as if all were well.",
    "linux/vfio.h, RESUMING -> STOP: of invalid data, the change of state must fail",
)
async def refused_stays_refused(subject: StreamSubject) -> str | None:
    data, pieces = await subject.stream()
    seen = []
    refusals = 0
    for what, bad in (("with other first bytes", damaged(data, 0, HEAD)), ("that is too long", data + bytes(4096))):
        loaded = await subject.target.load(bad, pieces)
        if loaded.write is not None:
            refusals += 1
            if loaded.end is None:
                seen.append(f"a stream {what} was {loaded}, and then the load ended well")
    together(seen)
    return None if refusals else "no byte was refused before the end"


@STREAM.rule(
    "stream-refused-state",
    "When the end of a load is refused, the device stays in the load or is in its error state.",
    "linux/vfio.h, vfio_device_feature_mig_state: the original state, one on the way, or ERROR",
)
async def refused_state(subject: StreamSubject) -> None:
    data, pieces = await subject.stream()
    loaded = await subject.target.load(data[: len(data) // 2], pieces)
    if loaded.accepted:
        raise NotTestable("half a stream was accepted")
    state = await subject.target.is_in_load()
    if state is not None:
        raise Broken(f"half a stream was {loaded}, and then the device was in {state}")


def damaged(data: bytes, at: int, count: int) -> bytes:
    """``data`` with ``count`` bytes from ``at`` on inverted."""
    changed = bytearray(data)
    for n in range(at, min(at + count, len(changed))):
        changed[n] ^= 0xFF
    return bytes(changed)
