"""Options that several commands share. Each decorator adds them, and gives the command one value made of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click

from vfiostream.access.record import SMALL, Recording
from vfiostream.cli.run import Output
from vfiostream.cli.values import (
    option_size,
    option_time,
    option_type,
    parse_guest_memory,
    parse_level,
    parse_rate,
    parse_size,
    parse_time,
)
from vfiostream.pipeline.bandwidth import Bandwidth
from vfiostream.pipeline.budget import Budget
from vfiostream.pipeline.settings import Settings
from vfiostream.policy import Precopy
from vfiostream.transports.credentials import Credentials
from vfiostream.transports.options import MAX_CHANNELS, MIN_MEMORY, Options

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]
GuestFiles = tuple[tuple[int, Path], ...]
"""Guest physical addresses and the files that hold what is there."""


class Recordings(NamedTuple):
    """What ``--record`` asks for."""

    files: tuple[Path, ...]
    payloads: bool

    def of(self, *devices: str) -> list[tuple[str, Recording | None]]:
        """What is to be recorded of each of ``devices``; raises click's error where there are more files than these."""
        if len(self.files) > len(devices):
            raise click.UsageError(f"{len(self.files)} records of {len(devices)} devices: give --record once for each")
        made = [Recording(file, self.payloads) for file in self.files]
        return list(zip(devices, [*made, *[None] * (len(devices) - len(made))], strict=True))


_DEFAULTS = Settings()
_POLICY = Precopy()


def _size(name: str, parameter: str, default: int, text: str) -> Decorator:
    return click.option(
        name, parameter, type=option_type(parse_size), metavar="SIZE", default=option_size(default), show_default=True,
        help=text,
    )  # fmt: skip


def _time(name: str, parameter: str, default: float | None, text: str) -> Decorator:
    return click.option(
        name, parameter, type=option_type(parse_time), metavar="TIME", show_default=default is not None, help=text,
        default=None if default is None else option_time(default),
    )  # fmt: skip


def diagnostics(command: Command) -> Command:
    """``--traceback`` and ``--verbose``, as ``output``."""

    @click.option("--traceback", is_flag=True, help="Print where in the program an error came from.")
    @click.option("-v", "--verbose", is_flag=True, help="Log each device access and record to standard error.")
    @functools.wraps(command)
    def wrapped(*, traceback: bool, verbose: bool, **rest: Any) -> Any:
        return command(output=Output(traceback=traceback, verbose=verbose), **rest)

    return wrapped


