"""The others: programs that are installed, and the limit, which is built from ``limit.c``.

One that is missing is an error, never a row less.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from time import monotonic, sleep
from typing import IO, Literal

from benchmarks.pairs import Run
from benchmarks.plan import BUILD, MIB, CannotRun

LIMIT_SOURCE = Path(__file__).with_name("limit.c")

PACKAGES = {
    "iperf3": "iperf3",
    "zstd": "zstd",
    "socat": "socat",
    "openssl": "openssl",
    "qemu-system-x86_64": "qemu-system-x86",
    "gtlsclient": "ngtcp2-client",
    "gtlsserver": "ngtcp2-server",
    "cp": "coreutils",
    "dd": "coreutils",
    "cc": "gcc and libc6-dev",
}
"""Which package of Debian has each program."""


def program(name: str) -> str:
    """Where ``name`` is. Raises :class:`CannotRun` where it is not."""
    found = shutil.which(name)
    if found is None:
        raise CannotRun(f"{name} is not here: install {PACKAGES[name]}, or let scripts/bench do it as root")
    return found


def limit_program() -> Path:
    """The limit, built where it is older than its source."""
    built = BUILD / "limit"
    if not built.exists() or built.stat().st_mtime < LIMIT_SOURCE.stat().st_mtime:
        built.parent.mkdir(parents=True, exist_ok=True)
        finish([program("cc"), "-O2", "-Wall", "-Werror", "-o", str(built), str(LIMIT_SOURCE)])
    return built


def limit(
    mode: Literal["device", "region"],
    link: Literal["tcp", "unix"],
    size: int,
    *,
    chunk: int,
    region: int = MIB,
    populated: bool = True,
) -> Run:
    """Move ``size`` bytes in C."""
    memory = "populated" if populated else "fresh"
    words = [str(limit_program()), mode, link, str(size), str(chunk), str(region), memory]
    seen = json.loads(finish(words))
    return Run(size, seen["seconds"], seen["sender_cpu"], seen["receiver_cpu"])


def finish(words: Sequence[str]) -> str:
    """Run a program to its end and return what it said. Raises :class:`CannotRun` where it failed."""
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise CannotRun(f"`{shlex.join(words)}` ended with {ended.returncode}: {ended.stderr.strip() or 'no word'}")
    return ended.stdout


def timed(words: Sequence[str], size: int) -> Run:
    """Run a program that moves ``size`` bytes within one process; its start is in the time."""
    before = os.times()
    began = monotonic()
    finish(words)
    seconds = monotonic() - began
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Run(size, seconds, cpu)


def iperf(size: int) -> Run:
    """iperf3, one stream of ``size`` bytes in writes of 1 MiB."""
    port = free_port()
    name = program("iperf3")
    server = subprocess.Popen(
        [name, "-s", "-1", "-p", str(port), "--forceflush"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert server.stdout is not None
        while line := server.stdout.readline():
            if "listening" in line:
                break
        seen = json.loads(finish([name, "-c", "127.0.0.1", "-p", str(port), "-n", str(size), "-l", "1M", "-J"]))
        received = seen["end"]["sum_received"]
        return Run(received["bytes"], received["seconds"])
    finally:
        server.kill()
        server.communicate()


TLS_BLOCK = 1024
"""Bytes that begin with a zero in what ``s_client`` sends: it takes some letters at the start of what it reads, in
blocks of a few KiB, for commands.
"""
CIPHER = "TLS_AES_256_GCM_SHA384"
"""What OpenSSL's ends agree on where nothing is said; ours are OpenSSL's, and say nothing."""


def openssl_content(file: Path, size: int) -> None:
    """Fill ``file`` with what :func:`openssl` sends."""
    block = bytearray(os.urandom(MIB))
    block[::TLS_BLOCK] = bytes(MIB // TLS_BLOCK)
    with file.open("wb") as opened:
        for start in range(0, size, MIB):
            opened.write(block[: size - start])


def openssl(content: Path, certificates: Path, size: int) -> Run:
    """``openssl s_client`` to ``s_server``, each with a certificate: a file in memory to nowhere, from the start of the
    client to the end of the server. CPU time is of all that each of them did.
    """
    port, name = free_port(), program("openssl")
    common = ("-quiet", "-tls1_3", "-ciphersuites", CIPHER, "-verify_return_error")

    def shown(end: str) -> list[str]:
        return ["-cert", f"{end}.pem", "-key", f"{end}.key", "-CAfile", "ca.pem"]

    serve = [
        name,
        "s_server",
        *common,
        *shown("target"),
        "-accept",
        f"127.0.0.1:{port}",
        "-naccept",
        "2",
        "-Verify",
        "2",
    ]
    connect = [
        name,
        "s_client",
        *common,
        *shown("source"),
        "-connect",
        f"127.0.0.1:{port}",
        "-verify",
        "2",
        "-no_ign_eof",
    ]
    with content.open("rb") as file, TemporaryFile() as said:
        # A server lets its client go when its own input ends.
        server = subprocess.Popen(
            serve, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=said, cwd=certificates
        )
        with server:
            try:
                _wait_for(port)  # This is the first of the two connections that it takes.
                began = monotonic()
                client = subprocess.Popen(connect, stdin=file, stdout=subprocess.DEVNULL, stderr=said, cwd=certificates)
                sending, receiving = (_ended(process, said) for process in (client, server))
                return Run(size, monotonic() - began, sending, receiving)
            finally:
                server.kill()


def plain_quic(certificates: Path, size: int, *, datagram: int) -> Run:
    """qh3 alone, in datagrams of ``datagram`` bytes; 0 for what it finds the path to carry."""
    words = [sys.executable, "-m", "benchmarks.plain_quic", str(size), str(datagram), str(certificates)]
    seen = json.loads(finish(words))
    return Run(size, seen["seconds"], seen["sender_cpu"], seen["receiver_cpu"])


def ngtcp2(content: Path, certificates: Path, size: int) -> Run:
    """ngtcp2's server to its client, both of C: a file in memory to nowhere, from the start of the client to its end.
    CPU time of the sender is not known, of the receiver all that it did.
    """
    port = free_port(socket.SOCK_DGRAM)
    serve = [
        program("gtlsserver"),
        "--quiet",
        f"--htdocs={content.parent}",
        "127.0.0.1",
        str(port),
        str(certificates / "target.key"),
        str(certificates / "target.pem"),
    ]
    connect = [
        program("gtlsclient"),
        "--quiet",
        "--exit-on-all-streams-close",
        "127.0.0.1",
        str(port),
        f"https://localhost/{content.name}",
    ]
    with TemporaryFile() as said, subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=said) as server:
        try:
            _wait_for_udp(port)
            began = monotonic()
            client = subprocess.Popen(connect, stdout=subprocess.DEVNULL, stderr=said)
            receiving = _ended(client, said)
            return Run(size, monotonic() - began, receiver_cpu=receiving)
        finally:
            server.kill()


def _wait_for_udp(port: int) -> None:
    """Return when somebody has bound ``port``."""
    deadline = monotonic() + 10
    while f"0100007F:{port:04X}" not in Path("/proc/net/udp").read_text():
        if monotonic() > deadline:
            raise CannotRun(f"nobody listens at UDP port {port}")
        sleep(0.01)


def _wait_for(port: int) -> None:
    """Return when somebody listens at ``port``."""
    deadline = monotonic() + 10
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError as error:
            if monotonic() > deadline:
                raise CannotRun(f"nobody listens at port {port}") from error
            sleep(0.01)
        else:
            return


def _ended(process: subprocess.Popen[bytes], said: IO[bytes]) -> float:
    """Wait until ``process`` has ended; returns its CPU seconds. Raises :class:`CannotRun` where it failed."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said.seek(0)
        raise CannotRun(f"{process.args!r} ended with {process.returncode}: {said.read().decode().strip()}")
    return usage.ru_utime + usage.ru_stime


