"""Guest memory: what can be mapped, in which order, and who closes it."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from vfiostream.errors import UsageError
from vfiostream.guest import PAGE_SIZE, Guest, GuestRange


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def _no_fd_leaks() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


@contextmanager
def memfd(size: int) -> Iterator[int]:
    """A descriptor that the test closes: whatever failed must not have closed it."""
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def made_range(address: int, pages: int = 1, name: str = "") -> GuestRange:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, pages * PAGE_SIZE)
    return GuestRange(address, pages * PAGE_SIZE, fd, name or f"memory at {address:#x}")


def file_of(folder: Path, name: str, size: int) -> Path:
    path = folder / name
    path.touch()
    os.truncate(path, size)
    return path


# ---- ranges


def test_a_range_is_the_file_itself() -> None:
    area = made_range(0x10000, 2)
    area.view[PAGE_SIZE : PAGE_SIZE + 2] = b"hi"
    assert os.pread(area.fd, 2, PAGE_SIZE) == b"hi"
    assert area.pages == 2
    area.close()
    area.close()


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (1, PAGE_SIZE),
        (-PAGE_SIZE, PAGE_SIZE),
        (0, 0),
        (0, -PAGE_SIZE),
        (0, PAGE_SIZE + 1),
        (1 << 64, PAGE_SIZE),
        ((1 << 64) - PAGE_SIZE, 2 * PAGE_SIZE),
    ],
)
def test_addresses_and_lengths_that_can_not_be(address: int, length: int) -> None:
    words = (
        r"guest memory ram at .* bytes: (address and length must be multiples of 4096|it must lie between 0 and 2\^64)"
    )
    with memfd(4 * PAGE_SIZE) as fd, pytest.raises(UsageError, match=words):
        GuestRange(address, length, fd, "ram")


def test_the_last_page_of_the_address_space() -> None:
    made_range((1 << 64) - PAGE_SIZE).close()


@pytest.mark.parametrize("length", [2 * PAGE_SIZE, 1 << 63])
def test_a_file_shorter_than_its_range(length: int) -> None:
    with (
        memfd(PAGE_SIZE) as fd,
        pytest.raises(UsageError, match=rf"ram at 0x0 has {length} bytes, but its file holds 4096"),
    ):
        GuestRange(0, length, fd, "ram")


def test_a_descriptor_that_can_only_be_read(tmp_path: Path) -> None:
    fd = os.open(file_of(tmp_path, "ram", PAGE_SIZE), os.O_RDONLY | os.O_CLOEXEC)
    try:
        with pytest.raises(UsageError, match=r"guest memory ram can't be mapped \(Permission denied\)"):
            GuestRange(0, PAGE_SIZE, fd, "ram")
    finally:
        os.close(fd)


def test_a_descriptor_that_is_none() -> None:
    with pytest.raises(UsageError, match=r"guest memory ram can't be mapped \(Bad file descriptor\)"):
        GuestRange(0, PAGE_SIZE, -1, "ram")


# ---- guests


def test_ranges_are_in_the_order_of_their_addresses() -> None:
    with Guest([made_range(0x8000), made_range(0), made_range(0x4000)]) as guest:
        assert [area.address for area in guest.ranges] == [0, 0x4000, 0x8000]


def test_ranges_may_touch() -> None:
    with Guest([made_range(PAGE_SIZE), made_range(0)]) as guest:
        assert len(guest.ranges) == 2


def test_ranges_that_overlap_stay_the_callers() -> None:
    ranges = [made_range(0x1000, 1, "high"), made_range(0, 2, "low")]
    with pytest.raises(UsageError, match="low and high overlap at 0x1000"):
        Guest(ranges)
    for area in ranges:
        area.view[0] = 1
        area.close()


def test_a_guest_closes_its_ranges_once() -> None:
    guest = Guest([made_range(0), made_range(0x10000)])
    guest.close()
    with memfd(PAGE_SIZE):  # gets the number of one that was closed
        guest.close()
    with pytest.raises(ValueError, match="released"):
        guest.ranges[0].view[0]


# ---- files


def test_files_are_mapped_whole(tmp_path: Path) -> None:
    low, high = file_of(tmp_path, "low", 3 * PAGE_SIZE), file_of(tmp_path, "high", PAGE_SIZE)
    with Guest.open([(0x10000, high), (0, low)]) as guest:
        assert [(area.address, area.length, area.name) for area in guest.ranges] == [
            (0, 3 * PAGE_SIZE, str(low)),
            (0x10000, PAGE_SIZE, str(high)),
        ]
        guest.ranges[1].view[:2] = b"hi"
        assert high.read_bytes()[:2] == b"hi"


def test_no_files() -> None:
    with Guest.open([]) as guest:
        assert guest.ranges == ()


def nothing(folder: Path) -> Path:
    return folder / "none"


def a_folder(folder: Path) -> Path:
    (folder / "folder").mkdir()
    return folder / "folder"


def an_empty_file(folder: Path) -> Path:
    return file_of(folder, "empty", 0)


def half_a_page(folder: Path) -> Path:
    return file_of(folder, "odd", PAGE_SIZE + PAGE_SIZE // 2)


def a_fifo(folder: Path) -> Path:
    os.mkfifo(folder / "fifo")
    return folder / "fifo"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (nothing, r"can't be opened \(No such file or directory\).*truncate"),
        (a_folder, r"can't be opened \(Is a directory\)"),
        (an_empty_file, "at 0x10000 has 0 bytes"),
        (half_a_page, "at 0x10000 has 6144 bytes"),
        (a_fifo, "at 0x10000 has 0 bytes"),
    ],
)
def test_what_is_no_file_of_guest_memory(make: Callable[[Path], Path], words: str, tmp_path: Path) -> None:
    path, good = make(tmp_path), file_of(tmp_path, "good", PAGE_SIZE)
    with pytest.raises(UsageError, match=words) as raised:
        Guest.open([(0, good), (0x10000, path)])
    assert str(path) in str(raised.value)


def test_files_that_overlap(tmp_path: Path) -> None:
    low, high = file_of(tmp_path, "low", 2 * PAGE_SIZE), file_of(tmp_path, "high", PAGE_SIZE)
    with pytest.raises(UsageError, match=r"/low and .*/high overlap at 0x1000"):
        Guest.open([(PAGE_SIZE, high), (0, low)])


# ---- pages that are there, and holes


F_SEAL_FUTURE_WRITE = 0x10
"""fcntl.h, Linux 5.1; Python 3.11 has no name for it."""


def held(area: GuestRange) -> int:
    """Bytes that the file really holds."""
    return os.fstat(area.fd).st_blocks * 512


def test_a_file_that_is_appended_to_is_written_in_its_place() -> None:
    with Guest([made_range(0, 4)]) as guest:
        (area,) = guest.ranges
        fcntl.fcntl(area.fd, fcntl.F_SETFL, os.O_APPEND)
        with Guest([GuestRange(0, area.length, os.dup(area.fd), "appended to")]) as other:
            other.ranges[0].write(PAGE_SIZE, b"x" * PAGE_SIZE)
        assert bytes(area.view) == bytes(PAGE_SIZE) + b"x" * PAGE_SIZE + bytes(2 * PAGE_SIZE)


def test_memory_is_made_present() -> None:
    with Guest([made_range(0, 8)]) as guest:
        (area,) = guest.ranges
        area.view[0] = 7
        assert (held(area), area.present) == (PAGE_SIZE, 0)
        area.make_present()
        assert (held(area), area.present) == (area.length, area.length)
        assert bytes(area.view) == b"\x07" + bytes(area.length - 1)


def test_what_is_written_through_the_file_is_in_the_memory() -> None:
    with Guest([made_range(0, 8)]) as guest:
        (area,) = guest.ranges
        area.write(2 * PAGE_SIZE, b"x" * 2 * PAGE_SIZE)
        assert held(area) == 2 * PAGE_SIZE
        assert bytes(area.view) == bytes(2 * PAGE_SIZE) + b"x" * 2 * PAGE_SIZE + bytes(4 * PAGE_SIZE)


def test_a_file_that_takes_no_writes_is_written_in_the_mapping() -> None:
    fd = os.memfd_create("guest", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4 * PAGE_SIZE)
    with Guest([GuestRange(0, 4 * PAGE_SIZE, fd, "sealed")]) as guest:
        # Mapped before, and written no more after, as huge pages and devices are.
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)
        (area,) = guest.ranges
        for start in (PAGE_SIZE, 3 * PAGE_SIZE):
            area.write(start, b"x" * PAGE_SIZE)
        assert bytes(area.view) == (bytes(PAGE_SIZE) + b"x" * PAGE_SIZE) * 2


def test_zeros_leave_holes_and_touch_nothing_else() -> None:
    block = PAGE_SIZE
    with Guest([made_range(0, 8)]) as guest:
        (area,) = guest.ranges
        for n in (1, 2, 5):
            area.view[n * block : (n + 1) * block] = b"x" * block
        assert [area.is_hole(n * block, block) for n in range(8)] == [n not in (1, 2, 5) for n in range(8)]
        assert area.is_hole(6 * block, 2 * block)
        assert not area.is_hole(4 * block, 2 * block)
        area.zero(2 * block, 6 * block)
        assert held(area) == 3 * block
        # Not through the mapping: reading that would fill the holes.
        assert os.pread(area.fd, area.length, 0) == bytes(block) + b"x" * block + bytes(6 * block)
        area.zero(0, area.length)
        assert held(area) == 3 * block
        assert not any(os.pread(area.fd, area.length, 0))


def test_a_file_on_disk_is_zeroed_too(tmp_path: Path) -> None:
    with Guest.open([(0, file_of(tmp_path, "memory", 2 * PAGE_SIZE))]) as guest:
        (area,) = guest.ranges
        area.view[:] = b"x" * area.length
        area.zero(0, PAGE_SIZE)
        assert bytes(area.view) == bytes(PAGE_SIZE) + b"x" * PAGE_SIZE
