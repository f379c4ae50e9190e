"""Whole migrations on a kernel's real VFIO: between devices, between network namespaces, with the command line."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TypeAlias, TypeVar

import anyio
import pytest

import vfiostream
from tests.kernel.conftest import MakeMdev
from tests.kernel.four_region_device import MEMORY_BAR, REGISTERS, SCRATCH, Kick, Register, Work
from tests.kernel.mdev import Mdev
from tests.movers import contents, guest
from vfiostream.access import open_access
from vfiostream.access.contract import Access
from vfiostream.devices.contract import Device
from vfiostream.devices.finding import find
from vfiostream.errors import Incompatible
from vfiostream.guest import Guest, GuestRange
from vfiostream.policy import Precopy
from vfiostream.transports.memory import memory_pair
from vfiostream.uapi.four_region import State

pytestmark = pytest.mark.anyio
PAGE = 4096
IOVA = 0x1_0000_0000
GUEST = 256 * PAGE
MTTY_SCRATCH = 7
"""Register of mtty's serial port that keeps what is written."""
SCRIPT = Path(sys.executable).parent / "vfiostream"

T = TypeVar("T")
Address: TypeAlias = Callable[[Mdev], str]


@pytest.fixture(params=["group", "node"])
def address(request: pytest.FixtureRequest) -> Address:
    """The two ways to a device, as addresses that force each."""
    if request.param == "group":
        return lambda mdev: f"vfio:{mdev.group.name}/{mdev.uuid}"
    return lambda mdev: f"vfio:{mdev.cdev}"


class Board:
    """A device of the four-region driver: its registers and memory beside the interface."""

    def __init__(self, access: Access, device: Device) -> None:
        self.access = access
        self.device = device

    async def read(self, region: int, offset: int, size: int) -> bytes:
        into = bytearray(size)
        await self.access.read_into(region, offset, memoryview(into))
        return bytes(into)

    async def memory(self) -> bytes:
        return await self.read(MEMORY_BAR, 0, (await self.access.region_info(MEMORY_BAR)).size)

    async def register(self, which: Register) -> int:
        value: int = struct.unpack("<Q", await self.read(REGISTERS, which, 8))[0]
        return value

    async def set(self, which: Register, value: int) -> None:
        await self.access.write(REGISTERS, which, struct.pack("<Q", value))

    async def work(self, rate: int) -> None:
        """Change so many pages a second of device and guest memory, from now on."""
        await self.set(Register.IOVA, IOVA)
        await self.set(Register.LENGTH, GUEST)
        await self.set(Register.WORK, Work.DEVICE | Work.GUEST)
        await self.set(Register.RATE, rate)

    async def fill(self, pattern: int) -> None:
        info = await self.access.region_info(MEMORY_BAR)
        await self.set(Register.OFFSET, 0)
        await self.set(Register.LENGTH, info.size)
        await self.set(Register.PATTERN, pattern)
        await self.set(Register.KICK, Kick.DEVICE)


@asynccontextmanager
async def opened(address: str) -> AsyncIterator[Board]:
    access = await open_access(address, timeout=20)
    async with await find(access) as device:
        yield Board(access, device)


class Working(Guest):
    """A guest whose driver lets the device work, from the moment that it is tracked until the vCPUs stop."""

    board: Board

    async def start_tracking(self) -> None:
        await self.board.work(500)

    async def pause(self) -> None:
        await self.board.set(Register.RATE, 0)


@contextmanager
def working_guest(board: Board) -> Iterator[Working]:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC)
    os.ftruncate(fd, GUEST)
    with Working([GuestRange(IOVA, GUEST, fd, "guest")]) as made:
        made.board = board
        yield made


async def move(
    sources: Sequence[Device], targets: Sequence[Device], here: Guest, there: Guest, policy: Precopy | None = None
) -> vfiostream.Summary:
    sent: list[vfiostream.Summary] = []
    left, right = memory_pair()

    async def send() -> None:
        async with left:
            sent.append(await vfiostream.send(sources, left, guest=here, policy=policy or Precopy(max_rounds=50)))

    with anyio.fail_after(60):
        async with right, anyio.create_task_group() as tasks:
            tasks.start_soon(send)
            await vfiostream.receive(targets, right, guest=there)
    return sent[0]


@pytest.mark.parametrize(("one", "other"), list(pairwise(["16M", "16M-sparse", "16M-packed", "16M-nomap", "16M"])))
async def test_a_busy_four_region_device_moves_with_its_guest_memory(
    mdev: MakeMdev, address: Address, one: str, other: str
) -> None:
    async with (
        opened(address(mdev(f"four-region-{one}"))) as source,
        opened(address(mdev(f"four-region-{other}"))) as target,
    ):
        assert source.device.description.interface == "four-region"
        with working_guest(source) as here, guest((IOVA, GUEST)) as there:
            await source.fill(len(one))
            await source.access.write(REGISTERS, SCRATCH, b"of the config")
            await move([source.device], [target.device], here, there, Precopy(0.0, 4, otherwise="stop"))
            assert await target.memory() == await source.memory()
            assert contents(there) == contents(here)
            assert contents(here) != [bytes(GUEST)]  # it did write
            assert await target.read(REGISTERS, SCRATCH, 13) == b"of the config"
            assert await target.register(Register.WRITTEN) == await source.register(Register.WRITTEN) > 0
            assert await target.register(Register.STATE) == State.RUNNING
            assert await source.register(Register.STATE) == State.STOP


