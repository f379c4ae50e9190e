"""Records of devices: what is put down, the file, and replays of it."""

from __future__ import annotations

import errno
import io
import os
import resource
import stat
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any, get_args

import anyio
import anyio.lowlevel
import msgpack
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings, strategies as st

from tests.access_contract import AccessContract, FeatureContract, FeatureSubject, Subject
from tests.device_contract import PAGE, driver, drivers
from tests.recordings import (
    ADDRESS,
    Saved,
    Still,
    events,
    loading,
    outcome,
    record,
    recorded_and_replayed,
    saved_from,
    saving,
)
from tests.test_vendor_access import ReferenceFeatures, ReferenceSubject, featured
from tests.vendor_operations import CONTROL, MEMORY, PCI_CONFIG, SMALL as SMALL_DEVICE, VERSION
from vfiostream.access import open_access
from vfiostream.access.contract import Access
from vfiostream.access.record import SMALL, Recording, pieces_of_log, recorded
from vfiostream.access.record_format import (
    MAX_HEADER,
    MAX_PAYLOAD,
    MAX_WAITING,
    Answer,
    Bulk,
    Call,
    Event,
    Failed,
    Reader,
    bulk_of,
    encode,
    start,
)
from vfiostream.access.replay import open_replay
from vfiostream.devices import open_device
from vfiostream.devices.finding import find
from vfiostream.errors import (
    DeviceBroken,
    DeviceLost,
    DeviceRefused,
    DeviceTimeout,
    ReplayDiverged,
    UsageError,
    VfiostreamError,
)
from vfiostream.uapi.four_region import NATURAL, State
from vfiostream.uapi.vfio import MigrationState
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.inprocess import InProcessAccess
from vfiostream.vendor.server import Server
from vfiostream.vendor.settings import OPERATIONS, Fault, Interface, Operation, Settings

__all__ = ["featured"]  # a fixture

pytestmark = pytest.mark.anyio


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "device.record"


async def into(access: Access, index: int, offset: int, length: int) -> bytes:
    got = bytearray(length)
    await access.read_into(index, offset, memoryview(got))
    return bytes(got)


# ---- a recorded access is an access


class TestRecordedAccess(AccessContract):
    @pytest.fixture(params=["whole", "sparse", "none"])
    async def subject(self, request: pytest.FixtureRequest, path: Path) -> AsyncIterator[Subject]:
        device = ReferenceDevice(Settings(**{**SMALL_DEVICE, "memory_region": 64 * PAGE, "mmap": request.param}))
        async with await record(path, device) as access:
            yield ReferenceSubject(access, "none")  # whatever the device can: what is recorded is not mapped
        device.close()


class TestRecordedFeatures(FeatureContract):
    @pytest.fixture
    async def subject(self, featured: ReferenceDevice, path: Path) -> AsyncIterator[FeatureSubject]:
        async with await record(path, featured) as access:
            yield ReferenceFeatures(access, featured)


async def test_what_is_recorded_is_not_mapped(path: Path) -> None:
    with driver() as device:
        async with await record(path, device) as access:
            info = await access.region_info(MEMORY)
            assert info.mappable == ()
            assert await access.map(info) == ()
        (described,) = (event for event in events(path) if event.call.what == "region_info")
        assert described.answer is not None
        assert described.answer.result["mappable"] == [[0, info.size]]


@pytest.mark.parametrize("payloads", [True, False])
async def test_a_long_transfer_is_several_events(path: Path, payloads: bool) -> None:
    size = MAX_PAYLOAD + 5 * PAGE
    with driver(memory_region=size) as device:
        async with await record(path, device, payloads=payloads) as access:
            data = os.urandom(size - 9)
            await access.write(MEMORY, 5, data)
            assert await into(access, MEMORY, 5, size - 9) == data
    written = [event.call.bulk for event in events(path) if event.call.what == "write"]
    got = [event.answer.bulk for event in events(path) if event.call.what == "read" and event.answer is not None]
    for bulks in (written, got):
        kept = (data[:MAX_PAYLOAD], data[MAX_PAYLOAD:]) if payloads else (None, None)
        assert bulks == [
            Bulk(MAX_PAYLOAD, xxhash.xxh3_64_intdigest(data[:MAX_PAYLOAD]), kept[0]),
            Bulk(5 * PAGE - 9, xxhash.xxh3_64_intdigest(data[MAX_PAYLOAD:]), kept[1]),
        ]
    async with open_replay(path) as access:
        await access.write(MEMORY, 5, data)
        assert await into(access, MEMORY, 5, size - 9) == (data if payloads else bytes(size - 9))


