"""Rules for the migration states of Linux 5.18."""

from __future__ import annotations

import errno
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

from vfiostream.access.contract import Access, MigrationData
from vfiostream.conformance.rules import Broken, NotTestable, Rulebook, together
from vfiostream.conformance.stream import Stream, StreamSubject, too_much
from vfiostream.conformance.subject import MAX_STREAM, Opener, named, near, refusal
from vfiostream.errors import DeviceLost, DeviceRefused
from vfiostream.uapi.vfio import (
    FEATURE_DATA_SIZE,
    FEATURE_MIG_STATE,
    Feature,
    FeatureOperation,
    MigrationFlags,
    MigrationState as State,
)

READ = 1 << 16
"""Bytes that are read and written at a time, where a check says nothing else."""
REST = 1 << 20
"""The same, for what follows the pieces that a check is about."""
SIZES = (*range(1, 17), 64, 511, 512, 4095, 4096, 4097, 65537, 1 << 20)
"""Sizes of reads and writes to try."""
PIECES = 512
"""Reads and writes of one size, after which the rest goes faster."""
NOT_STATES = (8, 99, 0xFFFF_FFFF)

PRE_COPY = (State.PRE_COPY, State.PRE_COPY_P2P)
SAVING = (*PRE_COPY, State.STOP_COPY)
STREAMING = (*SAVING, State.RESUMING)
STOPPED = (State.STOP, State.STOP_COPY, State.RESUMING)

_NEEDS = {
    State.RUNNING_P2P: MigrationFlags.P2P,
    State.PRE_COPY: MigrationFlags.PRE_COPY,
    State.PRE_COPY_P2P: MigrationFlags.P2P | MigrationFlags.PRE_COPY,
}


def is_permitted(flags: MigrationFlags, start: State, end: int) -> bool:
    """Whether a driver with ``flags``, in ``start``, can be asked for ``end``: some way leads from each state it has to
    each other one (``vfio_mig_get_next_state``), but for what vfio.h forbids.
    """
    if end not in tuple(State) or end == State.ERROR or _NEEDS.get(State(end), flags) not in flags:
        return False
    return not (start is State.STOP_COPY and end in PRE_COPY)


def opens(start: State, end: State) -> bool:
    """Whether that change begins a session, with data of its own."""
    return end is not start and end in STREAMING and not (start in SAVING and end in SAVING)


class Seen(NamedTuple):
    """What came of asking for ``end`` in ``start``."""

    start: State
    end: int
    refused: DeviceRefused | None
    state: int
    opened: bool

    def __str__(self) -> str:
        return f"{self.start.name} -> {name_of(self.end)}"


