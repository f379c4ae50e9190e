"""``save``, ``restore``, ``inspect`` and ``verify``: checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vfiostream import checkpoint, transports
from vfiostream.checkpoint import Contents
from vfiostream.cli import options
from vfiostream.cli.control import answer_at
from vfiostream.cli.describe import description_document, description_lines
from vfiostream.cli.exits import Exit
from vfiostream.cli.report import Result
from vfiostream.cli.run import Output, Run, carry_out
from vfiostream.cli.summary import moved
from vfiostream.cli.values import option_type, parse_file_address, parse_kept_address, show_size
from vfiostream.devices import open_device
from vfiostream.devices.four_region import Order
from vfiostream.guest import Guest
from vfiostream.pipeline.describe import described
from vfiostream.pipeline.settings import Settings
from vfiostream.policy import Precopy
from vfiostream.transports.options import Options

ONE_WAY = Options(answers=False)

_file = click.argument("file", type=option_type(parse_file_address))
_kept = click.argument("kept", metavar="FILE", type=option_type(parse_kept_address))


@click.command
@click.argument("device")
@_kept
@options.guest_memory
@options.policy
@options.settings("bandwidth", "chunk", "budget", compression=0)
@options.order
@options.device_timeout
@options.recordings
@options.control
@click.option("--force", is_flag=True, help="Replace a file that exists, once the new one is whole.")
@options.progress
def save(
    device: str,
    kept: str,
    memory: options.GuestFiles,
    policy: Precopy,
    settings: Settings,
    order: Order,
    device_timeout: float,
    recordings: options.Recordings,
    force: bool,
    control: str | None,
    output: Output,
) -> Exit:
    """Write a checkpoint of DEVICE, which runs on.

    DEVICE is vfio-user:SOCKET, vfio:NAME or replay:FILE, and FILE is file:PATH, exec:COMMAND for a program that keeps
    its input, or stdio: or fd:N for a pipe. The device is stopped only while the last of its state is read. A file has
    its name only when it is whole and durable; a program has to end with status 0.
    """

    wanted = Options(replace=force, answers=False)
    transports.check(kept, wanted)
    ((_, recording),) = recordings.of(device)

    async def work(run: Run) -> None:
        await answer_at(run, control, settings.bandwidth)
        run.follow()
        with Guest.open(memory) as guest:
            async with await open_device(device, order=order, timeout=device_timeout, recording=recording) as opened:
                async with transports.connect(kept, wanted) as writer:
                    run.result = moved(
                        await checkpoint.save(
                            opened, writer, guest=guest, policy=policy, settings=settings, progress=run.progress
                        )
                    )

    return carry_out(work, output, cancelled="the device runs, and no checkpoint was made", has_source=True)


@click.command
@_kept
@click.argument("device")
@options.guest_memory
@options.settings("budget")
@options.device_timeout
@options.recordings
@options.control
@options.progress
def restore(
    kept: str,
    device: str,
    memory: options.GuestFiles,
    settings: Settings,
    device_timeout: float,
    recordings: options.Recordings,
    control: str | None,
    output: Output,
) -> Exit:
    """Load a checkpoint into DEVICE, and let it run.

    FILE is file:PATH, exec:COMMAND for a program that gives it, or stdio: or fd:N for a pipe, and DEVICE
    vfio-user:SOCKET, vfio:NAME or replay:FILE. The guest memory must have the ranges of the checkpoint. The device runs
    only when all of it has been loaded and checked.
    """

    transports.check(kept, ONE_WAY)
    ((_, recording),) = recordings.of(device)

    async def work(run: Run) -> None:
        await answer_at(run, control)
        run.follow()
        with Guest.open(memory) as guest:
            async with await open_device(device, timeout=device_timeout, recording=recording) as opened:
                async with transports.listen(kept, ONE_WAY) as listener, await listener.accept() as reader:
                    run.result = moved(
                        await checkpoint.restore(reader, opened, guest=guest, settings=settings, progress=run.progress)
                    )

    return carry_out(work, output, cancelled="not all was loaded, so the device does not run what came")


@click.command
@_file
@options.answers
def inspect(file: str, output: Output) -> Exit:
    """Say what is in a checkpoint, without checking all of it.

    FILE is file:PATH. Its content is not read: `vfiostream verify` does that. Exit code 4 where the file is no
    checkpoint, or not a complete one.
    """

    async def work(run: Run) -> None:
        found = await checkpoint.inspect(Path(file.removeprefix("file:")))
        status = "complete" if found.complete else "incomplete"
        run.result = Result(
            _document(status, found), _lines(file, status, found), Exit.DONE if found.complete else Exit.DAMAGED
        )

    return carry_out(work, output, cancelled="nothing was changed")


@click.command
@_kept
@options.answers
def verify(kept: str, output: Output) -> Exit:
    """Check every byte of a checkpoint.

    FILE is file:PATH, exec:COMMAND for a program that gives it, or stdio: or fd:N for a pipe. Exit code 4 where
    anything in it is wrong, with the first record that is.
    """
    transports.check(kept, ONE_WAY)

    async def work(run: Run) -> None:
        async with transports.listen(kept, ONE_WAY) as listener, await listener.accept() as reader:
            found = await checkpoint.verify(reader)
        run.result = Result(_document("verified", found), _lines(kept, "verified", found))

    return carry_out(work, output, cancelled="nothing was changed")


def _document(status: str, found: Contents) -> dict[str, Any]:
    return {
        "status": status,
        "software": found.hello.software,
        "devices": [description_document(one.name, one.description) for one in map(described, found.hello.devices)],
        "guest_memory": [{"address": area.address, "length": area.length} for area in found.hello.ranges],
        "rounds": found.rounds,
        "records": found.frames,
        "file_size": found.size,
        "bytes": found.content,
        "memory": found.memory,
        "pages": found.pages,
        "config": found.config,
    }


def _lines(file: str, status: str, found: Contents) -> list[str]:
    lines = [f"{file}: {status}, written by {found.hello.software}"]
    for one in map(described, found.hello.devices):
        lines += description_lines(one.name, one.description)
    lines += [f"guest memory   {area.address:#x}, {show_size(area.length)}" for area in found.hello.ranges]
    return [
        *lines,
        f"rounds         {found.rounds}, {found.frames} records",
        f"file           {show_size(found.size)}",
        f"content        {show_size(found.content)}: device memory {show_size(found.memory)}, "
        f"guest memory {show_size(found.pages)}, config {show_size(found.config)}",
    ]
