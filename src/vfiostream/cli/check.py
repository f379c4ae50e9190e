"""``check``: can this device move, and can it go there? ``describe``: what another host has to know to answer."""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path

import click

from vfiostream import compatibility
from vfiostream.access import is_address
from vfiostream.access.record import Recording
from vfiostream.cli import options
from vfiostream.cli.describe import description_document, description_lines
from vfiostream.cli.exits import Exit
from vfiostream.cli.report import Result
from vfiostream.cli.run import Output, Run, carry_out
from vfiostream.cli.values import option_type, parse_file_address
from vfiostream.compatibility import Answer
from vfiostream.description import description_text, read_description
from vfiostream.devices import open_device
from vfiostream.devices.contract import DescribedDevice, Device

VERSION = "version:"
"""What a version string begins with, where it stands for a device."""


def parse_described(text: str) -> str:
    """The address of a device, or ``file:PATH`` of what describes one; raises ValueError."""
    if is_address(text):
        return text
    try:
        return parse_file_address(text)
    except ValueError as error:
        raise ValueError(
            f"{text!r} is neither a device nor a file: write vfio-user:SOCKET, vfio:NAME, replay:FILE, or file:PATH "
            "for a checkpoint or a description"
        ) from error


def parse_source(text: str) -> str:
    """As :func:`parse_described`, or ``version:TEXT``."""
    return text if text.startswith(VERSION) else parse_described(text)


@click.command
@click.argument("source", type=option_type(parse_source))
@click.argument("target", type=option_type(parse_described), required=False)
@options.device_timeout
@options.recordings
@options.answers
def check(
    source: str, target: str | None, device_timeout: float, recordings: options.Recordings, output: Output
) -> Exit:
    """Say whether SOURCE can move, and whether it can go into TARGET; moves nothing.

    Each is a device (vfio-user:SOCKET, vfio:NAME or replay:FILE), or file:PATH, with a checkpoint or with what
    `vfiostream describe` has printed on another host. SOURCE may also be version:TEXT, the version string of a device.
    The driver of a TARGET that is a device is asked whether it takes the source's version; nobody can be asked about a
    file. Exit code 5 where the answer is no.
    """
    given = [source] if target is None else [source, target]
    recorded = iter(recordings.of(*filter(is_address, given)))
    planned = [(one, next(recorded)[1] if is_address(one) else None) for one in given]

    async def work(run: Run) -> None:
        async with AsyncExitStack() as stack:
            ours, *others = [await _open(stack, one, device_timeout, recording) for one, recording in planned]
            theirs = others[0] if others else None
            assert not isinstance(theirs, str)
            run.result = _result(ours, theirs, given, await compatibility.check(ours, theirs))

    return carry_out(work, output, cancelled="nothing was changed")


@click.command
@click.argument("device", type=option_type(parse_described))
@options.device_timeout
@options.recordings
@options.diagnostics
def describe(device: str, device_timeout: float, recordings: options.Recordings, output: Output) -> Exit:
    """Print what another host has to know of DEVICE to check it; for a file.

    DEVICE is vfio-user:SOCKET, vfio:NAME, replay:FILE, or file:PATH with a checkpoint. On another host, `vfiostream
    check file:PATH` takes what is printed for the device.
    """
    recorded = recordings.of(*filter(is_address, [device]))

    async def work(run: Run) -> None:
        async with AsyncExitStack() as stack:
            known = await _open(stack, device, device_timeout, recorded[0][1] if recorded else None)
            assert not isinstance(known, str)
            run.result = Result({}, description_text(known).splitlines())

    return carry_out(work, output, cancelled="nothing was changed")


async def _open(
    stack: AsyncExitStack, given: str, timeout: float, recording: Recording | None
) -> Device | DescribedDevice | str:
    if given.startswith(VERSION):
        return given.removeprefix(VERSION)
    if is_address(given):
        return await stack.enter_async_context(await open_device(given, timeout=timeout, recording=recording))
    return await read_description(Path(given.removeprefix("file:")))


def _result(
    source: Device | DescribedDevice | str, target: Device | DescribedDevice | None, given: list[str], answer: Answer
) -> Result:
    known = [one for one in (source, target) if one is not None and not isinstance(one, str)]
    lines = [line for one in known for line in description_lines(one.name, one.description)]
    lines += [f"note           {note}" for note in answer.notes]
    where = "move" if target is None else f"go to {given[1]}"
    if answer.reasons:
        lines.append(f"{given[0]} can't {where}: {'; '.join(answer.reasons)}")
    else:
        lines.append(f"{given[0]} can {where}")
    document = {
        "status": "incompatible" if answer.reasons else "compatible",
        "source": None if isinstance(source, str) else description_document(source.name, source.description),
        "target": None if target is None else description_document(target.name, target.description),
        "driver_asked": answer.driver_asked,
        "reasons": list(answer.reasons),
        "notes": list(answer.notes),
    }
    return Result(document, lines, Exit.INCOMPATIBLE if answer.reasons else Exit.DONE)
