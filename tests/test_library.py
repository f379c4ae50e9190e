"""What ``docs/library.md`` shows, run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import anyio
import pytest

import vfiostream
from tests.movers import MIB, SMALL, machines
from vfiostream.guest import Guest
from vfiostream.transports.certificates import make_pair
from vfiostream.transports.memory import memory_pair
from vfiostream.uapi.four_region import State
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.server import Server

pytestmark = pytest.mark.anyio
TEXT = (Path(__file__).parent.parent / "docs" / "library.md").read_text()


def block(name: str) -> dict[str, Any]:
    """The names that the block starting with ``# name`` defines."""
    (code,) = re.findall(rf"```python\n# {name}\n(.*?)```", TEXT, re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, f"docs/library.md ({name})", "exec", dont_inherit=True), names)
    return names


def test_every_block_is_run_here() -> None:
    blocks = re.findall(r"```python\n# (\w+)\n", TEXT)
    assert len(blocks) == TEXT.count("```python")
    assert set(blocks) == {
        "source", "target", "encrypted", "guest", "vmm", "check", "checkpoint", "watching", "limits", "record",
    }  # fmt: skip


async def test_a_migration(tmp_path: Path) -> None:
    async def serve(server: Server) -> None:
        await anyio.to_thread.run_sync(server.serve_forever)

    drivers = [ReferenceDevice(SMALL), ReferenceDevice(SMALL)]
    servers = [Server(driver, str(tmp_path / name)) for driver, name in zip(drivers, "ab", strict=True)]
    try:
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                for server in servers:
                    tasks.start_soon(serve, server)
                async with vfiostream.listen("tcp:127.0.0.1:0") as listener:
                    async with anyio.create_task_group() as ends:
                        ends.start_soon(block("target")["take_over"], str(tmp_path / "b"), listener)
                        summary = await block("source")["migrate"](str(tmp_path / "a"), listener.address)
                assert summary.downtime is not None
                for server in servers:
                    server.close()
    finally:
        for driver in drivers:
            driver.close()


async def test_an_encrypted_migration(tmp_path: Path) -> None:
    pair = tmp_path / "pair"
    make_pair(pair, ["127.0.0.1"], days=1)
    target_credentials = vfiostream.Credentials(pair / "target.pem", pair / "target.key", pair / "ca.pem")
    async with machines() as (source, target):

        async def take(listener: vfiostream.Listener) -> None:
            async with await listener.accept() as link:
                await vfiostream.receive(target.device, link)

        options = vfiostream.Options(credentials=target_credentials)
        with anyio.fail_after(30):
            async with vfiostream.listen("tls:127.0.0.1:0", options) as listener, anyio.create_task_group() as tasks:
                tasks.start_soon(take, listener)
                await block("encrypted")["migrate_encrypted"](source.device, listener.address, pair)
        assert (source.digest, target.state) == (target.digest, State.RUNNING)


async def test_limits() -> None:
    bandwidth = vfiostream.Bandwidth(1, 1 << 30)
    async with machines() as (source, target):
        here, there = memory_pair()
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(vfiostream.receive, target.device, there)
                tasks.start_soon(block("limits")["limited"], source.device, here, bandwidth)
                await anyio.wait_all_tasks_blocked()
                assert source.state is State.RUNNING_LOGGING
                bandwidth.limit = None
        assert target.state is State.RUNNING


async def test_guest_memory_and_watching(tmp_path: Path) -> None:
    files = [tmp_path / "ours", tmp_path / "theirs"]
    files[0].write_bytes(b"guest" + bytes(MIB - 5))
    files[1].write_bytes(bytes(MIB))
    async with machines() as (source, target):
        here, there = memory_pair()
        with Guest.open([(0x1_0000_0000, files[1])]) as theirs, anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(lambda: vfiostream.receive(target.device, there, guest=theirs))
                await block("guest")["migrate_with_memory"](source.device, here, files[0])
        assert files[0].read_bytes() == files[1].read_bytes()
    async with machines() as (source, target):
        here, there = memory_pair()
        with anyio.fail_after(30):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(vfiostream.receive, target.device, there)
                await block("watching")["watched"](source.device, here)
        assert target.state is State.RUNNING


async def test_a_guest_that_tracks(tmp_path: Path) -> None:
    kind = block("vmm")["VmmGuest"]
    bitmap = bytearray(2)
    guest = kind()
    await guest.start_tracking()
    guest.dirty |= {16, 18, 40}
    await guest.merge_dirty(16 * 4096, 16, memoryview(bitmap))
    assert bitmap == bytes([0b101, 0])
    assert guest.dirty == {40}


async def test_whether_it_can_go_there(tmp_path: Path) -> None:
    names = block("check")
    async with machines() as (source, target):
        await names["describe"](source.device, tmp_path / "file")
        assert await names["fits"](tmp_path / "file", target.device) == []


async def test_checkpoints(tmp_path: Path) -> None:
    async with machines() as (source, target):
        names = block("checkpoint")
        await names["checkpoint"](source.device, str(tmp_path / "file"))
        assert source.state is State.RUNNING
        await names["bring_back"](str(tmp_path / "file"), target.device)
        assert (source.digest, target.state) == (target.digest, State.RUNNING)


async def test_records(tmp_path: Path) -> None:
    names = block("record")
    driver = ReferenceDevice(SMALL)
    server = Server(driver, str(tmp_path / "a"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(anyio.to_thread.run_sync, server.serve_forever)
        try:
            async with await names["recorded"](f"vfio-user:{tmp_path / 'a'}", str(tmp_path / "file")) as device:
                await device.resume()
        finally:
            server.close()
    driver.close()
    async with await names["replayed"](str(tmp_path / "file")) as again:
        assert again.description == device.description
        await again.resume()
        assert again.caveat