class StatesSubject(StreamSubject):
    """A device with the migration states."""

    def __init__(self, opener: Opener, access: Access, flags: MigrationFlags) -> None:
        super().__init__(opener, access)
        self.flags = flags
        self.data: MigrationData | None = None
        """Of the session that was begun last."""
        self._open: list[MigrationData] = []
        self._changes: list[Seen] | None = None
        self._trying = False
        """Whether it was begun to find them out; that is done once, however it ends."""

    @property
    def states(self) -> list[State]:
        """Those that it has, but for ERROR."""
        return [one for one in State if one is not State.ERROR and _NEEDS.get(one, self.flags) in self.flags]

    async def state(self) -> int:
        raw = await self.access.feature(FeatureOperation.GET, Feature.MIG_DEVICE_STATE, size=FEATURE_MIG_STATE.size)
        return int(FEATURE_MIG_STATE.unpack(raw)[0])

    async def go(self, state: int) -> bool:
        """Ask for ``state``; returns whether that brought data."""
        data = await self.access.set_migration_state(state)
        if data is None:
            return False
        self.data = data
        self._open.append(data)
        return True

    def session(self) -> MigrationData:
        """The data at hand; raises :class:`NotTestable` where there is none: the rule data-opened is about that."""
        if self.data is None:
            raise NotTestable("the driver began a session and gave no data for it")
        return self.data

    async def run(self) -> None:
        if await self.state() != State.RUNNING:
            await self.go(State.RUNNING)

    async def stop(self) -> None:
        await self.go(State.STOP)

    async def close_data(self) -> None:
        for data in self._open:
            await data.aclose()
        self._open.clear()
        self.data = None

    async def place(self, state: State) -> None:
        """Reset it and put it in ``state``."""
        await self.reset()
        if state is not State.RUNNING:
            await self.go(state)

    async def read_to_end(self, most: int = READ, pieces: int | None = None) -> list[bytes]:
        """Read until nothing comes, in whichever way that is said; after ``pieces`` reads of ``most`` bytes, faster."""
        data, buffer, total = self.session(), memoryview(bytearray(max(most, REST))), 0
        whole: list[bytes] = []
        while True:
            into = buffer[: most if pieces is None or len(whole) < pieces else REST]
            try:
                count = await data.read_into([into])
            except DeviceRefused as refused:
                if refused.errno != errno.ENOMSG:
                    raise
                count = 0
            if not count:
                return whole
            whole.append(bytes(into[:count]))
            total += count
            if total > MAX_STREAM:
                raise too_much()

    async def save(self) -> Stream:
        await self.place(State.STOP_COPY)
        data = b"".join(await self.read_to_end())
        return Stream(data, (READ,))

    async def begin_load(self) -> None:
        await self.place(State.RESUMING)

    async def put(self, piece: bytes) -> None:
        await self.session().write(piece)

    async def end_load(self) -> None:
        await self.go(State.STOP)

    async def is_in_load(self) -> str | None:
        state = await self.state()
        return None if state in (State.RESUMING, State.ERROR) else name_of(state)

    async def changes(self) -> list[Seen]:
        """Every change of state that can be asked for in a state the device has, tried once; those that end a load only
        where there is a stream to load. Raises :class:`NotTestable` where they were tried before in vain.
        """
        if self._changes is None:
            if self._trying:
                raise NotTestable("trying all changes of state has not come to its end, as the first rule on them says")
            self._trying = True
            try:
                stream = await self.stream()
            except NotTestable:
                stream = None
            changes = []
            for start, end in itertools.product(self.states, (*State, *NOT_STATES)):
                await self.place(start)
                if start is State.RESUMING and is_permitted(self.flags, start, end) and end != start:
                    if stream is None:
                        continue
                    await self.write(stream.data, stream.pieces)
                opened, refused = False, None
                try:
                    opened = await self.go(end)
                except DeviceRefused as error:
                    refused = error
                changes.append(Seen(start, end, refused, await self.state(), opened))
            self._changes = changes
        return self._changes

    def require(self, *states: State) -> None:
        """Raise :class:`NotTestable` unless the device has these states."""
        for state in states:
            if state not in self.states:
                raise NotTestable(f"the driver does not have {state.name}")


def name_of(state: int) -> str:
    """What vfio.h calls it."""
    return State(state).name if state in tuple(State) else f"state {state}"


STATES: Rulebook[StatesSubject] = Rulebook("migration states (Linux 5.18)")
_HEADER = "linux/vfio.h, enum vfio_device_mig_state"
_PRECOPY_INFO = "linux/vfio.h, VFIO_MIG_GET_PRECOPY_INFO"
_SET_STATE = "linux/vfio.h, vfio_device_feature_mig_state"


# ---- states


@STATES.rule(
    "flags",
    "The driver's flags are STOP_COPY, alone or with P2P, PRE_COPY or both.",
    "linux/vfio.h, vfio_device_feature_migration",
)
async def flags(subject: StatesSubject) -> None:
    known = int(MigrationFlags.STOP_COPY | MigrationFlags.P2P | MigrationFlags.PRE_COPY)
    if MigrationFlags.STOP_COPY not in subject.flags or int(subject.flags) & ~known:
        raise Broken(f"the flags are {int(subject.flags):#x}")


