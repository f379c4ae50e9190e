"""Our four-region driver, by hand: what it shows, what it refuses, and that state moves between its devices."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import struct
from pathlib import Path

import pytest

from tests.kernel.conftest import MakeHolder, MakeMdev
from tests.kernel.four_region_device import (
    BITMAP,
    CONFIG,
    CONTROL,
    ID,
    MEMORY,
    MEMORY_BAR,
    PCI_CONFIG,
    REGISTERS,
    SCRATCH,
    VERSION,
    FourRegion,
    Kick,
    Register,
    Work,
    numbered,
    refused,
)
from tests.kernel.mdev import type_directory
from tests.kernel.raw_vfio import DEVICE_GET_IRQ_INFO, DEVICE_RESET, FEATURE_GET, Guest, Holder, call
from vfiostream.uapi.four_region import (
    MAX_VERSION,
    PAGE_SIZE,
    REGION_TYPE,
    VERSION_SUBTYPE,
    Action,
    Caps,
    State,
    Subtype,
)

KIB, MIB = 1 << 10, 1 << 20
IOVA = 0x1_0000_0000
BOTH = Caps.DEVICE_MEMORY | Caps.SYSTEM_MEMORY


def one(mdev: MakeMdev, holder: MakeHolder, name: str = "16M") -> FourRegion:
    return FourRegion(holder().open(mdev(f"four-region-{name}")))


# ---- what it shows


@pytest.mark.parametrize(
    ("name", "control", "sizes", "areas", "caps"),
    [
        ("16M", 72, (64 * KIB, 16 * MIB, 64 * KIB), 1, BOTH),
        ("16M-sparse", 72, (64 * KIB, 1 * MIB, 16 * KIB), 2, BOTH),
        ("16M-nomap", 72, (64 * KIB, 1 * MIB, 4 * KIB), 0, BOTH),
        ("16M-packed", 60, (1 * MIB, 4 * MIB, 64 * KIB), 1, BOTH),
        ("16M-small", 72, (64 * KIB, 64 * KIB, 4 * KIB), 1, BOTH),
        ("16M-untracked", 72, (64 * KIB, 16 * MIB, 0), 1, Caps.DEVICE_MEMORY),
        ("0M", 72, (64 * KIB, 0, 64 * KIB), 1, Caps.SYSTEM_MEMORY),
    ],
)
def test_regions(
    mdev: MakeMdev, holder: MakeHolder, name: str, control: int, sizes: tuple[int, ...], areas: int, caps: Caps
) -> None:
    device = one(mdev, holder, name)
    assert (device.device.flags, device.device.num_regions, device.device.num_irqs) == (3, 14, 5)
    assert device.regions[CONTROL].size == control
    assert device.regions[CONTROL].areas == ()
    for index, size in zip((CONFIG, MEMORY, BITMAP), sizes, strict=True):
        info = device.regions[index]
        assert (info.size, len(info.areas)) == (size, areas if size else 0)
        assert info.type == ((REGION_TYPE, index - CONTROL + Subtype.CONTROL) if size else None)
    version = device.regions[VERSION]
    assert (version.type, version.size) == ((1 << 31 | 0x5653, VERSION_SUBTYPE), MAX_VERSION)
    assert device.control(0, "<I") == 1
    assert device.control(8, "<I") == caps
    assert struct.unpack("<HH", device.device.read(device.regions[PCI_CONFIG], 0, 4)) == (0x5653, 2)
    assert device.register(Register.ID) == ID
    assert call(device.device.fd, DEVICE_GET_IRQ_INFO, "<IIII", 0, 1, 0)[3] == 0


def test_it_has_none_of_the_later_migration_states(mdev: MakeMdev, holder: MakeHolder) -> None:
    device = one(mdev, holder)
    for feature in range(13):
        with refused(errno.ENOTTY):
            device.device.feature(feature, FEATURE_GET, bytes(32))


def test_mappings(mdev: MakeMdev, holder: MakeHolder) -> None:
    device = one(mdev, holder, "16M-sparse")
    info = device.regions[MEMORY]
    assert info.areas == ((4 * KIB, 508 * KIB), (516 * KIB, 508 * KIB))
    for offset, length in info.areas:
        device.device.map(info, offset, length)[:8] = b"abcdefgh"
        assert device.device.read(info, offset, 8) == b"abcdefgh"
    for offset, length in ((0, info.size), (0, 4 * KIB), (508 * KIB, 8 * KIB), (1020 * KIB, 8 * KIB)):
        with refused(errno.EINVAL):
            device.device.map(info, offset, length)
    with refused(errno.EINVAL):
        device.device.map(info, *info.areas[0], shared=False)
    for index in (CONTROL, REGISTERS, PCI_CONFIG, VERSION):
        with refused(errno.EINVAL):
            device.device.map(device.regions[index], 0, 4 * KIB)


def test_accesses_that_leave_a_region_or_miss_a_field(mdev: MakeMdev, holder: MakeHolder) -> None:
    device = one(mdev, holder)
    for info in device.regions:
        with refused(errno.EINVAL):
            device.device.read(info, info.size, 1)
        with refused(errno.EINVAL):
            device.device.write(info, max(info.size, 4) - 4, bytes(8))
    with refused(errno.EINVAL):
        os.pread(device.device.fd, 8, device.regions[-1].offset + (1 << 40))
    for offset, count in ((0, 8), (4, 8), (12, 4), (20, 4), (24, 4), (25, 8), (0, 1), (56, 16)):
        with refused(errno.EINVAL):
            device.device.read(device.regions[CONTROL], offset, count)
    for offset, count in ((0, 4), (8, 4), (16, 8), (24, 4), (40, 16), (4, 1), (0, 72)):
        with refused(errno.EINVAL):
            device.device.write(device.regions[CONTROL], offset, bytes(count))


def test_version_as_an_attribute_of_the_type(mdev: MakeMdev, holder: MakeHolder) -> None:
    versions = {name: type_directory(f"four-region-{name}") / "version" for name in ("16M", "16M-next", "64M", "0M")}
    read = {name: path.read_text() for name, path in versions.items()}
    assert read["16M"] == "vfiostream-four-region,generation=1,memory=16777216,config=32768\n"
    taken = {
        (mine, theirs) for mine, theirs in itertools.product(versions, repeat=2) if write(versions[mine], read[theirs])
    }
    assert taken == {(name, name) for name in versions} | {("16M-next", "16M")}
    assert not write(versions["16M"], read["16M"][:-2])

    device = one(mdev, holder, "16M-next")
    region = device.regions[VERSION]
    assert device.device.read(region, 0, MAX_VERSION).rstrip(b"\0").decode() == read["16M-next"].rstrip()
    device.device.write(region, 0, read["16M"].rstrip().encode())
    for offset, text in ((0, read["64M"].rstrip()), (1, read["16M"].rstrip())):
        with refused(errno.EINVAL):
            device.device.write(region, offset, text.encode())


def write(path: Path, text: str) -> bool:
    """Whether the attribute takes the text."""
    try:
        path.write_text(text)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def test_pci_config_space_keeps_what_a_guest_may_write(mdev: MakeMdev, holder: MakeHolder) -> None:
    device = one(mdev, holder)
    info = device.regions[PCI_CONFIG]
    device.device.write(info, 0, b"\xff" * 256)
    got = device.device.read(info, 0, 64)
    assert got[:4] == struct.pack("<HH", 0x5653, 2)
    command, bar0, bar2 = struct.unpack("<H10xI4xI", got[4:28])
    assert command == 0x0546
    assert (bar0, bar2) == (0x1_0000_0000 - 16 * MIB, 0x1_0000_0000 - 32 * KIB)
    fcntl.ioctl(device.device.fd, DEVICE_RESET)
    assert device.device.read(info, 4, 2) == bytes(2)


# ---- states and captures


def test_all_transitions(mdev: MakeMdev, holder: MakeHolder) -> None:
    device = one(mdev, holder, "0M")
    for before, after in itertools.permutations(State, 2):
        device.set_state(before)
        device.set_state(after)
        assert device.register(Register.STATE) == after
    with refused(errno.EINVAL):
        device.set_state(4)


def test_captures_hold_what_was_written_since(mdev: MakeMdev, holder: MakeHolder) -> None:
    device = one(mdev, holder)
    whole = PAGE_SIZE + 16 * MIB
    assert device.capture() == whole
    assert device.capture() == whole
    device.set_state(State.RUNNING_LOGGING)
    assert len(device.take_capture()) == whole  # the one before was not fetched
    assert device.capture() == 0

    device.poke(5 * PAGE_SIZE - 1, b"ab")
    device.kick(Kick.DEVICE, length=3 * PAGE_SIZE, pattern=77, offset=100 * PAGE_SIZE)
    bar = device.device.map(device.regions[MEMORY_BAR], 0, 16 * MIB)
    assert bar[100 * PAGE_SIZE : 103 * PAGE_SIZE] == numbered(77, 3)
    bar[300 * PAGE_SIZE] = 1
    assert device.capture() == 7 * PAGE_SIZE
    assert device.capture() == 7 * PAGE_SIZE  # again, as nobody fetched it
    bar[301 * PAGE_SIZE] = 1  # of the same mapping, which the capture has to have taken back
    data = device.take_capture()
    assert len(data) == 8 * PAGE_SIZE
    assert data[3 * PAGE_SIZE : 6 * PAGE_SIZE] == numbered(77, 3)
    assert bar[302 * PAGE_SIZE] == bar[302 * PAGE_SIZE]  # reading dirties nothing
    bar[300 * PAGE_SIZE] = 2
    device.set_state(State.STOP_LOGGING)
    assert len(device.take_capture()) == 2 * PAGE_SIZE
    device.set_state(State.STOP)
    assert device.capture() == whole


def test_a_page_written_while_its_capture_is_fetched_comes_again(mdev: MakeMdev, holder: MakeHolder) -> None:
    device = one(mdev, holder, "16M-sparse")
    device.set_state(State.RUNNING_LOGGING)
    size = device.capture()
    device.fetch(0)
    device.poke(0, b"x")
    for pos in range(MIB, size, MIB):
        device.fetch(pos)
    assert device.capture() == 2 * PAGE_SIZE
    for pos in (1, MIB, 3 * MIB):
        with refused(errno.EINVAL):
            device.fetch(pos)


# ---- guest memory


def test_dma_and_dirty_bitmap(mdev: MakeMdev, holder: MakeHolder) -> None:
    within, guest = holder(), Guest(MIB)
    device = FourRegion(within.open(mdev("four-region-16M-small")))
    within.dma_map(IOVA, guest)
    device.kick(Kick.GUEST, iova=IOVA, length=2 * PAGE_SIZE, pattern=5)
    assert guest.memory[: 3 * PAGE_SIZE] == numbered(5, 2) + bytes(PAGE_SIZE)
    assert device.dirty_pages(IOVA, 256) == set()  # not under LOGGING

    device.set_state(State.RUNNING_LOGGING)
    device.kick(Kick.GUEST, iova=IOVA + 7 * PAGE_SIZE, length=3 * PAGE_SIZE, pattern=9)
    device.kick(Kick.TO_GUEST, iova=IOVA + 255 * PAGE_SIZE, length=PAGE_SIZE, offset=PAGE_SIZE)
    assert guest.memory[255 * PAGE_SIZE :] == device.memory[PAGE_SIZE : 2 * PAGE_SIZE]
    assert device.dirty_pages(IOVA + 8 * PAGE_SIZE, 5) == {0, 1}
    assert device.dirty_pages(IOVA, 256) == {7, 255}
    assert device.dirty_pages(IOVA, 256) == set()

    guest.memory[:PAGE_SIZE] = b"\x11" * PAGE_SIZE
    device.kick(Kick.FROM_GUEST, iova=IOVA, length=PAGE_SIZE, offset=8 * PAGE_SIZE)
    assert device.memory[8 * PAGE_SIZE : 9 * PAGE_SIZE] == b"\x11" * PAGE_SIZE
    assert device.dirty_pages(IOVA, 256) == set()

    device.kick(Kick.GUEST, iova=IOVA, length=PAGE_SIZE)
    device.set_state(State.STOP_LOGGING)
    # As two writes, which a driver has to take as well.
    device.control(device.layout.start_addr, "<Q", IOVA)
    device.control(device.layout.page_nr, "<Q", 8)
    assert device.device.read(device.regions[BITMAP], 0, 1) == b"\x01"
    for start, pages in ((IOVA, 0), (IOVA, 8 * 4 * KIB + 1), (IOVA + 1, 1), ((1 << 64) - PAGE_SIZE, 2)):
        with refused(errno.EINVAL):
            device.dirty_pages(start, pages)
    with refused(errno.EBUSY):
        device.kick(Kick.GUEST, iova=IOVA, length=PAGE_SIZE)
    device.set_state(State.RUNNING_LOGGING)
    device.kick(Kick.GUEST, iova=IOVA, length=PAGE_SIZE)
    device.set_state(State.RUNNING)
    device.set_state(State.RUNNING_LOGGING)
    assert device.dirty_pages(IOVA, 8) == set()  # of another session


def test_dma_goes_only_where_memory_is_mapped(mdev: MakeMdev, holder: MakeHolder) -> None:
    within, guest = holder(), Guest(64 * KIB)
    device = FourRegion(within.open(mdev("four-region-16M")))
    for iova in (0, IOVA):
        with refused(errno.EINVAL, errno.ENOENT):
            device.kick(Kick.GUEST, iova=iova, length=PAGE_SIZE)
    within.dma_map(IOVA, guest, writable=False)
    with refused(errno.EPERM):
        device.kick(Kick.GUEST, iova=IOVA, length=PAGE_SIZE)
    device.kick(Kick.FROM_GUEST, iova=IOVA, length=PAGE_SIZE)
    assert device.memory[:PAGE_SIZE] == bytes(PAGE_SIZE)
    within.dma_unmap(IOVA, guest.size)
    with refused(errno.EINVAL, errno.ENOENT):
        device.kick(Kick.FROM_GUEST, iova=IOVA, length=PAGE_SIZE)


def test_workload_writes_both_memories_and_rests_in_stop(mdev: MakeMdev, holder: MakeHolder) -> None:
    within, guest = holder(), Guest(MIB)
    device = FourRegion(within.open(mdev("four-region-16M")))
    within.dma_map(IOVA, guest)
    device.set_state(State.RUNNING_LOGGING)
    device.take_capture()
    device.set_register(Register.IOVA, IOVA)
    device.set_register(Register.LENGTH, guest.size)
    device.set_register(Register.RATE, 100_000)
    device.set_register(Register.WORK, Work.DEVICE | Work.GUEST)
    while device.register(Register.WRITTEN) < 1000:
        os.sched_yield()
    device.set_state(State.STOP_LOGGING)
    written = device.register(Register.WRITTEN)
    memory, data = bytes(guest.memory), device.take_capture()
    dirty = device.dirty_pages(IOVA, 256)
    assert dirty == {page for page in range(256) if any(memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE])}
    assert len(dirty) > 200
    assert len(data) > 500 * PAGE_SIZE
    assert device.capture() == 0
    assert (device.register(Register.WRITTEN), device.register(Register.FAILED)) == (written, 0)
    device.set_state(State.RUNNING)
    while device.register(Register.WRITTEN) == written:
        os.sched_yield()


# ---- moving


def move(source: FourRegion, target: FourRegion) -> None:
    """As the interface has it: rounds while the source runs, the rest in STOP, the config last."""
    target.set_state(State.STOP)
    source.set_state(State.RUNNING_LOGGING)
    rounds = 3 if source.regions[MEMORY].size else 0
    for _ in range(rounds):
        target.load_capture(source.take_capture())
    source.set_state(State.STOP_LOGGING)
    if rounds:
        target.load_capture(source.take_capture())
    target.load_config(source.take_config())
    source.set_state(State.STOP)
    assert target.memory == source.memory
    assert target.scratch == source.scratch
    target.set_state(State.RUNNING)


@pytest.mark.parametrize("together", [True, False], ids=["one holder", "two holders"])
@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("16M", "16M"),
        ("16M", "16M-sparse"),
        ("16M-sparse", "16M-packed"),
        ("16M-packed", "16M-nomap"),
        ("16M-nomap", "16M-small"),
        ("64M", "64M-sparse"),
        ("0M", "0M"),
    ],
)
def test_state_moves_while_the_source_is_busy(
    mdev: MakeMdev, holder: MakeHolder, source: str, target: str, *, together: bool
) -> None:
    first = holder()
    one = FourRegion(first.open(mdev(f"four-region-{source}")))
    other = FourRegion((first if together else holder()).open(mdev(f"four-region-{target}")))
    if source != "0M":
        assert one.memory != other.memory
    one.device.write(one.regions[REGISTERS], SCRATCH, os.urandom(28 * KIB))
    one.set_register(Register.RATE, 50_000)
    one.set_register(Register.WORK, Work.DEVICE)
    while not one.register(Register.WRITTEN):
        os.sched_yield()
    move(one, other)
    while other.register(Register.WRITTEN) == one.register(Register.WRITTEN):
        os.sched_yield()  # the workload is part of the state: it goes on there


def stopped(within: Holder, mdev: MakeMdev, name: str = "16M") -> FourRegion:
    device = FourRegion(within.open(mdev(f"four-region-{name}")))
    device.set_state(State.STOP)
    return device


def test_loading_is_for_stop(mdev: MakeMdev, holder: MakeHolder) -> None:
    device = one(mdev, holder)
    for state in (State.RUNNING, State.RUNNING_LOGGING, State.STOP_LOGGING):
        device.set_state(state)
        with refused(errno.EBUSY):
            device.announce(PAGE_SIZE)
        with refused(errno.EBUSY):
            device.load_chunk(0, bytes(PAGE_SIZE))
        with refused(errno.EBUSY):
            device.control(device.layout.config_size, "<Q", 100)
        with refused(errno.EBUSY):
            device.control(device.layout.config_action, "<I", Action.SET_BUFFER)
    device.set_state(State.STOP)
    with refused(errno.ENOSPC):
        device.announce(16 * MIB + 2 * PAGE_SIZE)
    with refused(errno.ENOSPC):
        device.control(device.layout.config_size, "<Q", 64 * KIB + 1)
    with refused(errno.EINVAL):
        device.load_chunk(0, bytes(PAGE_SIZE))  # nothing was announced
    for offset in (device.layout.config_action, device.layout.memory_action):
        with refused(errno.EINVAL):
            device.control(offset, "<I", Action.GET_BITMAP)


def test_a_load_that_was_begun_keeps_the_device_in_stop(mdev: MakeMdev, holder: MakeHolder) -> None:
    within = holder()
    source = FourRegion(within.open(mdev("four-region-16M")))
    target = stopped(within, mdev)
    data = source.take_capture()
    target.announce(len(data))
    for state in (State.RUNNING, State.STOP_LOGGING, State.RUNNING_LOGGING):
        with refused(errno.EINVAL):
            target.set_state(state)
    target.set_state(State.STOP)
    with refused(errno.EINVAL):
        target.load_config(source.take_config())  # before the memory
    with refused(errno.EINVAL):
        target.announce(0)
    fcntl.ioctl(target.device.fd, DEVICE_RESET)
    assert target.register(Register.STATE) == State.RUNNING


@pytest.mark.parametrize(
    ("at", "byte", "number"),
    [
        (0, 0, errno.EINVAL),  # magic
        (8, 9, errno.EINVAL),  # kind
        (12, 1, errno.EINVAL),  # ordinal
        (27, 1, errno.ENOSPC),  # memory, larger
        (32, 1, errno.EINVAL),  # pages
        (44, 0xAA, errno.EBADMSG),  # checksum
        (48, 0xFE, errno.EBADMSG),  # bits
        (4000, 1, errno.EBADMSG),  # padding
    ],
)
def test_garbage_is_refused_and_the_load_can_begin_again(
    mdev: MakeMdev, holder: MakeHolder, at: int, byte: int, number: int
) -> None:
    within = holder()
    source = FourRegion(within.open(mdev("four-region-16M")))
    target = stopped(within, mdev, "16M-sparse")
    good, before = source.take_capture(), target.memory
    bad = bytearray(good)
    bad[at] = byte if bad[at] != byte else byte ^ 0x55
    with refused(number):
        target.load_capture(bytes(bad))
    assert target.memory == before
    with refused(errno.EINVAL):
        target.load_chunk(0, good[:MIB])  # nothing is due
    target.load_capture(good)
    target.load_config(source.take_config())
    target.set_state(State.RUNNING)
    assert target.memory == source.memory


def test_order_of_chunks_captures_and_config(mdev: MakeMdev, holder: MakeHolder) -> None:
    within = holder()
    source = FourRegion(within.open(mdev("four-region-16M")))
    target = stopped(within, mdev, "16M-sparse")
    source.set_state(State.RUNNING_LOGGING)
    first = source.take_capture()
    target.announce(len(first))
    with refused(errno.EINVAL):
        target.load_chunk(MIB, first[:MIB])
    target.load_chunk(0, first[:MIB])  # a wrong position does no harm
    for pos in (0, 2 * MIB, MIB + PAGE_SIZE):
        with refused(errno.EINVAL):
            target.load_chunk(pos, first[MIB : 2 * MIB])
    for pos in range(MIB, len(first), MIB):
        target.load_chunk(pos, first[pos : pos + MIB])
    captures = []
    for page in range(3):
        source.poke(page * PAGE_SIZE, b"!")
        captures.append(source.take_capture())
    source.set_state(State.STOP_LOGGING)
    config = source.take_config()
    target.load_capture(captures[0])
    with refused(errno.EINVAL):
        target.load_capture(captures[2])  # one is missing, and now all are
    for data in (first, *captures[:2]):
        target.load_capture(data)
    with refused(errno.EINVAL):
        target.load_config(config)
    target.load_capture(captures[2])
    with refused(errno.EINVAL):
        target.load_config(config[:-1])
    with refused(errno.EBADMSG):
        target.load_config(config[:-1] + b"?")
    target.load_config(config)
    assert target.memory == source.memory


def test_a_session_that_was_left_behind_ends_with_running(mdev: MakeMdev, holder: MakeHolder) -> None:
    made = mdev("four-region-16M")
    within = holder()
    device = FourRegion(within.open(made))
    device.set_state(State.RUNNING_LOGGING)
    before = device.take_capture()
    within.close()
    device = FourRegion(holder().open(made))
    assert device.register(Register.STATE) == State.RUNNING_LOGGING
    assert device.memory == before[PAGE_SIZE:]
    device.set_state(State.RUNNING)
    device.set_state(State.RUNNING_LOGGING)
    assert device.capture() == len(before)
