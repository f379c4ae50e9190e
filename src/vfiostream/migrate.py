"""Live migration: :func:`send` on the source's host, :func:`receive` on the target's."""

from __future__ import annotations

from collections.abc import Sequence

from vfiostream.devices.contract import Device, as_sequence
from vfiostream.errors import UsageError
from vfiostream.guest import Guest
from vfiostream.pipeline.progress import Progress, Summary
from vfiostream.pipeline.settings import Settings
from vfiostream.pipeline.source import Policy, Source
from vfiostream.pipeline.target import Target
from vfiostream.policy import Precopy
from vfiostream.transports.contract import Transport


async def send(
    device: Device | Sequence[Device],
    transport: Transport,
    *,
    guest: Guest | None = None,
    policy: Policy | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Move ``device`` (or several, which stop and start together), and the memory of ``guest``, to whoever receives
    at the other end of ``transport``. Returns when the target runs; the source is stopped then.

    ``policy`` decides rounds and switchover (default: :class:`~vfiostream.policy.Precopy`); ``progress`` is written
    while it runs. Devices, guest and transport stay the caller's to close.

    Raises whatever :class:`~vfiostream.errors.VfiostreamError` ended it. The source runs then, with two exceptions:
    :class:`~vfiostream.errors.OutcomeUnknown`, when only the target knows who has the device, and
    :class:`~vfiostream.errors.SourceStuck`. Cancelled, the source runs on; after the commit, cancellation waits for
    the outcome (``docs/switchover.md``).
    """
    if not transport.answers:
        raise UsageError(f"{transport.address} is nobody who could take a device over: use save for a file")
    source = Source(
        as_sequence(device),
        guest or Guest(),
        transport,
        policy or Precopy(),
        settings or Settings(),
        progress or Progress(),
    )
    return await source.run()


async def receive(
    device: Device | Sequence[Device],
    transport: Transport,
    *,
    guest: Guest | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Take the device that a :func:`send` at the other end of ``transport`` moves, into ``device``. Returns when it
    runs.

    ``guest`` must have the same ranges as the source's. Devices, guest and transport stay the caller's to close.

    Raises whatever :class:`~vfiostream.errors.VfiostreamError` ended it; the device is stopped then and never runs
    what it has, except after :class:`~vfiostream.errors.OutcomeUnknown`, when its driver left open whether it runs.
    Cancelled, it is stopped; after the commit has come, cancellation waits until it runs.
    """
    if not transport.answers:
        raise UsageError(f"{transport.address} is no live migration: use restore for a file")
    return await Target(
        as_sequence(device), guest or Guest(), transport, settings or Settings(), progress or Progress()
    ).run()
