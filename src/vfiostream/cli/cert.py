"""``cert``: what both ends of an encrypted link need, for those who have no CA."""

from __future__ import annotations

import shlex
import socket
from pathlib import Path

import click

from vfiostream.cli import options
from vfiostream.cli.exits import Exit
from vfiostream.cli.report import Result
from vfiostream.cli.run import Output, Run, carry_out
from vfiostream.transports import missing

NAMES = ("localhost", "127.0.0.1", "::1")
"""Names that every host has for itself."""
PORT = 7000
"""In what is printed."""


@click.command
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--name",
    "names",
    metavar="NAME",
    multiple=True,
    help="A DNS name or IP address that the ends are connected to by. May be repeated.  [default: this host's name]",
)
@click.option("--days", type=int, metavar="N", default=365, show_default=True, help="How long they are valid.")
@options.answers
def cert(folder: Path, names: tuple[str, ...], days: int, output: Output) -> Exit:
    """Make certificates for both ends of a tls: or quic: link.

    DIR must not be there, or be empty. It gets source.pem and source.key, target.pem and target.key, and ca.pem: the CA
    that signed both, whose key is not kept. Each end needs its own two files and ca.pem. The names are in both
    certificates, besides those of the loopback.
    """
    try:
        from vfiostream.transports.certificates import make_pair
    except ModuleNotFoundError as error:
        raise missing(error, "cert", "tls") from error
    named = names or (socket.gethostname(),)

    async def work(run: Run) -> None:
        issued = make_pair(folder, [*named, *(name for name in NAMES if name not in named)], days)
        until = issued["target"].certificate.not_valid_after_utc
        fingerprints = {end: made.fingerprint for end, made in issued.items()}
        commands = {
            "target": f"vfiostream receive tls:0.0.0.0:{PORT} DEVICE {_files(folder, 'target')}",
            "source": f"vfiostream send DEVICE tls:{_host(named[0])}:{PORT} {_files(folder, 'source')}",
        }
        run.result = Result(
            {
                "status": "made",
                "folder": str(folder),
                "names": list(named),
                "valid_until": until.isoformat(),
                "fingerprints": fingerprints,
                "commands": commands,
            },
            [
                f"{folder}: certificates for {', '.join(named)}, valid until {until:%Y-%m-%d}",
                *(f"{end} fingerprint {digits}" for end, digits in fingerprints.items()),
                "",
                *(f"{end}$ {command}" for end, command in commands.items()),
                "",
                "Bring each end its own two files and ca.pem. Instead of --ca, --peer-fingerprint pins the other's.",
            ],
        )

    return carry_out(work, output, cancelled="nothing was made")


def _files(folder: Path, end: str) -> str:
    words = ["--cert", folder / f"{end}.pem", "--key", folder / f"{end}.key", "--ca", folder / "ca.pem"]
    return shlex.join(map(str, words))


def _host(name: str) -> str:
    return f"[{name}]" if ":" in name else name
