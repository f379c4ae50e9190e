"""The reference device as a program: signals, and the three kinds of fault."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vendor_client import TIMEOUT, Client
from tests.vendor_operations import BAR0, CONTROL, PAGE, STOP, Operations, refused
from vfiostream.uapi import vfio_user
from vfiostream.uapi.vfio import Feature, FeatureOperation, MigrationState
from vfiostream.uapi.vfio_user import Command

PROGRAM = """
import sys
from vfiostream.vendor.server import serve
from vfiostream.vendor.settings import Settings, parse_fault
faults = tuple(parse_fault(text) for text in sys.argv[3:])
serve(Settings(interface=sys.argv[2], memory=262144, memory_region=16384, data="zeros", faults=faults), sys.argv[1],
      lambda: print("ready", flush=True))
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Starts servers as programs, with faults; returns each with its socket when it is ready."""
    started: list[subprocess.Popen[str]] = []

    def program(*faults: str, interface: str = "four-region") -> tuple[subprocess.Popen[str], str]:
        path = str(tmp_path / "program.sock")
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, path, interface, *faults], stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process, path

    yield program
    for process in started:
        process.kill()
        process.communicate(timeout=TIMEOUT)


Program = Callable[..., tuple[subprocess.Popen[str], str]]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("with_client", [False, True])
def test_signals_end_it_cleanly(program: Program, number: signal.Signals, with_client: bool) -> None:
    process, path = program()
    if with_client:
        with Client(path) as client:
            process.send_signal(number)
            assert process.wait(TIMEOUT) == 0
            assert client.is_dropped()
    else:
        process.send_signal(number)
        assert process.wait(TIMEOUT) == 0
    assert not os.path.exists(path)


def test_a_fault_that_refuses(program: Program) -> None:
    _, path = program("get-memory:3:EIO")
    for _ in range(2):
        with Client(path) as client:
            ops = Operations(client, 4 * PAGE)
            ops.get_memory_size()
            ops.get_chunk(0, 1)
    with Client(path) as client:
        ops = Operations(client, 4 * PAGE)
        with refused(errno.EIO):
            ops.get_chunk(0, 1)
        ops.get_chunk(0, 1)


def test_a_fault_that_hangs_until_the_client_goes(program: Program) -> None:
    _, path = program("get-caps:2:hang")
    with Client(path) as client:
        ops = Operations(client, 4 * PAGE)
        ops.get32(ops.layout.caps)
        body = vfio_user.REGION_ACCESS.pack(ops.layout.caps, CONTROL, 4)
        client.send(vfio_user.pack_message(1, Command.REGION_READ, body))
        client.send(vfio_user.pack_message(2, Command.REGION_READ, body))
        client.socket.shutdown(socket.SHUT_WR)
        assert client.is_dropped()  # and no answer came before
    with Client(path) as client:
        ops = Operations(client, 4 * PAGE)
        ops.get32(ops.layout.caps)


def test_a_fault_that_ends_the_process(program: Program) -> None:
    process, path = program("set-state:1:exit")
    with Client(path) as client:
        ops = Operations(client, 4 * PAGE)
        with pytest.raises((EOFError, ConnectionError)):
            ops.set_state(STOP)
    assert process.wait(TIMEOUT) == 3
    assert os.path.exists(path)  # it died, it did not tidy up
    with Client(program()[1]):
        pass


@pytest.mark.parametrize("effect", ["hang", "exit"])
def test_faults_of_the_other_interfaces(program: Program, effect: str) -> None:
    process, path = program(f"running-p2p-to-stop:1:{effect}", interface="migration-states")
    with Client(path) as client:
        body = struct.pack("<IIIi", 16, FeatureOperation.SET | Feature.MIG_DEVICE_STATE, MigrationState.STOP, -1)
        client.send(vfio_user.pack_message(1, Command.DEVICE_FEATURE, body))
        client.socket.shutdown(socket.SHUT_WR)
        assert client.is_dropped()
    if effect == "exit":
        assert process.wait(TIMEOUT) == 3
    else:
        with Client(path) as client:  # on the way, where it was when it hung
            assert client.read(BAR0, 32, 4) == struct.pack("<I", MigrationState.RUNNING_P2P)
