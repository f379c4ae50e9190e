"""The command line through other programs and what they pass on, each end a process of its own."""

from __future__ import annotations

import json
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli_programs import LIMIT, Program, device, digest_and_state, run, set_running
from vfiostream.cli import main
from vfiostream.uapi.four_region import State

OURS = f"{shlex.quote(sys.executable)} -m vfiostream"
MEMORY = ("--memory", "4MiB", "--seed")


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    folder = tmp_path_factory.mktemp("d")
    with device(folder / "a", *MEMORY, "1") as source, device(folder / "b", *MEMORY, "2") as target:
        yield source, target


@pytest.fixture
def source(devices: tuple[str, str]) -> str:
    set_running(devices[0])
    return devices[0]


@pytest.fixture
def target(devices: tuple[str, str]) -> str:
    return devices[1]


def check_moved(source: str, target: str) -> None:
    digest, state = digest_and_state(source)
    assert state == State.STOP
    assert digest_and_state(target) == (digest, State.RUNNING)


def check_kept(source: str, target: str) -> None:
    assert digest_and_state(source) == digest_and_state(target)
    assert digest_and_state(source)[1] == State.RUNNING


# ---- a move


def test_send_through_a_program_to_receive_at_its_standard_input(source: str, target: str) -> None:
    """As with ssh in between. All that the receiver says goes to its standard error, which is ours."""
    sent = run("send", source, f"exec:{OURS} receive stdio: {target} --json", "--quiet")
    assert (sent.code, sent.output) == (0, ""), sent
    said = [json.loads(line) for line in sent.errors.splitlines()]
    assert said[0] == {"message_type": "status", "phase": "listening", "address": "stdio:"}
    assert said[-1]["message_type"] == "summary"
    check_moved(source, target)


def test_receive_from_a_program_that_sends_at_its_standard_output(source: str, target: str) -> None:
    got = run("receive", f"exec:{OURS} send {source} stdio: --json", target, "--json")
    assert got.code == 0, got
    assert got.events[-1]["message_type"] == "summary"
    said = [json.loads(line) for line in got.errors.splitlines()]
    assert said[-1]["message_type"] == "summary"
    check_moved(source, target)


def test_through_a_shell_that_changes_nothing(source: str, target: str) -> None:
    assert run("send", source, f"exec:cat | {OURS} receive stdio: {target} --quiet | cat", "--quiet") == (0, "", "")
    check_moved(source, target)


def test_what_the_receiver_refuses_is_told_through_the_program(source: str, tmp_path: Path) -> None:
    with device(tmp_path / "small", "--memory", "1MiB") as small:
        sent = run("send", source, f"exec:{OURS} receive stdio: {small}", "--json")
    assert (sent.code, sent.events[-1]["error"], sent.events[-1]["source"]) == (5, "PeerAborted", "running")
    assert digest_and_state(source)[1] == State.RUNNING


def test_a_program_that_fails_is_named_and_the_source_runs(source: str) -> None:
    sent = run("send", source, "exec:echo no way there >&2; exit 9", "--json")
    failure = sent.events[-1]
    assert (sent.code, failure["error"], failure["source"]) == (1, "ConnectionLost", "running")
    assert "ended with exit status 9" in failure["message"]
    assert sent.errors == "no way there\n"
    assert digest_and_state(source)[1] == State.RUNNING


def test_over_a_socket_that_was_passed_on(source: str, target: str) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        receiver = Program("receive", f"fd:{theirs.fileno()}", target, "--json", pass_fds=[theirs.fileno()])
        with receiver, Program("send", source, f"fd:{ours.fileno()}", "--json", pass_fds=[ours.fileno()]) as sender:
            ours.close()
            theirs.close()
            assert sender.end().code == 0
            assert receiver.end().code == 0
    check_moved(source, target)


AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="move")
os.execv(sys.executable, [sys.executable, "-m", "vfiostream", *sys.argv[2:]])
"""
"""What systemd does for a socket unit of FileDescriptorName=move, before it starts the service (sd_listen_fds(3))."""


def test_a_service_that_systemd_starts_receives(source: str, target: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unit:
        receiver = subprocess.Popen(
            [sys.executable, "-c", AS_SYSTEMD, str(unit.fileno()), "receive", "systemd:move", target, "--quiet"],
            pass_fds=[unit.fileno()],
        )
        try:
            assert run("send", source, f"tcp:127.0.0.1:{unit.getsockname()[1]}", "--quiet") == (0, "", "")
            assert receiver.wait(LIMIT) == 0
        finally:
            receiver.kill()
            receiver.wait()
    check_moved(source, target)


# ---- a checkpoint


def test_a_checkpoint_through_gzip_and_back(source: str, target: str, tmp_path: Path) -> None:
    kept = tmp_path / "kept.gz"
    saved = run("save", source, f"exec:gzip -1 > {kept}", "--json")
    assert saved.code == 0, saved
    assert kept.read_bytes()[:2] == b"\x1f\x8b"
    verified = run("verify", f"exec:gzip -dc {kept}", "--json")
    assert (verified.code, verified.events[-1]["status"]) == (0, "verified")
    assert verified.events[-1]["file_size"] == saved.events[-1]["transferred"]
    assert run("restore", f"exec:gzip -dc {kept}", target, "--quiet") == (0, "", "")
    check_kept(source, target)


def test_a_checkpoint_through_pipes_of_the_shell(source: str, target: str, tmp_path: Path) -> None:
    """Nothing but the checkpoint is in the pipe: what is printed goes to standard error."""
    kept = tmp_path / "kept.gz"
    moved = subprocess.run(
        f"{OURS} save {source} stdio: --json | gzip -1 > {kept} && gzip -dc {kept} | {OURS} restore stdio: {target}",
        shell=True,
        capture_output=True,
        timeout=LIMIT,
        check=True,
    )
    assert moved.stdout == b""
    assert b'"message_type": "summary"' in moved.stderr
    check_kept(source, target)


def test_a_program_that_does_not_keep_it(source: str) -> None:
    saved = run("save", source, "exec:cat > /dev/null; exit 3", "--json")
    failure = saved.events[-1]
    assert (saved.code, failure["error"], failure["source"]) == (1, "TransportError", "running")
    assert "the program ended with exit status 3; see what it says" in failure["message"]
    assert digest_and_state(source)[1] == State.RUNNING


def test_a_program_that_gives_a_whole_checkpoint_and_fails(source: str, target: str, tmp_path: Path) -> None:
    assert run("save", source, f"file:{tmp_path}/x", "--quiet").code == 0
    before = digest_and_state(target)[0]
    ended = run("restore", f"exec:cat {tmp_path}/x; exit 3", target)
    assert (ended.code, ended.output) == (1, "")
    assert "ended with exit status 3" in ended.errors
    assert digest_and_state(target)[1] != State.RUNNING
    assert before


# ---- usage


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["save", "vfio-user:x", "tcp:h:1"], "use send and receive, or write file:PATH, or exec:COMMAND"),
        (["restore", "unix:/x", "vfio-user:x"], "use send and receive"),
        (["verify", "tls:h:1"], "use send and receive"),
        (["save", "vfio-user:x", "exec:"], "is not an address"),
        (["save", "vfio-user:x", "nothing:x"], "is not an address"),
        (["save", "vfio-user:x", "exec:cat", "--force"], "has no replace"),
        (["send", "vfio-user:x", "exec:cat", "--plain"], "no such option"),
        (["receive", "exec:cat", "vfio-user:x", "--plain"], "has no plain"),
        (["inspect", "exec:cat x"], "write file:PATH"),
    ],
)
def test_usage_is_known_before_anything_is_opened(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"vfiostream: [^\n]+\n", err)
    assert expected in err


@pytest.mark.parametrize("address", ["stdio:", "fd:0,1", "fd:1"])
def test_nothing_is_printed_where_standard_output_is_the_link(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["receive", address, "vfio-user:x", "--json", "--budget", "1"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err)["code"] == 2


def test_a_regular_file_is_named_as_one(source: str, tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        ended = subprocess.run(
            [sys.executable, "-m", "vfiostream", "save", source, "stdio:"],
            stdout=file, stderr=subprocess.PIPE, timeout=LIMIT, check=False,
        )  # fmt: skip
    assert ended.returncode == 2
    assert b"descriptor 1 is a regular file; name it as file:PATH" in ended.stderr
    assert (tmp_path / "x").stat().st_size == 0