async def test_mtty_moves(mdev: MakeMdev, address: Address) -> None:
    async with opened(address(mdev("mtty-2"))) as source, opened(address(mdev("mtty-2"))) as target:
        assert source.device.description.interface == "migration-states"
        await source.access.write(0, MTTY_SCRATCH, b"\x5a")
        with guest() as here, guest() as there:
            await move([source.device], [target.device], here, there)
        assert await target.read(0, MTTY_SCRATCH, 1) == b"\x5a"


async def test_devices_of_two_interfaces_move_together(mdev: MakeMdev, address: Address) -> None:
    kinds = ("mtty-2", "four-region-16M", "mtty-2")
    async with (
        opened(address(mdev(kinds[0]))) as a,
        opened(address(mdev(kinds[1]))) as b,
        opened(address(mdev(kinds[2]))) as c,
        opened(address(mdev(kinds[0]))) as d,
        opened(address(mdev(kinds[1]))) as e,
        opened(address(mdev(kinds[2]))) as f,
    ):
        await a.access.write(0, MTTY_SCRATCH, b"\x11")
        await b.fill(23)
        await c.access.write(0, MTTY_SCRATCH, b"\x22")
        with guest() as here, guest() as there:
            await move([a.device, b.device, c.device], [d.device, e.device, f.device], here, there)
        assert await d.read(0, MTTY_SCRATCH, 1) == b"\x11"
        assert await e.memory() == await b.memory()
        assert await f.read(0, MTTY_SCRATCH, 1) == b"\x22"


async def test_a_driver_refuses_the_version_of_a_newer_one(mdev: MakeMdev, address: Address) -> None:
    async with (
        opened(address(mdev("four-region-16M-next"))) as source,
        opened(address(mdev("four-region-16M"))) as target,
    ):
        await source.fill(5)
        with guest() as here, guest() as there:
            with pytest.raises(ExceptionGroup) as caught:
                await move([source.device], [target.device], here, there)
            assert caught.group_contains(Incompatible, match="does not take version")
        assert await source.register(Register.STATE) == State.RUNNING


# ---- the command line, between two network namespaces


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[list[str], list[str], str]]:
    """Two of them, with a link between: the words that run a program on each, and the address of the second."""

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True)

    with ExitStack() as undo:
        for name in ("here", "there"):
            ip("netns", "add", name)
            undo.callback(ip, "netns", "delete", name)
        ip("link", "add", "here0", "netns", "here", "type", "veth", "peer", "name", "there0", "netns", "there")
        for name, number in (("here", 1), ("there", 2)):
            ip("-n", name, "address", "add", f"10.5.0.{number}/24", "dev", f"{name}0")
            ip("-n", name, "link", "set", f"{name}0", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield ["ip", "netns", "exec", "here"], ["ip", "netns", "exec", "there"], "10.5.0.2"


def run(what: Coroutine[None, None, T]) -> T:
    async def call() -> T:
        return await what

    return anyio.run(call)


def digest(address: str) -> str:
    """Of the memory of a four-region device."""

    async def read() -> bytes:
        async with opened(address) as board:
            return await board.memory()

    return hashlib.sha256(run(read())).hexdigest()


def fill(address: str, pattern: int) -> None:
    async def write() -> None:
        async with opened(address) as board:
            await board.fill(pattern)

    run(write())


@pytest.mark.parametrize("kind", ["mtty-2", "four-region-16M"])
def test_through_tcp_between_two_hosts(
    mdev: MakeMdev, hosts: tuple[list[str], list[str], str], address: Address, kind: str, tmp_path: Path
) -> None:
    here, there, host = hosts
    source, target = (address(mdev(kind)) for _ in range(2))
    if kind != "mtty-2":
        fill(source, 77)
    for name in ("here", "there"):
        (tmp_path / name).write_bytes(os.urandom(GUEST) if name == "here" else bytes(GUEST))
    memory = [f"--guest-memory={IOVA:#x}={tmp_path / name}" for name in ("here", "there")]
    receive = [*there, str(SCRIPT), "receive", "--plain", f"tcp:{host}:0", target, memory[1]]
    with subprocess.Popen(receive, stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout is not None
        port = receiver.stdout.readline().removeprefix("listening on ").strip()
        sender = subprocess.run(
            [*here, SCRIPT, "send", "--json", source, port, memory[0]], stdout=subprocess.PIPE, text=True, timeout=60
        )
        received = receiver.stdout.read()
    assert sender.returncode == receiver.returncode == 0
    assert json.loads(sender.stdout.splitlines()[-1])["status"] == "done"
    assert "done" in received
    assert (tmp_path / "there").read_bytes() == (tmp_path / "here").read_bytes()
    if kind != "mtty-2":
        assert digest(target) == digest(source)
