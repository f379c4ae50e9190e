"""The command line.

The module of a command is imported when that command is run, so that ``--help`` and a mistyped command are quick.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import traceback
from collections.abc import Sequence

import click

from vfiostream.cli.exits import Cancelled, Exit, failure_of
from vfiostream.cli.values import takes_output
from vfiostream.errors import UsageError

COMMANDS = {
    "demo": ("vfiostream.cli.demo", "Move a busy simulated device to another process, live, and compare digests."),
    "device": ("vfiostream.cli.device", "Serve a reference device, or let a device run again."),
    "send": ("vfiostream.cli.migrate", "Move DEVICE to whoever receives at DESTINATION."),
    "receive": ("vfiostream.cli.migrate", "Take the device that is sent to SOURCE into DEVICE, and let it run."),
    "save": ("vfiostream.cli.checkpoint", "Write a checkpoint of DEVICE, which runs on."),
    "restore": ("vfiostream.cli.checkpoint", "Load a checkpoint into DEVICE, and let it run."),
    "inspect": ("vfiostream.cli.checkpoint", "Say what is in a checkpoint, without checking all of it."),
    "verify": ("vfiostream.cli.checkpoint", "Check every byte of a checkpoint."),
    "control": ("vfiostream.cli.control", "Ask or change a send, receive, save or restore while it runs."),
    "check": ("vfiostream.cli.check", "Say whether SOURCE can move, and whether it can go into TARGET; moves nothing."),
    "describe": ("vfiostream.cli.check", "Print what another host has to know of DEVICE to check it; for a file."),
    "record": ("vfiostream.cli.record", "Look at what --record wrote."),
    "cert": ("vfiostream.cli.cert", "Make certificates for both ends of a tls: or quic: link."),
    "devices": ("vfiostream.cli.devices", "List the devices of this host that could move, and what is in the way."),
    "conformance": (
        "vfiostream.cli.conformance",
        "Check DEVICE against the rules of its interface of migration, for the author of its driver.",
    ),
    "bench": (
        "vfiostream.cli.bench",
        "Measure what this machine and a link do to a migration, without a device.",
    ),
}
"""Module and purpose of each command; the command's name is that of its function."""


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, purpose) for name, (_, purpose) in COMMANDS.items()])


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from vfiostream import _accel
        from vfiostream.protocol import framing
        from vfiostream.version import SOFTWARE

        click.echo(f"{SOFTWARE}, format {framing.VERSION}, accelerator {_accel.IMPLEMENTATION}")
        ctx.exit()


@click.group(cls=_Commands, no_args_is_help=False)
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Print the versions of the package and its format, and the accelerator in use.",
)
def vfiostream() -> None:
    """Move the state of a VFIO device between hosts while it runs, or into a file and back.

    DEVICE is vfio-user:SOCKET, vfio: and a device of the kernel's, which `devices` lists, or replay:FILE. DESTINATION
    and SOURCE are tls:, quic: or tcp:HOST:PORT, or unix:PATH; a checkpoint is file:PATH; and each of them exec:COMMAND
    or stdio:. Sizes and rates take KiB, MiB and GiB, times ms and s.

    Exit codes: 0 done; 1 failed, the source runs; 2 usage; 4 verification failed; 5 not compatible; 6 did not
    converge or was cancelled, the source runs; 7 outcome unknown after the switchover; 8 a driver breaks a rule.
    """


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command of ``arguments`` (default: those of this process) and return its exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if any(map(takes_output, given)):
        with contextlib.redirect_stdout(sys.stderr):
            return _main(given)
    return _main(given)


def _main(given: Sequence[str]) -> int:
    failed: Exception
    try:
        code = vfiostream.main(list(given), prog_name="vfiostream", standalone_mode=False)
    except click.ClickException as error:
        failed = UsageError(_sentence(error))
    except click.Abort:
        failed = Cancelled("cancelled before anything began")
    except Exception as error:  # noqa: BLE001 - the edge, as in vfiostream.cli.run
        if "--traceback" in given:
            traceback.print_exception(error)
        failed = error
    else:
        return int(code or Exit.DONE)
    from vfiostream.cli.report import report_for  # with rich, and needed by nobody who only asks for help

    failure = failure_of(failed, has_source=False)
    report_for(as_json="--json" in given, quiet=False, live=False).failure(failure)
    return failure.code


def _sentence(error: click.ClickException) -> str:
    """What click has to say, in our form."""
    text = error.format_message().rstrip(".")
    text = text[:1].lower() + text[1:]
    if isinstance(error, click.UsageError) and error.ctx is not None:
        text += f"; see {error.ctx.command_path} --help"
    return text