@STATES.rule("state-told", "Asking for the state opens no data: data_fd is -1.", _SET_STATE)
async def state_told(subject: StatesSubject) -> None:
    seen = []
    for state in subject.states:
        await subject.place(state)
        raw = await subject.access.feature(FeatureOperation.GET, Feature.MIG_DEVICE_STATE, size=FEATURE_MIG_STATE.size)
        _, fd = FEATURE_MIG_STATE.unpack(raw)
        if fd != -1:
            seen.append(f"in {state.name}, data_fd was {fd}")
    together(seen)


@STATES.rule(
    "changes-permitted",
    "From each state the driver has, each other one can be reached by asking for it, and is the state afterwards.",
    f"{_HEADER}; drivers/vfio/vfio_main.c, vfio_mig_get_next_state",
)
async def changes_permitted(subject: StatesSubject) -> None:
    seen = []
    for one in await subject.changes():
        if not is_permitted(subject.flags, one.start, one.end):
            continue
        if one.refused is not None:
            seen.append(f"{one} was refused with {named(one.refused)}, and left {name_of(one.state)}")
        elif one.state != one.end:
            seen.append(f"{one} was done, and the state was {name_of(one.state)}")
    together(seen)


@STATES.rule(
    "changes-refused",
    "STOP_COPY does not go back to PRE_COPY or PRE_COPY_P2P, states the driver does not have are refused, and so is "
    "what is no state; the state stays what it was, or is ERROR.",
    f"{_HEADER}; drivers/vfio/vfio_main.c, vfio_mig_get_next_state",
)
async def changes_refused(subject: StatesSubject) -> None:
    together(_not_refused(subject, [one for one in await subject.changes() if one.end != State.ERROR]))


@STATES.rule("error-refused", "ERROR can't be asked for.", f"{_HEADER}: any -> ERROR")
async def error_refused(subject: StatesSubject) -> None:
    together(_not_refused(subject, [one for one in await subject.changes() if one.end == State.ERROR]))


def _not_refused(subject: StatesSubject, changes: list[Seen]) -> list[str]:
    seen = []
    for one in changes:
        if is_permitted(subject.flags, one.start, one.end):
            continue
        if one.refused is None:
            seen.append(f"{one} was done, and the state was {name_of(one.state)}")
        elif one.state not in (one.start, State.ERROR):
            seen.append(f"{one} was refused with {named(one.refused)}, and left {name_of(one.state)}")
    return seen


@STATES.rule(
    "reset-told",
    "A device that can be moved says that it can be reset, as there may be no other way out of a failed load.",
    "linux/vfio.h, VFIO_DEVICE_FLAGS_RESET; RESUMING -> STOP and ERROR want it",
)
async def reset_told(subject: StatesSubject) -> None:
    if not subject.access.info.can_reset:
        raise Broken("its flags do not have VFIO_DEVICE_FLAGS_RESET")


@STATES.rule("reset", "A reset brings the device from each of its states to RUNNING.", f"{_HEADER}; VFIO_DEVICE_RESET")
async def reset(subject: StatesSubject) -> None:
    if refused := await refusal(subject.access.reset()):
        raise NotTestable(f"a reset was refused with {named(refused)}")
    half = await subject.half()
    seen = []
    for state in subject.states:
        await subject.place(state)
        if state is State.RESUMING:
            await subject.write(half, (READ,))
        elif state in SAVING:
            await refusal(subject.session().read_into([memoryview(bytearray(1))]))
        await subject.access.reset()
        if (now := await subject.state()) != State.RUNNING:
            seen.append(f"a reset in {state.name} left {name_of(now)}")
    together(seen)


@STATES.rule("stopped-still", "A stopped device does no DMA: in STOP, STOP_COPY and RESUMING.", f"{_HEADER}: STOP")
async def stopped_still(subject: StatesSubject) -> None:
    seen = []
    for state in STOPPED:
        await subject.reset()
        async with subject.guest() as guest:
            await guest.let_write()
            await subject.go(state)
            if pages := await guest.is_still():
                seen.append(f"in {state.name} it wrote {len(pages)} pages of guest memory")
    together(seen)


# ---- data