def answers(command: Command) -> Command:
    """``--json`` and :func:`diagnostics`, as ``output``."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON object a line on standard output.")
    @diagnostics
    @functools.wraps(command)
    def wrapped(*, as_json: bool, output: Output, **rest: Any) -> Any:
        return command(output=Output(as_json, False, output.traceback, output.verbose), **rest)

    return wrapped


def progress(command: Command) -> Command:
    """``--quiet`` and :func:`answers`, as ``output``."""

    @click.option("--quiet", is_flag=True, help="Print nothing but errors.")
    @answers
    @functools.wraps(command)
    def wrapped(*, quiet: bool, output: Output, **rest: Any) -> Any:
        if quiet and output.as_json:
            raise click.UsageError("--quiet and --json contradict each other: use one of them")
        return command(output=Output(output.as_json, quiet, output.traceback, output.verbose), **rest)

    return wrapped


def control(command: Command) -> Command:
    """``--control``, as ``control``: the path of a socket, or None."""
    option = click.option(
        "--control", metavar="PATH", help="Answer `vfiostream control PATH` at this UNIX socket while it runs."
    )
    return option(command)


def guest_memory(command: Command) -> Command:
    """``--guest-memory``, as ``memory`` (:data:`GuestFiles`)."""
    option = click.option(
        "--guest-memory",
        "memory",
        type=option_type(parse_guest_memory),
        metavar="GPA=FILE",
        multiple=True,
        help="A file that holds guest memory from guest physical address GPA on, all of it. May be repeated.",
    )
    return option(command)


def policy(command: Command) -> Command:
    """When to switch over, as ``policy``."""

    @_time(
        "--downtime-limit",
        "downtime_limit",
        _POLICY.downtime_limit,
        "Switch over when the rest can be sent in this time.",
    )
    @click.option(
        "--max-rounds", type=click.IntRange(min=1), metavar="N", default=_POLICY.max_rounds, show_default=True,
        help="Most rounds with the source running.",
    )  # fmt: skip
    @_time("--max-time", "max_time", _POLICY.max_time, "Most time with the source running.  [default: no limit]")
    @click.option(
        "--if-not-converged",
        "otherwise",
        type=click.Choice(["continue", "stop", "give-up"]),
        default=_POLICY.otherwise,
        show_default=True,
        help="After these rounds or this time: go on, stop and copy the rest, or give up with the source running.",
    )
    @functools.wraps(command)
    def wrapped(*, downtime_limit: float, max_rounds: int, max_time: float | None, otherwise: Any, **rest: Any) -> Any:
        return command(policy=Precopy(downtime_limit, max_rounds, max_time, otherwise), **rest)

    return wrapped


def _bandwidth(command: Command) -> Command:
    """``--max-bandwidth`` and ``--switchover-bandwidth``, as ``bandwidth``."""

    @click.option(
        "--max-bandwidth", type=option_type(parse_rate), metavar="RATE",
        help="Most bytes a second on the link or into the file, while the source runs.  [default: no limit]",
    )  # fmt: skip
    @click.option(
        "--switchover-bandwidth", type=option_type(parse_rate), metavar="RATE",
        help="The same while it is stopped; also what may be counted on then.  [default: no limit]",
    )  # fmt: skip
    @functools.wraps(command)
    def wrapped(*, max_bandwidth: int | None, switchover_bandwidth: int | None, **rest: Any) -> Any:
        return command(bandwidth=Bandwidth(max_bandwidth, switchover_bandwidth), **rest)

    return wrapped


_SETTINGS: dict[str, Decorator] = {
    "chunk": _size("--chunk", "chunk", _DEFAULTS.chunk, "Most content of one frame; the smaller of both ends holds."),
    "budget": _size("--budget", "budget", _DEFAULTS.budget, "Most memory for buffers at this end."),
    "patience": _time(
        "--switchover-timeout", "patience", _DEFAULTS.patience,
        "How long the other end may show no progress at the start, and while the source is stopped.",
    ),
    "bandwidth": _bandwidth,
}  # fmt: skip


def _compression(level: int) -> Decorator:
    return click.option(
        "--compress", "compression", type=option_type(parse_level), metavar="LEVEL", default=str(level),
        show_default=True, help="zstd level, 1 to 19; 0 for none; adaptive for what moves most here and now.",
    )  # fmt: skip


def settings(*names: str, compression: int | None = None) -> Decorator:
    """The settings of ``names``, and ``--compress`` where it has a default here (``compression``), as ``settings``."""

    def decorate(command: Command) -> Command:
        chosen = names if compression is None else (*names, "compression")

        @functools.wraps(command)
        def made_of(**values: Any) -> Any:
            made = Settings(**{name: values.pop(name) for name in chosen})
            if "chunk" in names:
                Budget(made.budget, made.chunk)  # Refuses what has no room, before anybody is connected to.
            return command(settings=made, **values)

        add = [_SETTINGS[name] for name in names]
        if compression is not None:
            add.append(_compression(compression))
        wrapped: Command = made_of
        for option in reversed(add):
            wrapped = option(wrapped)
        return wrapped

    return decorate


def device_timeout(command: Command) -> Command:
    """``--device-timeout``, in seconds."""
    return _time("--device-timeout", "device_timeout", 60.0, "How long a device may take for one operation.")(command)


def recordings(command: Command) -> Command:
    """``--record`` and ``--record-payloads``, as ``recordings``."""

    @click.option(
        "--record", "files", type=click.Path(path_type=Path), metavar="FILE", multiple=True,
        help="Write what the device is asked and answers to a new file. Once for each device, in their order.",
    )  # fmt: skip
    @click.option(
        "--record-payloads", "payloads", is_flag=True,
        help=f"Record the bytes of transfers of more than {SMALL} bytes, too: the state of the device.",
    )  # fmt: skip
    @functools.wraps(command)
    def wrapped(*, files: tuple[Path, ...], payloads: bool, **rest: Any) -> Any:
        if payloads and not files:
            raise click.UsageError("--record-payloads says how to record, and nothing is recorded: add --record FILE")
        return command(recordings=Recordings(files, payloads), **rest)

    return wrapped


def link(*, listens: bool) -> Decorator:
    """How to open a link, as ``link`` (:class:`~vfiostream.transports.options.Options`): who we are and whom we
    believe, and, where the command ``listens``, ``--plain``.
    """

    def file(name: str, parameter: str, text: str) -> Decorator:
        return click.option(name, parameter, type=click.Path(path_type=Path), metavar="FILE", help=text)

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def made_of(
            *,
            cert: Path | None,
            key: Path | None,
            ca: Path | None,
            fingerprints: tuple[str, ...],
            peer_name: str | None,
            plain: bool = False,
            **rest: Any,
        ) -> Any:
            credentials = None
            if any((cert, key, ca, fingerprints, peer_name)):
                if cert is None or key is None:
                    raise click.UsageError("both ends of an encrypted link show a certificate: add --cert and --key")
                credentials = Credentials(cert, key, ca, fingerprints, peer_name)
            return command(link=Options(credentials=credentials, plain=plain), **rest)

        add = [
            file("--cert", "cert", "Our certificate (PEM), for tls: and quic:. `vfiostream cert` makes a pair."),
            file("--key", "key", "The private key of our certificate (PEM)."),
            file("--ca", "ca", "Believe certificates of this CA (PEM) with the name of the other end in them."),
            click.option(
                "--peer-fingerprint", "fingerprints", metavar="HEX", multiple=True,
                help="Believe the certificate with this SHA-256 fingerprint, whatever its name. May be repeated.",
            ),
            click.option(
                "--peer-name", metavar="NAME",
                help="The name a certificate of the CA must have.  [default: the host connected to; of a sender, any]",
            ),
        ]  # fmt: skip
        if listens:
            add.append(
                click.option(
                    "--plain",
                    is_flag=True,
                    help="Let other hosts connect to tcp:, which knows no one: the network is trusted.",
                )
            )
        wrapped: Command = made_of
        for option in reversed(add):
            wrapped = option(wrapped)
        return wrapped

    return decorate


def channels(command: Command) -> Command:
    """``--channels``, in ``link``."""

    @click.option(
        "--channels", type=click.IntRange(1, MAX_CHANNELS), metavar="N", default=1, show_default=True,
        help="Connections that the link is made of.",
    )  # fmt: skip
    @functools.wraps(command)
    def wrapped(*, channels: int, link: Options, **rest: Any) -> Any:
        return command(link=replace(link, channels=channels), **rest)

    return wrapped


def reconnect(text: str) -> Decorator:
    """``--reconnect``, in ``link``, which gets its memory out of the budget of ``settings``."""

    def decorate(command: Command) -> Command:
        @_time("--reconnect", "seconds", None, text)
        @functools.wraps(command)
        def wrapped(*, seconds: float | None, link: Options, settings: Settings, **rest: Any) -> Any:
            if seconds is not None and seconds >= settings.patience:
                raise click.UsageError(
                    "a link that is away looks as an end that hangs: give --reconnect less time than "
                    "--switchover-timeout"
                )
            made = replace(link, reconnect=seconds, memory=memory_of_link(settings))
            if made.channels > 1 or seconds is not None:
                Budget(settings.budget - made.memory, settings.chunk)  # Refuses what has no room.
            return command(link=made, settings=settings, **rest)

        return wrapped

    return decorate


def memory_of_link(settings: Settings) -> int:
    """What a link may have of the byte budget where it needs memory."""
    return max(settings.budget // 4, MIN_MEMORY)


def order(command: Command) -> Command:
    """``--order``: of a session with the source's driver."""
    option = click.option(
        "--order",
        type=click.Choice(["session", "posted"]),
        default="session",
        show_default=True,
        help="When the source's driver is told to track changes: at once, or after the first capture.",
    )
    return option(command)
