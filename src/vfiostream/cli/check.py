"""``check``: can this device move, and can it go there?"""

from __future__ import annotations

from contextlib import AsyncExitStack

import click

from vfiostream import compatibility
from vfiostream.access import is_address
from vfiostream.cli import options
from vfiostream.cli.describe import description_document, description_lines
from vfiostream.cli.exits import Exit
from vfiostream.cli.report import Result
from vfiostream.cli.run import Output, Run, carry_out
from vfiostream.devices import open_device
from vfiostream.devices.contract import Device


@click.command
@click.argument("device")
@click.argument("there", metavar="[DEVICE|VERSION-STRING]", required=False)
@options.device_timeout
@options.recordings
@options.answers
def check(
    device: str, there: str | None, device_timeout: float, recordings: options.Recordings, output: Output
) -> Exit:
    """Say whether DEVICE can move, and whether it can go THERE; moves nothing.

    DEVICE is vfio-user:SOCKET or replay:FILE. What it could go to is another such device, or the version string of
    one; for a string, the driver of DEVICE is asked whether it takes that version. Exit code 5 where the answer is no.
    """

    devices = [device, there] if there is not None and is_address(there) else [device]
    recorded = recordings.of(*devices)

    async def work(run: Run) -> None:
        async with AsyncExitStack() as stack:
            source, *others = [
                await stack.enter_async_context(await open_device(address, timeout=device_timeout, recording=recording))
                for address, recording in recorded
            ]
            target: Device | str | None = others[0] if others else there
            run.result = _result(device, there, await compatibility.check(source, target))

    return carry_out(work, output, cancelled="nothing was changed")


def _result(device: str, there: str | None, answer: compatibility.Answer) -> Result:
    fits = not answer.reasons
    lines = description_lines(device, answer.source)
    if answer.target is not None and there is not None:
        lines += description_lines(there, answer.target)
    where = "move" if there is None else f"go to {there}"
    lines.append(f"{device} can {where}" if fits else f"{device} can't {where}: {'; '.join(answer.reasons)}")
    document = {
        "status": "compatible" if fits else "incompatible",
        "source": description_document(device, answer.source),
        "target": None if answer.target is None or there is None else description_document(there, answer.target),
        "reasons": list(answer.reasons),
    }
    return Result(document, lines, Exit.DONE if fits else Exit.INCOMPATIBLE)