@STATES.rule(
    "data-opened",
    "A change that begins a session gives new data, and no other change does.",
    f"{_HEADER}: the arcs that return a new data_fd",
)
async def data_opened(subject: StatesSubject) -> None:
    if subject.name.startswith("vfio-user:"):
        raise NotTestable("no message of vfio-user says whether a change opened data")
    seen = []
    for one in await subject.changes():
        if one.refused is not None or not is_permitted(subject.flags, one.start, one.end):
            continue
        expected = opens(one.start, State(one.end))
        if one.opened != expected:
            seen.append(f"{one} gave {'no data' if expected else 'new data'}")
    together(seen)


@asynccontextmanager
async def _in_load(subject: StatesSubject) -> AsyncIterator[Stream]:
    stream = await subject.stream()
    await subject.place(State.RESUMING)
    yield stream


@STATES.rule("data-one-way", "Data is read from a saving device only, and written to a loading one only.", _SET_STATE)
async def data_one_way(subject: StatesSubject) -> None:
    seen = []
    await subject.place(State.STOP_COPY)
    if await refusal(subject.session().write(bytes(16))) is None:
        seen.append("in STOP_COPY, data was taken")
    async with _in_load(subject):
        if await refusal(subject.session().read_into([memoryview(bytearray(16))])) is None:
            seen.append("in RESUMING, a read was not refused")
    together(seen)


@STATES.rule(
    "data-left-saving",
    "When the saving states are left, the session has ended: its data refuses to be read.",
    f"{_HEADER}: STOP_COPY -> STOP, PRE_COPY -> RUNNING",
)
async def data_left_saving(subject: StatesSubject) -> None:
    seen = []
    for start, end in ((State.STOP_COPY, State.STOP), (State.PRE_COPY, State.RUNNING)):
        if start not in subject.states:
            continue
        await subject.place(start)
        await refusal(subject.session().read_into([memoryview(bytearray(1))]))
        await subject.go(end)
        into = memoryview(bytearray(READ))
        try:
            count = await subject.session().read_into([into])
        except DeviceRefused:
            continue
        seen.append(f"after {start.name} -> {end.name}, a read gave {count} bytes")
    together(seen)


@STATES.rule(
    "data-left-loading",
    "When RESUMING is left, the session has ended: its data refuses to be written.",
    f"{_HEADER}: RESUMING -> STOP",
)
async def data_left_loading(subject: StatesSubject) -> None:
    async with _in_load(subject) as stream:
        await subject.write(stream.data, stream.pieces)
        await subject.go(State.STOP)
        if await refusal(subject.session().write(stream.data[:1])) is None:
            raise Broken("after RESUMING -> STOP, a byte was taken")


@STATES.rule(
    "closed-in-session",
    "A device that is closed in the midst of saving or loading can be opened again, says its state, and runs after a "
    "reset.",
    f"{_HEADER}: VFIO_DEVICE_RESET must be used to recover",
)
async def closed_in_session(subject: StatesSubject) -> str:
    half = await subject.half()
    found = []
    for state in (one for one in STREAMING if one in subject.states):
        await subject.place(state)
        session = subject.session()
        if state is State.RESUMING:
            await subject.write(half, (READ,))
        else:
            await refusal(session.read_into([memoryview(bytearray(1))]))
        await subject.access.aclose()  # with its data open
        try:
            await session.read_into([memoryview(bytearray(1))])
        except (DeviceLost, DeviceRefused):
            pass
        else:
            raise Broken(f"closed in {state.name}, the device gave more data")
        await subject.reopen()
        now = await subject.state()
        found.append(f"{state.name}: {name_of(now)}")
        await subject.reset()
        if (now := await subject.state()) != State.RUNNING:
            raise Broken(f"closed in {state.name} and reset, the device is in {name_of(now)}")
    return f"closed and opened again: {', '.join(found)}"


