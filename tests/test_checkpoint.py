"""A device into a file and back, and files that are not what they should be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import anyio
import pytest
from anyio import to_thread

from tests.movers import MIB, SMALL, Machine, contents, guest, machine, machines
from vfiostream import checkpoint
from vfiostream.errors import DeviceRefused, Incompatible, SourceStuck, StreamError, TransportError, UsageError
from vfiostream.pipeline.progress import Summary
from vfiostream.pipeline.settings import Settings
from vfiostream.transports import connect, listen
from vfiostream.transports.memory import memory_pair
from vfiostream.uapi.four_region import State
from vfiostream.vendor.settings import Data, Fault, Operation

pytestmark = pytest.mark.anyio


async def save(made: Machine, path: Path, **options: object) -> Summary:
    async with connect(f"file:{path}") as file:
        with anyio.fail_after(30):
            return await checkpoint.save(made.device, file, **options)  # type: ignore[arg-type]


async def restore(path: Path, made: Machine, **options: object) -> Summary:
    async with listen(f"file:{path}") as folder, await folder.accept() as file:
        with anyio.fail_after(30):
            return await checkpoint.restore(file, made.device, **options)  # type: ignore[arg-type]


async def verify(path: Path) -> checkpoint.Contents:
    async with listen(f"file:{path}") as folder, await folder.accept() as file:
        with anyio.fail_after(30):
            return await checkpoint.verify(file)


@pytest.mark.parametrize("level", [0, 1])
async def test_a_busy_device_goes_into_a_file_and_comes_back(tmp_path: Path, level: int) -> None:
    path = tmp_path / "checkpoint"
    with guest((0, MIB)) as ours, guest((0, MIB)) as theirs:
        async with machines(replace(SMALL, dirty_rate=4 * MIB)) as (source, target):
            seen: list[tuple[bytes, list[bytes]]] = []
            run_on = source.device.resume

            async def look_and_resume() -> None:
                assert source.state is State.STOP_LOGGING
                seen.append((source.digest, contents(ours)))
                await run_on()

            source.device.resume = look_and_resume  # type: ignore[method-assign]
            saved = await save(source, path, guest=ours, settings=Settings(compression=level))
            assert source.state is State.RUNNING
            assert saved.transferred == path.stat().st_size
            told = await verify(path)
            assert told == await checkpoint.inspect(path)
            assert (told.rounds, told.content, told.complete) == (saved.rounds, saved.content, True)
            restored = await restore(path, target, guest=theirs)
            assert target.state is State.RUNNING
            assert seen == [(target.digest, contents(theirs))]
            assert restored.content == saved.content


async def test_zstd_and_zeros_make_it_smaller(tmp_path: Path) -> None:
    sizes = {}
    cases: tuple[tuple[Data, int], ...] = (("text", 0), ("text", 3), ("zeros", 0))
    for data, level in cases:
        async with machine(replace(SMALL, data=data)) as source:
            settings = Settings(chunk=64 * 1024, compression=level)
            sizes[data, level] = (await save(source, tmp_path / f"{data}{level}", settings=settings)).transferred
    assert sizes["text", 0] > 2 * MIB
    assert sizes["text", 3] < MIB
    assert sizes["zeros", 0] < 256 * 1024  # The driver's own header is in the first chunk, and config is not zeros.


async def test_an_incomplete_file_is_told_by_inspect_and_refused_by_verify(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    async with machine() as source:
        await save(source, path)
    path.write_bytes(path.read_bytes()[:-49])  # The COMMIT.
    assert not (await checkpoint.inspect(path)).complete
    with pytest.raises(StreamError, match="the stream ends where it should come"):
        await verify(path)


async def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    for name, data in (("empty", b""), ("text", b"hello, this is a text of some length" * 5), ("zeros", bytes(4096))):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(StreamError):
            await checkpoint.inspect(path)
        with pytest.raises(StreamError):
            await verify(path)
    with pytest.raises(TransportError):
        await checkpoint.inspect(tmp_path / "missing")


async def test_every_kind_of_damage_is_refused_and_the_device_stays_stopped(tmp_path: Path) -> None:
    tiny = replace(SMALL, memory=256 * 1024, config=4096, memory_region=64 * 1024)
    path = tmp_path / "checkpoint"
    async with machine(tiny) as source:
        await save(source, path, settings=Settings(chunk=64 * 1024, compression=1))
        digest = source.digest
    whole = path.read_bytes()
    step = len(whole) // 20
    files = {"longer": whole + b"x"}
    for offset in range(step, len(whole), step):
        files[f"damaged at {offset}"] = whole[:offset] + bytes([whole[offset] ^ 0x10]) + whole[offset + 1 :]
        files[f"cut at {offset}"] = whole[:offset]
    async with machine(replace(tiny, seed=7)) as target:
        for name, data in files.items():
            bad = tmp_path / name
            bad.write_bytes(data)
            with pytest.raises(StreamError, match="record|COMMIT"):
                await verify(bad)
            with pytest.raises(StreamError, match="record|COMMIT"):
                await restore(bad, target)
            assert not target.state.running, name
            await target.open_again()
        await restore(path, target)  # What came before does not matter.
        assert (target.digest, target.state) == (digest, State.RUNNING)


async def test_a_splice_of_two_checkpoints_is_refused(tmp_path: Path) -> None:
    async with machine() as source:
        await save(source, tmp_path / "one", settings=Settings(compression=0))
        await save(source, tmp_path / "two", settings=Settings(compression=0))
    one, two = (tmp_path / "one").read_bytes(), (tmp_path / "two").read_bytes()
    assert len(one) == len(two)
    (tmp_path / "both").write_bytes(one[: len(one) // 2] + two[len(one) // 2 :])
    with pytest.raises(StreamError):
        await verify(tmp_path / "both")


async def test_another_device_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    async with machine() as source:
        await save(source, path)
    async with machine(replace(SMALL, version_string="generation 2")) as target:
        before = target.digest
        with pytest.raises(Incompatible, match="version"):
            await restore(path, target)
        assert (target.digest, target.state) == (before, State.RUNNING)
    with guest((0, MIB)) as memory:
        async with machine() as target:
            with pytest.raises(Incompatible, match="guest memory differs"):
                await restore(path, target, guest=memory)


async def test_the_source_runs_whatever_happens_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with machine() as source:
        async with connect(f"file:{tmp_path / 'checkpoint'}") as file:

            async def full() -> None:
                raise TransportError("the disk is full: make room")

            monkeypatch.setattr(file, "finish", full)
            with pytest.raises(TransportError, match="full"):
                await checkpoint.save(source.device, file)
        assert source.state is State.RUNNING
        assert list(tmp_path.iterdir()) == []


async def test_a_source_that_can_not_be_resumed_is_said(tmp_path: Path) -> None:
    # The states written: RUNNING, RUNNING|LOGGING, STOP|LOGGING, RUNNING; and RUNNING again when it is called off.
    faults = tuple(Fault(Operation.SET_STATE, n, 5) for n in (4, 5))
    async with machine(replace(SMALL, faults=faults)) as source:
        with pytest.raises(SourceStuck, match="EIO"):
            await save(source, tmp_path / "checkpoint")
        assert list(tmp_path.iterdir()) == []


async def test_a_driver_that_fails_to_give_its_state(tmp_path: Path) -> None:
    async with machine(replace(SMALL, faults=(Fault(Operation.GET_MEMORY, 3, 5),))) as source:
        with pytest.raises(DeviceRefused, match="EIO"):
            await save(source, tmp_path / "checkpoint")
        assert source.state is State.RUNNING
        assert list(tmp_path.iterdir()) == []


async def test_a_link_is_no_file_and_a_file_is_no_link(tmp_path: Path) -> None:
    here, there = memory_pair()
    async with machine() as made:
        with pytest.raises(UsageError, match="use send"):
            await checkpoint.save(made.device, here)
        with pytest.raises(UsageError, match="use receive"):
            await checkpoint.restore(there, made.device)


async def test_chunks_larger_than_the_budget_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    async with machine() as source:
        await save(source, path, settings=Settings(chunk=8 * MIB, compression=0))
    async with machine(replace(SMALL, seed=3)) as target:
        with pytest.raises(StreamError, match="chunks of"):
            await restore(path, target, settings=Settings(budget=16 * MIB))
    await to_thread.run_sync(path.unlink)
