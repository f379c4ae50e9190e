"""``device serve``, the reference device as a program; ``device resume``, a way back for one that was left stopped."""

from __future__ import annotations

import logging
from typing import Any, get_args

import click

from vfiostream.cli import options
from vfiostream.cli.exits import Exit
from vfiostream.cli.options import Decorator
from vfiostream.cli.report import Result
from vfiostream.cli.run import Output, Run, carry_out
from vfiostream.cli.values import option_size, option_time, option_type, parse_rate, parse_size, parse_time
from vfiostream.devices import open_device
from vfiostream.vendor.server import serve as serve_device
from vfiostream.vendor.settings import Interface, Settings, parse_fault

_DEFAULTS = Settings()


def _parse_states(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


@click.group
def device() -> None:
    """Serve a reference device, or let a device run again."""


def _size(name: str, default: int, text: str) -> Decorator:
    return click.option(
        name, type=option_type(parse_size), metavar="SIZE", default=option_size(default), show_default=True, help=text
    )


def _time(name: str, default: float, text: str) -> Decorator:
    return click.option(
        name, type=option_type(parse_time), metavar="TIME", default=option_time(default), show_default=True, help=text
    )


def _choice(name: str, choices: tuple[str, ...], default: str, text: str) -> Decorator:
    return click.option(name, type=click.Choice(choices), default=default, show_default=True, help=text)


@device.command
@click.argument("socket", type=click.Path(dir_okay=False))
@_choice("--interface", get_args(Interface), _DEFAULTS.interface, "What the driver speaks.")
@click.option(
    "--states",
    type=option_type(_parse_states),
    metavar="LIST",
    default=",".join(_DEFAULTS.states),
    show_default=True,
    help="What a driver of migration-states has beside RUNNING, STOP and RESUMING.",
)
@_size("--memory", _DEFAULTS.memory, "Device memory; 0 for a device without.")
@_size("--config", _DEFAULTS.config, "Config.")
@click.option(
    "--dirty-rate",
    type=option_type(parse_rate),
    metavar="RATE",
    default=option_size(_DEFAULTS.dirty_rate),
    show_default=True,
    help="Bytes a second written to device memory, and as many again to guest memory.",
)
@_choice("--pattern", ("uniform", "hotspot", "sequential"), _DEFAULTS.pattern, "Which pages are written.")
@_choice("--data", ("zeros", "text", "library", "random"), _DEFAULTS.data, "What memory holds, and what is written.")
@click.option("--seed", type=int, default=_DEFAULTS.seed, show_default=True, help="Of everything that is random.")
@_size("--memory-region", _DEFAULTS.memory_region, "Region that device memory moves through.")
@_size("--config-region", _DEFAULTS.config_region, "Region that the config moves through, in one piece.")
@_size("--bitmap-region", _DEFAULTS.bitmap_region, "Region of the dirty bitmap.")
@_choice("--mmap", ("whole", "sparse", "none"), _DEFAULTS.mmap, "What of the data regions can be mapped.")
@_choice("--layout", ("natural", "packed"), _DEFAULTS.layout, "Of the control region.")
@_time("--capture-time", _DEFAULTS.capture_time, "How long the driver takes to collect what has to be sent.")
@_time("--chunk-time", _DEFAULTS.chunk_time, "How long a chunk of memory takes, out of the device or into it.")
@_time("--state-time", _DEFAULTS.state_time, "How long a change of the device state takes.")
@click.option(
    "--version-string",
    default=_DEFAULTS.version_string,
    metavar="TEXT",
    help="The driver's version.  [default: its generation and the sizes that both ends must share]",
)
@click.option(
    "--accept",
    multiple=True,
    metavar="PATTERN",
    help="Versions to take besides its own; * and ? match as in file names. May be repeated.",
)
@click.option("--no-dirty-tracking", is_flag=True, help="Do not report the guest pages that are written.")
@click.option(
    "--fault",
    "faults",
    type=option_type(parse_fault),
    multiple=True,
    metavar="OPERATION:N:EFFECT",
    help="Make the N-th OPERATION fail with an errno (EIO), hang, or exit, such as get-memory:3:EIO. May be repeated.",
)
@options.diagnostics
def serve(socket: str, output: Output, no_dirty_tracking: bool, **values: Any) -> Exit:
    """Serve a reference device at the UNIX socket SOCKET, until SIGINT or SIGTERM.

    A simulation of a device and its vendor's driver, no hardware: its memory is written by a workload, and it
    writes guest memory by DMA. Clients are served one after another, and it keeps its state between them.
    """
    output.log(logging.WARNING)
    settings = Settings(dirty_tracking=not no_dirty_tracking, **values)
    serve_device(settings, socket, lambda: click.echo(f"serving vfio-user:{socket}"))
    return Exit.DONE


@device.command
@click.argument("device", metavar="DEVICE")
@options.device_timeout
@options.recordings
@options.diagnostics
def resume(device: str, device_timeout: float, recordings: options.Recordings, output: Output) -> Exit:
    """Let DEVICE run, and stop tracking what it changes; asks nothing.

    For a source that a migration left stopped (exit code 7) or that was left behind by a sender that was
    killed. If the target runs already, two copies of one device then run, and both write the same guest's disks
    and networks: first make sure that the target says it was never committed.
    """

    ((_, recording),) = recordings.of(device)

    async def work(run: Run) -> None:
        async with await open_device(device, timeout=device_timeout, recording=recording) as opened:
            await opened.resume()
            run.result = Result({"status": "done"}, [f"{device} runs"])

    return carry_out(work, output, cancelled="whether the device runs is not known: run it again")