@STATES.rule(
    "precopy-end",
    "In PRE_COPY and PRE_COPY_P2P, the end for now is ENOMSG: a read never returns 0.",
    _PRECOPY_INFO,
)
async def precopy_end(subject: StatesSubject) -> None:
    subject.require(State.PRE_COPY)
    seen = []
    for state in (one for one in PRE_COPY if one in subject.states):
        await subject.place(state)
        into, total = memoryview(bytearray(READ)), 0
        while True:
            try:
                count = await subject.session().read_into([into])
            except DeviceRefused as refused:
                if refused.errno != errno.ENOMSG:
                    seen.append(f"in {state.name}, a read was refused with {named(refused)} after {total} bytes")
                break
            if not count:
                seen.append(f"in {state.name}, a read returned 0 after {total} bytes")
                break
            total += count
            if total > MAX_STREAM:
                raise too_much()
    together(seen)


@STATES.rule(
    "stop-copy-end", "In STOP_COPY, the end is a read that returns 0, and every read after it does too.", _PRECOPY_INFO
)
async def stop_copy_end(subject: StatesSubject) -> None:
    await subject.place(State.STOP_COPY)
    into, total, ends = memoryview(bytearray(READ)), 0, 0
    while ends < 3:
        try:
            count = await subject.session().read_into([into])
        except DeviceRefused as refused:
            where = f"after {total} bytes" if not ends else "behind the end"
            raise Broken(f"a read was refused with {named(refused)} {where}") from refused
        if count and ends:
            raise Broken(f"a read behind the end gave {count} bytes")
        total += count
        ends += not count
        if total > MAX_STREAM:
            raise too_much()


@STATES.rule(
    "precopy-goes-on",
    "What is read in PRE_COPY and then in STOP_COPY is one stream, which can be loaded.",
    f"{_HEADER}: the saving group of states",
)
async def precopy_goes_on(subject: StatesSubject) -> None:
    subject.require(State.PRE_COPY)
    await subject.place(State.PRE_COPY)
    whole = await subject.read_to_end()
    await subject.go(State.STOP_COPY)
    whole += await subject.read_to_end()
    loaded = await subject.target.load(b"".join(whole), (READ,))
    if not loaded.accepted:
        raise Broken(f"such a stream was {loaded}")


def _sizes(data: bytes) -> Sequence[int]:
    return (*(size for size in SIZES if size < len(data)), len(data))


@STATES.rule(
    "read-sizes",
    "Reads of every size give at most as much as was asked for, and together the whole stream.",
    f"{_SET_STATE}: the byte order is preserved",
)
async def read_sizes(subject: StatesSubject) -> None:
    seen = []
    for size in _sizes((await subject.stream()).data):
        await subject.place(State.STOP_COPY)
        pieces = await subject.read_to_end(size, PIECES)
        loaded = await subject.target.load(b"".join(pieces), (READ,))
        if not loaded.accepted:
            seen.append(f"a stream read in pieces of {size} bytes was {loaded}")
    together(seen)


@STATES.rule(
    "write-sizes",
    "A stream is taken in writes of every size, whatever sizes it was read in.",
    f"{_SET_STATE}: buffer segmentation need not be preserved",
)
async def write_sizes(subject: StatesSubject) -> None:
    data, _ = await subject.stream()
    seen = []
    for size in _sizes(data):
        loaded = await subject.target.load(data, (*[size] * PIECES, max(size, REST)))
        if not loaded.accepted:
            seen.append(f"a stream written in pieces of {size} bytes was {loaded}")
    together(seen)


# ---- sizes


async def _data_size(subject: StatesSubject) -> int:
    raw = await subject.access.feature(FeatureOperation.GET, Feature.MIG_DATA_SIZE, size=FEATURE_DATA_SIZE.size)
    return int(FEATURE_DATA_SIZE.unpack(raw)[0])


async def _require_data_size(subject: StatesSubject) -> None:
    """Raise :class:`NotTestable` where it is not told in any state."""
    refused = await refusal(_data_size(subject))
    if refused is not None and refused.errno == errno.ENOTTY:
        raise NotTestable("the driver does not have MIG_DATA_SIZE")