def test_a_long_log_is_read_in_pieces() -> None:
    bitmap = memoryview(bytes(range(251)) * (2 * MAX_PAYLOAD // 251 + 8))[: 2 * MAX_PAYLOAD + 8]
    pages = len(bitmap) * 8 - 3
    pieces = list(pieces_of_log(0x1000, pages * PAGE, PAGE, bitmap))
    step = MAX_PAYLOAD * 8 * PAGE
    assert [(at, length) for at, length, _ in pieces] == [
        (0x1000, step),
        (0x1000 + step, step),
        (0x1000 + 2 * step, pages * PAGE - 2 * step),
    ]
    assert b"".join(piece for _, _, piece in pieces) == bitmap


async def test_what_is_kept_without_payloads(path: Path) -> None:
    with driver() as device:
        async with await record(path, device, payloads=False) as access:
            for index in (VERSION, PCI_CONFIG, MEMORY):
                await access.region_info(index)
            await into(access, VERSION, 0, PAGE)
            await into(access, PCI_CONFIG, 0, 256)
            await into(access, MEMORY, 0, SMALL)
            await into(access, MEMORY, 0, SMALL + 1)
    kept = [e.answer.bulk.data is not None for e in events(path) if e.answer and e.answer.bulk]
    assert kept == [True, True, True, False]


async def test_the_file_is_new_and_its_owners(path: Path) -> None:
    with driver() as device:
        async with await record(path, device):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        before = path.read_bytes()
        with pytest.raises(UsageError, match="no record can be made in .*: File exists; name a new file"):
            await record(path, device)
        assert path.read_bytes() == before
        with pytest.raises(UsageError, match="No such file"):
            await record(path.parent / "no" / "where", device)


async def test_a_device_that_cannot_be_opened(path: Path, tmp_path: Path) -> None:
    missing = f"vfio-user:{tmp_path / 'socket'}"
    with pytest.raises(DeviceLost) as real:
        await open_device(missing, recording=Recording(path))
    with pytest.raises(DeviceLost) as again:
        await open_device(f"replay:{path}")
    assert str(again.value) == str(real.value).replace(missing, f"replay:{path}", 1)


async def test_what_is_no_address_leaves_no_file(path: Path) -> None:
    with pytest.raises(UsageError, match="not the address"):
        await open_access("usb:1", recording=Recording(path))
    assert not path.exists()


async def test_a_question_is_in_the_file_before_it_is_asked(path: Path) -> None:
    seen: list[Event | None] = []

    class Looking(InProcessAccess):
        async def reset(self) -> None:
            with path.open("rb") as file:
                reader = Reader(file)
                seen.extend(iter(reader.next, None))
            await super().reset()

    with driver() as device:

        async def open_it() -> Access:
            return Looking(device)

        async with await recorded(ADDRESS, Recording(path), open_it) as access:
            await access.reset()
    last = seen[-1]
    assert last is not None
    assert (last.call.what, last.answer) == ("reset", None)


async def test_a_cancelled_call(path: Path) -> None:
    with driver() as device:
        async with await record(path, device) as access:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await access.reset()
            assert scope.cancelled_caught
            await access.write(CONTROL, NATURAL.device_state, struct.pack("<I", State.RUNNING))
    async with open_replay(path) as access:
        with pytest.raises(DeviceTimeout, match=r"event 2 of the record has no answer \(it was cancelled\): reset"):
            await access.reset()
        await access.write(CONTROL, NATURAL.device_state, struct.pack("<I", State.RUNNING))


async def test_calls_of_several_tasks_each_get_their_own_answer(path: Path) -> None:
    with driver() as device:
        region = device.regions[MEMORY].view
        assert region is not None
        region[:] = os.urandom(len(region))
        async with await record(path, device) as access:
            async with anyio.create_task_group() as tasks:
                for offset in range(MAX_WAITING):
                    tasks.start_soon(into, access, MEMORY, offset, 8)
        found = [event for event in events(path) if event.call.what == "read"]
        assert sorted(event.call.arguments["offset"] for event in found) == list(range(MAX_WAITING))
        for event in found:
            at = event.call.arguments["offset"]
            assert event.answer is not None
            assert event.answer.bulk is not None
            assert event.answer.bulk.data == region[at : at + 8]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing a file beyond ``size`` bytes fails with EFBIG: a disk that is full, as far as a program can tell."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def test_a_full_disk_ends_the_record_and_nothing_else(path: Path) -> None:
    with driver() as device, files_of_at_most(65 * PAGE):
        async with await find(await record(path, device)) as opened:
            assert opened.caveat is None
            saved: Saved = await saving()(opened, device)
            assert opened.caveat is not None
            assert f"the record in {path} is not whole" in opened.caveat
    assert len(saved.captures) == 4
    with path.open("rb") as file:
        reader = Reader(file)
        whole = list(iter(reader.next, None))
        assert reader.is_cut
    assert whole[0].call.what == "open"
    assert len(whole) > 20


# ---- a replay answers the same


INTERFACES: tuple[Interface, ...] = get_args(Interface)


@pytest.fixture(params=INTERFACES)
def interface(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


async def test_a_replay_gives_the_same(path: Path, interface: str) -> None:
    with driver(interface=interface) as device:
        first, again = await recorded_and_replayed(path, device, saving())
    assert first == again
    description, saved, resumed, _ = first
    assert description.interface == interface
    assert len(saved.captures) >= 4
    assert resumed is None


async def test_over_vfio_user(path: Path, tmp_path: Path, interface: str) -> None:
    with driver(interface=interface) as device:
        server = Server(device, str(tmp_path / "socket"))
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            first = await outcome(
                lambda: open_access(f"vfio-user:{tmp_path / 'socket'}", recording=Recording(path, True)),
                saving(),
                device,
            )
        finally:
            server.close()
            thread.join()
    assert first == await outcome(lambda: open_access(f"replay:{path}"), saving(), Still)
    assert isinstance(first[1], Saved)


@pytest.mark.parametrize("payloads", [True, False])
async def test_a_target(path: Path, interface: str, payloads: bool) -> None:
    with drivers({"interface": interface}, {"interface": interface}) as (here, there):
        first, again = await recorded_and_replayed(path, there, loading(await saved_from(here)), payloads=payloads)
    assert first == again
    assert first[1] is None


async def test_both_orders_of_a_session(path: Path) -> None:
    with driver() as device:
        async with await find(await record(path, device), order="posted") as source:
            saved = await saving()(source, device)
    async with await find(open_replay(path), order="posted") as source:
        assert await saving()(source, Still) == saved
    async with await find(open_replay(path), order="session") as source:
        with pytest.raises(ReplayDiverged, match="set device state|write 4 bytes"):
            await saving()(source, Still)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("interface", "operation"), [(spoken, operation) for spoken in INTERFACES for operation in OPERATIONS[spoken]]
)
async def test_a_replay_fails_the_same(path: Path, interface: Interface, operation: Operation, n: int) -> None:
    with driver(seed=1, interface=interface) as other:
        saved = await saved_from(other)
    effects: tuple[Any, ...] = (errno.EIO, "exit", "hang" if interface == "four-region" else "error")
    for number, effect in enumerate(effects):
        for name, flow in {"saving": saving(), "loading": loading(saved)}.items():
            with driver(interface=interface, faults=(Fault(operation, n, effect),)) as device:
                first, again = await recorded_and_replayed(path.with_name(f"{name}{number}.record"), device, flow)
            assert first == again


async def test_the_tests_of_faults_reach_them(path: Path) -> None:
    with driver(faults=(Fault(Operation.GET_MEMORY, 1, errno.EIO),)) as device:
        first, again = await recorded_and_replayed(path, device, saving())
    assert first[1][0] is again[1][0] is DeviceRefused
    assert again[1][1] == f"{ADDRESS}: the driver refused get memory chunk at 0 with EIO (Input/output error)"


@pytest.mark.parametrize("payloads", [True, False])
@pytest.mark.parametrize("cut", [300, 64 * 1024, 3 * PAGE + 1])
async def test_the_cut_of_a_transfer_may_differ(
    path: Path, tmp_path: Path, interface: str, cut: int, payloads: bool
) -> None:
    with drivers({"interface": interface}, {"interface": interface}) as (here, there):
        first, again = await recorded_and_replayed(path, here, saving(5 * PAGE), saving(cut), payloads=payloads)
        saved, replayed = first[1], again[1]
        stream, read = (b"".join(content for _, content in one.captures) for one in (saved, replayed))
        assert len(stream) == len(read)
        assert read == stream if payloads else not any(read)
        assert (saved.pci, len(saved.config)) == (replayed.pci, len(replayed.config))
        assert first[2:] == again[2:]
        if interface != "migration-states":  # whose rounds are our own
            assert [size for size, _ in saved.captures] == [size for size, _ in replayed.captures]
        first, again = await recorded_and_replayed(
            tmp_path / "there.record", there, loading(saved, 5 * PAGE), loading(saved, cut), payloads=payloads
        )
        assert first == again
        assert first[1] is None


async def test_a_round_that_ends_earlier_leaves_its_rest_to_the_next(path: Path) -> None:
    with driver(interface="migration-states") as device:
        async with await record(path, device) as access:
            data = await access.set_migration_state(MigrationState.PRE_COPY)
            assert data is not None
            got = memoryview(bytearray(3 * PAGE))
            whole = b""
            with pytest.raises(DeviceRefused) as ended:
                while count := await data.read_into([got]):
                    whole += got[:count]
            assert ended.value.errno == errno.ENOMSG
            await data.precopy_info()
    async with open_replay(path) as access:
        data = await access.set_migration_state(MigrationState.PRE_COPY)
        assert data is not None
        got = memoryview(bytearray(PAGE))
        await data.read_into([got])
        found = bytes(got)
        info = await data.precopy_info()
        assert info.dirty >= 0
        while len(found) < len(whole):
            found += got[: await data.read_into([got])]
        assert found == whole
        with pytest.raises(DeviceLost, match="the record ends"):
            await data.read_into([got])


async def test_other_bytes_to_load_are_another_question_where_the_record_has_them(
    path: Path, tmp_path: Path, interface: str
) -> None:
    with driver(seed=1, interface=interface) as here:
        saved = await saved_from(here)
    other = replace(saved, captures=[(size, bytes(len(content))) for size, content in saved.captures])
    for payloads, expected in ((False, None), (True, ReplayDiverged)):
        with driver(interface=interface) as there:
            _, again = await recorded_and_replayed(
                tmp_path / f"{payloads}.record", there, loading(saved), loading(other), payloads=payloads
            )
        assert again[1] is None if expected is None else again[1][0] is expected


# ---- and nothing else


async def recording_of(path: Path, *, payloads: bool = True) -> None:
    """Three reads of 8 bytes of the control region, a state, and 3 pages of memory in two pieces."""
    with driver() as device:
        async with await record(path, device, payloads=payloads) as access:
            for offset in (0, 8, 16):
                await into(access, PCI_CONFIG, offset, 8)
            await access.write(CONTROL, NATURAL.device_state, struct.pack("<I", State.RUNNING))
            await into(access, MEMORY, 0, 2 * PAGE)
            await into(access, MEMORY, 2 * PAGE, PAGE)


async def test_what_was_not_asked_then(path: Path) -> None:
    await recording_of(path)
    async with open_replay(path) as access:
        with pytest.raises(ReplayDiverged) as caught:
            await into(access, PCI_CONFIG, 0, 16)  # registers are not cut
        assert str(caught.value) == (
            f"replay:{path}: it was asked to read 16 bytes of region 7 at 0x0, where event 2 of the record is to read "
            "8 bytes of region 7 at 0x0; use it just as the device was used that was recorded"
        )
        for offset in (0, 8, 16):  # it goes on where it was
            await into(access, PCI_CONFIG, offset, 8)
        for wrong in (State.STOP, State.RUNNING_LOGGING):
            with pytest.raises(ReplayDiverged, match=r"where event 5 of the record is to write 4 bytes \(00000000\)"):
                await access.write(CONTROL, NATURAL.device_state, struct.pack("<I", wrong))
        with pytest.raises(ReplayDiverged, match="asked to reset, where event 5"):
            await access.reset()
        await access.write(CONTROL, NATURAL.device_state, struct.pack("<I", State.RUNNING))
        with pytest.raises(ReplayDiverged, match="asked to read 8192 bytes of region 11 at 0x1000"):
            await into(access, MEMORY, PAGE, 2 * PAGE)
        await into(access, MEMORY, 0, PAGE)
        with pytest.raises(ReplayDiverged, match="asked to read 4096 .* event 6 .*, of which 4096 bytes are done"):
            await into(access, MEMORY, 2 * PAGE, PAGE)
        with pytest.raises(ReplayDiverged, match="asked to reset, where event 6"):
            await access.reset()
        await into(access, MEMORY, PAGE, 2 * PAGE)
        with pytest.raises(DeviceLost, match=r"the record ends after event 8, and it was asked to write 4 bytes \("):
            await access.write(CONTROL, NATURAL.device_state, struct.pack("<I", State.RUNNING))


async def test_a_replay_says_what_it_is(path: Path) -> None:
    await recording_of(path)
    async with open_replay(path) as access:
        assert access.caveat == f"replay:{path} is a record of {ADDRESS} and no device"
    path.unlink()
    await recording_of(path, payloads=False)
    async with open_replay(path) as access:
        assert access.caveat is not None
        assert access.caveat.endswith("made without payloads: what it gave in more than 64 bytes is zeros here")


async def test_closing_a_replay(path: Path) -> None:
    await recording_of(path)
    access = open_replay(path)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await access.aclose()
    await access.aclose()
    with pytest.raises(DeviceLost, match="closed"):
        await into(access, PCI_CONFIG, 0, 8)


async def test_a_replay_can_be_recorded(path: Path, tmp_path: Path) -> None:
    await recording_of(path, payloads=False)
    copy = tmp_path / "copy.record"
    async with await open_access(f"replay:{path}", recording=Recording(copy)) as access:
        assert access.caveat is not None
        for offset in (0, 8, 16):
            await into(access, PCI_CONFIG, offset, 8)
    asked, again = ([event.call.arguments for event in events(file)[1:4]] for file in (path, copy))
    assert asked == again


async def test_what_is_no_record(tmp_path: Path) -> None:
    contents = {"empty": b"", "short": b"VFSREC\1", "other": b"a text of some length", "new": b"VFSREC\2\0"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UsageError, match="can't be replayed: it is (no record of a device|a record of version 2)"):
            await open_access(f"replay:{tmp_path / name}")
    os.mkfifo(tmp_path / "pipe")
    for what in ("pipe", "nothing", "."):
        with pytest.raises(UsageError, match="record"):
            await open_access(f"replay:{tmp_path / what}")


# ---- the file


def sealed(number: int, header: bytes, payload: bytes = b"") -> bytes:
    """An entry whose check values are right."""
    prefix = struct.pack("<IIQ", len(header), len(payload), xxhash.xxh3_64_intdigest(header, number))
    return prefix + struct.pack("<Q", xxhash.xxh3_64_intdigest(prefix, number)) + header + payload


def read_all(content: bytes) -> tuple[list[Event], bool]:
    reader = Reader(io.BytesIO(content))
    return list(iter(reader.next, None)), reader.is_cut


OPEN = {"address": "a:b", "software": "tests", "started": 1, "payloads": True}
INFO = {"is_pci": True, "can_reset": True, "num_regions": 14, "num_irqs": 5, "driver": "vfio-pci", "kernel": None}


def small_record() -> tuple[list[Event], bytes]:
    """A record with something of each kind, and its bytes."""
    read, written = bulk_of(b"r" * 100, keep=True), bulk_of(b"w" * 100, keep=False)
    made = [
        Event(Call(1, 0, "open", OPEN, None), Answer(7, INFO, None, None)),
        Event(Call(2, 10, "read", {"region": 1, "offset": 2, "size": 100}, None), Answer(8, {}, read, None)),
        Event(Call(3, 20, "write", {"region": 1, "offset": 2}, written), Answer(9, {}, None, None)),
        Event(
            Call(4, 30, "reset", {}, None),
            Answer(10, {}, None, Failed("DeviceRefused", "no", errno.EIO, "resetting the device", "")),
        ),
        Event(Call(5, 40, "close", {}, None), None),
    ]
    entries: list[Any] = []
    for event in made:
        entries.append(event.call)
        if event.answer is not None:
            entries.append(event)
    return made, start() + b"".join(b"".join(encode(n, entry)) for n, entry in enumerate(entries, 1))


def test_the_bytes_of_version_1() -> None:
    made, content = small_record()
    assert read_all(content) == (made, False)
    golden = (Path(__file__).parent / "golden" / "record.hex").read_text()
    assert content == bytes.fromhex(golden)  # a change here is a change of the format: it needs a new version number


def test_wherever_it_is_cut_all_before_that_is_there() -> None:
    made, content = small_record()
    for end in range(8, len(content)):
        found, _ = read_all(content[:end])
        assert [event.call for event in found] == [event.call for event in made[: len(found)]]
        assert [e.answer for e in found[:-1]] == [e.answer for e in made[: len(found)]][: max(0, len(found) - 1)]
    ends = {end for end in range(8, len(content)) if not read_all(content[:end])[1]}
    assert len(ends) == 9  # the file's start, and after each entry but the last


def test_every_byte_that_changes_is_found() -> None:
    made, content = small_record()
    for at in range(len(content)):
        for bit in (0x01, 0x80):
            damaged = bytearray(content)
            damaged[at] ^= bit
            with pytest.raises(ValueError, match="record|damaged"):
                read_all(bytes(damaged))
    assert made


def test_entries_that_are_left_out_swapped_or_repeated_are_found() -> None:
    _, content = small_record()
    first = sealed(1, msgpack.packb({"call": 1, "at": 0, "what": "open", "arguments": OPEN, "bulk": None}))
    assert read_all(start() + first)[0][0].call.what == "open"
    with pytest.raises(ValueError, match="entry 2"):
        read_all(start() + first + first)
    with pytest.raises(ValueError, match="entry 1"):
        read_all(start() + content[8 + len(first) :])


@pytest.mark.parametrize(
    ("header", "payload"), [(0, 0), (MAX_HEADER + 1, 0), (1, MAX_PAYLOAD + 1), ((1 << 32) - 1, (1 << 32) - 1)]
)
def test_lengths_beyond_the_limits_are_refused_before_they_are_used(header: int, payload: int) -> None:
    prefix = struct.pack("<IIQ", header, payload, 0)

    class Sparing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert 0 <= size <= 24
            return super().read(size)

    reader = Reader(Sparing(start() + prefix + struct.pack("<Q", xxhash.xxh3_64_intdigest(prefix, 1)) + bytes(100)))
    with pytest.raises(ValueError, match=r"entry 1\) has .* bytes \(the limits"):
        reader.next()


def test_a_call_that_never_ends_does_not_have_everything_read() -> None:
    calls = [Call(1, 0, "open", OPEN, None), *(Call(n, 0, "reset", {}, None) for n in range(2, MAX_WAITING + 3))]
    content = start() + b"".join(b"".join(encode(n, call)) for n, call in enumerate(calls, 1))
    with pytest.raises(ValueError, match="more than 64 calls were made while event 1 waited"):
        read_all(content)


_scalars = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.text(max_size=8) | st.binary()
_values = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def _mutated(draw: st.DrawFn, values: Any) -> Any:
    """``values`` with something in it that is something else, or not there."""
    if not isinstance(values, dict) or not values or draw(st.integers(0, 3)) == 0:
        return draw(_values)
    name = draw(st.sampled_from(sorted(values)))
    changed = dict(values)
    if draw(st.booleans()):
        changed[name] = _mutated(draw, values[name])
    elif draw(st.booleans()):
        del changed[name]
    else:
        changed[draw(st.text(max_size=4))] = draw(_values)
    return changed


@st.composite
def hostile(draw: st.DrawFn) -> bytes:
    """A record whose check values are right and whose entries need not be."""
    _, content = small_record()
    made, at, number = bytearray(start()), 8, 0
    while at < len(content):
        number += 1
        header_size, payload_size = struct.unpack_from("<II", content, at)
        header = content[at + 24 : at + 24 + header_size]
        payload = content[at + 24 + header_size :][:payload_size]
        at += 24 + header_size + payload_size
        match draw(st.sampled_from(["keep"] * 6 + ["mutate", "mutate", "bytes", "payload"])):
            case "mutate":
                header = msgpack.packb(_mutated(draw, msgpack.unpackb(header)))
            case "bytes":
                header = draw(st.binary(min_size=1, max_size=40))
            case "payload":
                payload = draw(st.binary(max_size=120))
        made += sealed(number, header, payload)
    return bytes(made)


def sentence(error: Exception) -> bool:
    return "\n" not in str(error) and len(str(error)) < 1000


@settings(max_examples=400, deadline=None)
@given(content=hostile())
def test_a_hostile_record_is_refused_with_a_sentence(content: bytes) -> None:
    refused: ValueError | None = None
    try:
        read_all(content)
    except ValueError as error:
        refused = error
    assert refused is None or sentence(refused)


async def used(access: Access) -> list[VfiostreamError]:
    """What is raised by a few calls that :func:`small_record` has, and some that it has not."""
    raised = []
    for _ in range(3):
        for call in (
            lambda: into(access, 1, 2, 100),
            lambda: access.write(1, 2, b"w" * 100),
            access.reset,
            lambda: access.region_info(1),
            access.version,
        ):
            try:
                await call()
            except VfiostreamError as error:
                raised.append(error)
    return raised


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=hostile())
async def test_a_hostile_replay_only_raises_what_a_device_raises(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        access = open_replay(path)
    except VfiostreamError:
        return
    async with access:
        assert all(map(sentence, await used(access)))


async def test_a_record_that_is_damaged_on_the_way(path: Path) -> None:
    await recording_of(path)
    content = bytearray(path.read_bytes())
    content[-PAGE] ^= 1
    path.write_bytes(content)
    async with open_replay(path) as access:
        for offset in (0, 8, 16):
            await into(access, PCI_CONFIG, offset, 8)
        await access.write(CONTROL, NATURAL.device_state, struct.pack("<I", State.RUNNING))
        with pytest.raises(DeviceBroken, match="can't be replayed any further: event 7 .* is damaged|makes no sense"):
            await into(access, MEMORY, 0, 3 * PAGE)
        with pytest.raises(DeviceBroken, match="can't be replayed any further"):
            await access.reset()


async def test_a_killed_recorder(path: Path) -> None:
    await recording_of(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: -3 * PAGE])
    async with open_replay(path) as access:
        for offset in (0, 8, 16):
            await into(access, PCI_CONFIG, offset, 8)
        await access.write(CONTROL, NATURAL.device_state, struct.pack("<I", State.RUNNING))
        with pytest.raises(DeviceTimeout, match=r"event 6 of the record has no answer \(the record ends before it\)"):
            await into(access, MEMORY, 0, 3 * PAGE)
        with pytest.raises(DeviceLost, match="the record ends in the middle of what follows event 6"):
            await access.reset()