def zstd_through_socat(content: Path, target: Path, size: int) -> Run:
    """``zstd -1 -T2`` of a file to socat, over TCP, to socat and ``zstd -d`` into a file that is there already and
    keeps its pages; from the start of the four processes to the end of the last.
    """
    port = free_port()
    zstd, socat = program("zstd"), program("socat")
    block = str(MIB)  # socat's own buffers are 8 KiB
    listening = f"TCP-LISTEN:{port},bind=127.0.0.1,reuseaddr"
    connecting = f"TCP:127.0.0.1:{port},retry=500,interval=0.01"
    with target.open("r+b") as file:
        began = monotonic()
        with (
            _pipe([socat, "-u", "-b", block, listening, "-"], [zstd, "-q", "-d", "-c", "--no-sparse"], file),
            _pipe([zstd, "-q", "-1", "-T2", "-c", str(content)], [socat, "-u", "-b", block, "-", connecting], None),
        ):
            pass
        return Run(size, monotonic() - began)


@contextmanager
def _pipe(first: Sequence[str], second: Sequence[str], output: IO[bytes] | None) -> Iterator[None]:
    """Run two programs, one into the other, until both have ended; raises :class:`CannotRun` where one failed."""
    one = subprocess.Popen(first, stdout=subprocess.PIPE)
    two = subprocess.Popen(second, stdin=one.stdout, stdout=output)
    assert one.stdout is not None
    one.stdout.close()
    try:
        yield
        for words, process in ((first, one), (second, two)):
            if process.wait():
                raise CannotRun(f"`{shlex.join(words)}` ended with {process.returncode}")
    finally:
        for process in (one, two):
            process.kill()
            process.wait()


def zstd_size(content: Path) -> int:
    """Bytes that ``zstd -1 -T2`` makes of a file."""
    words = [program("zstd"), "-q", "-1", "-T2", "-c", str(content)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        size = 0
        while block := process.stdout.read(MIB):
            size += len(block)
    if process.returncode:
        raise CannotRun(f"`{shlex.join(words)}` ended with {process.returncode}")
    return size


def free_port(kind: int = socket.SOCK_STREAM) -> int:
    """A port of the loopback that nobody uses now."""
    with socket.socket(type=kind) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