@STATES.rule(
    "data-size-states",
    "How much STOP_COPY will give can be asked in each state.",
    "linux/vfio.h, vfio_device_feature_mig_data_size",
)
async def data_size_states(subject: StatesSubject) -> None:
    await _require_data_size(subject)
    seen = []
    for state in subject.states:
        await subject.place(state)
        if refused := await refusal(_data_size(subject)):
            seen.append(f"in {state.name} it was refused with {named(refused)}")
    together(seen)


@STATES.rule(
    "data-size-told",
    "What is told of the size of STOP_COPY's data is of use: within a factor of two of what comes.",
    "linux/vfio.h, vfio_device_feature_mig_data_size: an estimate; the factor is ours",
)
async def data_size_told(subject: StatesSubject) -> str:
    await _require_data_size(subject)
    await subject.place(State.STOP)
    if (refused := await refusal(_data_size(subject))) is not None:
        raise NotTestable(f"in STOP it was refused with {named(refused)}")
    told = await _data_size(subject)
    await subject.go(State.STOP_COPY)
    came = sum(map(len, await subject.read_to_end()))
    if not near(told, came):
        raise Broken(f"{told} bytes were told, and {came} came")
    return f"{told} bytes were told, and {came} came"


async def _require_precopy_info(subject: StatesSubject) -> None:
    subject.require(State.PRE_COPY)
    if subject.name.startswith("vfio-user:"):
        raise NotTestable("vfio-user has no message for it")
    await subject.place(State.PRE_COPY)


@STATES.rule(
    "precopy-info", "In PRE_COPY and PRE_COPY_P2P, what is to come can be asked.", f"{_PRECOPY_INFO}: mandatory"
)
async def precopy_info(subject: StatesSubject) -> None:
    await _require_precopy_info(subject)
    seen = []
    for state in (one for one in PRE_COPY if one in subject.states):
        await subject.place(state)
        if refused := await refusal(subject.session().precopy_info()):
            seen.append(f"in {state.name} it was refused with {named(refused)}")
    together(seen)


@STATES.rule("precopy-info-refused", "In STOP_COPY, what PRE_COPY would give is not told: EINVAL.", _PRECOPY_INFO)
async def precopy_info_refused(subject: StatesSubject) -> None:
    await _require_precopy_info(subject)
    await subject.go(State.STOP_COPY)
    refused = await refusal(subject.session().precopy_info())
    if refused is None:
        raise Broken("in STOP_COPY it was answered")
    if refused.errno != errno.EINVAL:
        raise Broken(f"in STOP_COPY it was refused with {named(refused)}")


@STATES.rule(
    "precopy-told",
    "The initial bytes told are not 0 where PRE_COPY gives data, and fewer when that has been read.",
    _PRECOPY_INFO,
)
async def precopy_told(subject: StatesSubject) -> str:
    await _require_precopy_info(subject)
    if (refused := await refusal(subject.session().precopy_info())) is not None:
        raise NotTestable(f"it was refused with {named(refused)}")
    first = await subject.session().precopy_info()
    came = sum(map(len, await subject.read_to_end()))
    then = await subject.session().precopy_info()
    if came and not first.initial:
        raise Broken(f"no initial bytes were told, and {came} came")
    if first.initial and not then.reinit and then.initial >= first.initial:
        raise Broken(f"{first.initial} initial bytes were told, {came} came, and then {then.initial} were told")
    return f"{first.initial} initial and {first.dirty} dirty bytes were told, and {came} came"


@STATES.rule(
    "precopy-reinit",
    "New initial bytes are flagged only for a user that has opted in.",
    "linux/vfio.h, VFIO_DEVICE_FEATURE_MIG_PRECOPY_INFOv2: it makes the flags an output",
)
async def precopy_reinit(subject: StatesSubject) -> None:
    await _require_precopy_info(subject)
    if (refused := await refusal(subject.session().precopy_info())) is not None:
        raise NotTestable(f"it was refused with {named(refused)}")
    for _ in range(2):
        if (await subject.session().precopy_info()).reinit:
            raise Broken("REINIT was set, and nobody had opted in")
        await subject.read_to_end()
