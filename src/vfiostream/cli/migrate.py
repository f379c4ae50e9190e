"""``send`` and ``receive``: live migration."""

from __future__ import annotations

from dataclasses import replace

import click

from vfiostream import migrate, transports
from vfiostream.cli import options
from vfiostream.cli.control import answer_at
from vfiostream.cli.exits import Exit
from vfiostream.cli.run import Output, Run, carry_out
from vfiostream.cli.summary import moved
from vfiostream.cli.values import option_type, parse_link_address
from vfiostream.devices import open_device
from vfiostream.devices.four_region import Order
from vfiostream.guest import Guest
from vfiostream.pipeline.settings import Settings
from vfiostream.policy import Precopy
from vfiostream.transports.options import Options


@click.command
@click.argument("device")
@click.argument("destination", type=option_type(parse_link_address))
@options.guest_memory
@options.policy
@options.settings("bandwidth", "chunk", "budget", "patience", compression=0)
@options.link(listens=False)
@options.channels
@options.reconnect("How long the link may be lost: it is opened anew, and goes on where it was.  [default: not at all]")
@options.order
@options.device_timeout
@options.recordings
@options.control
@options.progress
def send(
    device: str,
    destination: str,
    memory: options.GuestFiles,
    policy: Precopy,
    settings: Settings,
    link: Options,
    order: Order,
    device_timeout: float,
    recordings: options.Recordings,
    control: str | None,
    output: Output,
) -> Exit:
    """Move DEVICE to whoever receives at DESTINATION.

    DEVICE is vfio-user:SOCKET, vfio:NAME or replay:FILE, and DESTINATION the tls:, quic: or tcp:HOST:PORT or unix:PATH
    at which `vfiostream receive` waits, exec:COMMAND for a program that leads there, or what was passed on (fd:N,
    fd:IN,OUT, stdio:). The device runs on here until the target has loaded and checked everything; when this fails, it
    goes on running here.
    """

    transports.check(destination, link)
    ((_, recording),) = recordings.of(device)

    async def work(run: Run) -> None:
        await answer_at(run, control, settings.bandwidth)
        run.follow()
        with Guest.open(memory) as guest:
            async with await open_device(device, order=order, timeout=device_timeout, recording=recording) as opened:
                async with transports.connect(destination, link) as transport:
                    run.result = moved(
                        await migrate.send(
                            opened, transport, guest=guest, policy=policy, settings=settings, progress=run.progress
                        )
                    )

    return carry_out(work, output, cancelled="the source runs", has_source=True)


@click.command
@click.argument("source", type=option_type(parse_link_address))
@click.argument("device")
@options.guest_memory
@options.settings("chunk", "budget", "patience")
@options.link(listens=True)
@options.reconnect("How long a sender that reconnects may stay away.  [default: 25s]")
@options.device_timeout
@options.recordings
@options.control
@options.progress
def receive(
    source: str,
    device: str,
    memory: options.GuestFiles,
    settings: Settings,
    link: Options,
    device_timeout: float,
    recordings: options.Recordings,
    control: str | None,
    output: Output,
) -> Exit:
    """Take the device that is sent to SOURCE into DEVICE, and let it run.

    SOURCE is the tls:, quic: or tcp:HOST:PORT or unix:PATH to listen at; with port 0 the system chooses one, and it is
    printed. Or it is exec:COMMAND for a program that sends, or what was passed on (fd:N, fd:IN,OUT, stdio:,
    systemd:NAME); with stdio:, what is printed goes to standard error. DEVICE is vfio-user:SOCKET, vfio:NAME or
    replay:FILE. One sender is served. At tls: and quic: it has to show a certificate that is believed; whoever can
    connect to tcp: can send.
    """

    transports.check(source, link)
    ((_, recording),) = recordings.of(device)

    async def work(run: Run) -> None:
        await answer_at(run, control)
        with Guest.open(memory) as guest:
            async with await open_device(device, timeout=device_timeout, recording=recording) as opened:
                async with transports.listen(source, replace(link, refused=run.report.refused)) as listener:
                    run.report.listening(listener.address)
                    async with await listener.accept() as transport:
                        await listener.aclose()  # One sender is served.
                        run.follow()
                        run.result = moved(
                            await migrate.receive(
                                opened, transport, guest=guest, settings=settings, progress=run.progress
                            )
                        )

    return carry_out(work, output, cancelled="nothing was committed, so the target does not run what came")
