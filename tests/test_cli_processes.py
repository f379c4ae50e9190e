"""The command line as other programs meet it: real processes, devices in processes of their own, signals, exit codes.

Nothing here sleeps: what has to happen first is read from the output of who does it.
"""

from __future__ import annotations

import json
import os
import pty
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from tests.cli_programs import LIMIT, Ended, Program, device, digest_and_state, run, set_running
from tests.cutting_proxy import CuttingProxy
from vfiostream.cli import main
from vfiostream.uapi.four_region import State

MIB = 1 << 20
GPA = 4 << 30
DOCUMENT = Path(__file__).parent.parent / "docs" / "command-line.md"

SLOW = ("--max-bandwidth", "2MiB")
"""On the link of a test that needs time to do something in the middle of a round."""


def sentence(ended: Ended) -> str:
    """What a command that failed has said: one sentence and nothing else."""
    assert ended.output == ""
    assert re.fullmatch(r"vfiostream: [^\n]+\n", ended.errors)
    return ended.errors.removeprefix("vfiostream: ").rstrip()


def documented(heading: str) -> dict[str, set[str]]:
    """The fields that docs/command-line.md lists under ``heading``, with the JSON types they may have."""
    section = DOCUMENT.read_text().split(f"\n### {heading}\n")[1].split("\n### ")[0]
    rows = re.findall(r"^\| `(\w+)` \| ([a-z ]+) \|", section, re.MULTILINE)
    return {name: set(types.split(" or ")) for name, types in rows}


def json_type(value: Any) -> str:
    if isinstance(value, float):
        return "number"
    return {type(None): "null", bool: "boolean", int: "integer", str: "string", list: "array", dict: "object"}[
        type(value)
    ]


def check_fields(event: dict[str, Any], heading: str, *more: str) -> None:
    """``event`` has just the fields documented under ``heading`` (and ``more``), each of a type it may have."""
    fields = documented(heading)
    assert fields
    assert set(event) == {*fields, *more}
    for name, types in fields.items():
        kind = json_type(event[name])
        assert kind in types or (kind == "integer" and "number" in types), (name, event[name])


def short_folder() -> AbstractContextManager[str]:
    """A folder whose paths are short enough for UNIX sockets."""
    return tempfile.TemporaryDirectory(prefix="vfiostream-")


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    with short_folder() as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def lasting_source() -> Iterator[str]:
    with short_folder() as folder:
        options = ("--memory", "16MiB", "--seed", "1", "--dirty-rate", "8MiB")
        with device(Path(folder) / "a.sock", *options) as address:
            yield address


@pytest.fixture
def source(lasting_source: str) -> str:
    """A device that runs, and that is written while it moves."""
    set_running(lasting_source)
    return lasting_source


@pytest.fixture(scope="module")
def still() -> Iterator[str]:
    """A device that runs, and that nothing changes."""
    with short_folder() as folder:
        with device(Path(folder) / "s.sock", "--memory", "16MiB", "--seed", "3") as address:
            yield address


@pytest.fixture
def target(socket_dir: Path) -> Iterator[str]:
    with device(socket_dir / "b.sock", "--memory", "16MiB", "--seed", "2") as address:
        yield address


@pytest.fixture(scope="module")
def checkpoint(still: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "made"
    assert run("save", still, f"file:{path}", "--quiet") == (0, "", "")
    return path


Call = Callable[..., Ended]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """As ``run``, in this process: for a command whose being a process is not what is tested."""

    def called(*arguments: object) -> Ended:
        code = main([str(argument) for argument in arguments])
        return Ended(code, *capsys.readouterr())

    return called


def listening(receiver: Program) -> str:
    address: str = receiver.phase("listening")["address"]
    return address


# ---- it moves


@pytest.mark.parametrize("link", ["tcp", "unix"])
def test_a_busy_device_and_guest_memory_arrive(
    link: str, source: str, target: str, tmp_path: Path, socket_dir: Path
) -> None:
    sent, got = tmp_path / "sent", tmp_path / "got"
    for path in (sent, got):
        path.touch()
        os.truncate(path, 4 * MIB)
    there = "tcp:127.0.0.1:0" if link == "tcp" else f"unix:{socket_dir}/link"
    with Program("receive", there, target, "--guest-memory", f"{GPA:#x}={got}", "--json") as receiver:
        ready = receiver.phase("listening")
        check_fields(ready, "status of receive, when it listens")
        sender = run("send", source, ready["address"], "--guest-memory", f"{GPA}={sent}", "--json", "--compress", "1")
        received = receiver.end()
    assert (sender.code, sender.errors, received.code, received.errors) == (0, "", 0, "")

    for events in (sender.events, received.events):
        *statuses, summary = events
        for status in statuses:
            check_fields(status, "status of send, receive, save, restore, demo")
        check_fields(summary, "summary of send, receive, save, restore, demo")
        assert [status["phase"] for status in statuses][-1] == "done"
        assert summary["bytes"] > 20 * MIB
        assert list(summary["downtime"]) == ["pause", "stop", "memory", "config", "load", "start"]
        assert sum(summary["downtime"].values()) == pytest.approx(summary["downtime_seconds"])
        assert summary["downtime"]["start"] > 0

    here, state = digest_and_state(source)
    assert state == State.STOP
    assert digest_and_state(target) == (here, State.RUNNING)
    assert sent.read_bytes() == got.read_bytes()
    assert any(sent.read_bytes())

    # The way back for a source that was left stopped.
    resumed = run("device", "resume", source)
    assert resumed == (0, f"{source} runs\n", "")
    assert digest_and_state(source)[1] == State.RUNNING


def test_a_checkpoint_is_made_checked_and_loaded(still: str, target: str, tmp_path: Path) -> None:
    path = tmp_path / "c"
    saved = run("save", still, f"file:{path}")
    assert (saved.code, saved.errors) == (0, "")
    assert re.match(r"done in .*, 2 rounds\n", saved.output)
    for word in ("content", "transferred", "downtime", "pause", "buffers"):
        assert word in saved.output
    here, state = digest_and_state(still)
    assert state == State.RUNNING

    verified = run("verify", f"file:{path}", "--json")
    inspected = run("inspect", f"file:{path}", "--json")
    for ended, status in ((verified, "verified"), (inspected, "complete")):
        assert (ended.code, ended.errors) == (0, "")
        (event,) = ended.events
        check_fields(event, "summary of inspect, verify")
        assert event["status"] == status
        (entry,) = event["devices"]
        check_fields(entry, "a device")
        assert entry["flags"] == ["device-memory", "system-memory"]
        assert entry["config_limit"] > entry["config_size"]
        assert (event["rounds"], event["file_size"]) == (2, path.stat().st_size)
        assert event["bytes"] == event["memory"] + event["pages"] + event["config"]

    restored = run("restore", f"file:{path}", target, "--json")
    assert (restored.code, restored.errors) == (0, "")
    check_fields(restored.events[-1], "summary of send, receive, save, restore, demo")
    assert digest_and_state(target) == (here, State.RUNNING)


def test_check(call: Call, source: str, target: str) -> None:
    alone = call("check", source)
    assert (alone.code, alone.errors) == (0, "")
    assert alone.output.endswith(f"{source} can move\n")
    both = call("check", source, target, "--json")
    assert both.code == 0
    (event,) = both.events
    check_fields(event, "summary of check")
    check_fields(event["source"], "a device")
    check_fields(event["target"], "a device")
    assert (event["driver_asked"], event["notes"]) == (True, [])

    own = call("check", f"version:{event['source']['version']}", source, "--json")
    other = call("check", "version:another", source, "--json")
    for ended, code, status in ((own, 0, "compatible"), (other, 5, "incompatible")):
        assert ended.code == code
        (event,) = ended.events
        check_fields(event, "summary of check")
        assert (event["status"], event["source"], event["driver_asked"]) == (status, None, True)
    assert "'another'" in event["reasons"][0]
    assert digest_and_state(source)[1] == State.RUNNING


def test_check_of_what_is_not_here(call: Call, still: str, target: str, checkpoint: Path, tmp_path: Path) -> None:
    printed = call("describe", still)
    assert (printed.code, printed.errors) == (0, "")
    file = tmp_path / "still.json"
    file.write_text(printed.output)
    of_checkpoint = call("describe", f"file:{checkpoint}")
    assert json.loads(of_checkpoint.output)["device"] == json.loads(printed.output)["device"]

    stored = (f"file:{file}", f"file:{checkpoint}")
    for source in (still, *stored):
        for target_of in (target, *stored):
            ended = call("check", source, target_of, "--json")
            assert (ended.code, ended.errors) == (0, "")
            (event,) = ended.events
            check_fields(event, "summary of check")
            assert (event["source"]["name"], event["driver_asked"]) == (still, target_of == target)
            assert [f"{still} is only described" in note for note in event["notes"]] == [True] * (target_of != target)
    said = call("check", stored[1], stored[0])
    assert said.code == 0
    assert "\nnote           " in said.output
    assert said.output.endswith(f"{stored[1]} can go to {stored[0]}\n")

    file.write_text(printed.output.replace('"four-region"', '"two-region"'))
    refused = call("check", stored[0], target)
    assert refused.code == 5
    assert "the source speaks the interface two-region, the target four-region" in refused.output
    file.write_text(printed.output[:-10])
    bad = call("check", stored[0], target)
    assert bad.code == 4
    assert "neither a checkpoint nor a description" in sentence(bad)
    file.write_bytes(checkpoint.read_bytes()[:200])
    assert call("check", stored[0]).code == 4
    file.unlink()
    assert call("check", stored[0]).code == 1


@pytest.mark.parametrize("payloads", [True, False])
def test_a_device_is_recorded_and_replayed(
    call: Call, still: str, target: str, checkpoint: Path, tmp_path: Path, payloads: bool
) -> None:
    here, there, again = tmp_path / "here.record", tmp_path / "there.record", tmp_path / "again"
    options = ("--record-payloads",) if payloads else ()
    rounds = ("--max-rounds", "1", "--if-not-converged", "stop")
    saved = call("save", still, f"file:{tmp_path / 'c'}", "--record", here, *options, *rounds)
    assert (saved.code, saved.errors) == (0, "")
    assert "warning" not in saved.output
    assert call("restore", f"file:{checkpoint}", target, "--record", there, *options).code == 0

    replayed = call("save", f"replay:{here}", f"file:{again}", "--json", "--chunk", "64KiB", *rounds)
    assert (replayed.code, replayed.errors) == (0, "")
    (warning,) = replayed.events[-1]["warnings"]
    assert warning.startswith(f"replay:{here} is a record of {still} and no device")
    assert ("zeros" in warning) != payloads
    assert call("verify", f"file:{again}").code == 0
    (original,), (made_up,) = (call("inspect", f"file:{path}", "--json").events for path in (tmp_path / "c", again))
    assert made_up["devices"] == [{**original["devices"][0], "name": f"replay:{here}"}]
    for size in ("rounds", "memory", "config"):
        assert made_up[size] == original[size]

    restored = call("restore", f"file:{checkpoint}", f"replay:{there}", "--json")
    assert (restored.code, restored.errors) == (0, "")
    assert restored.events[-1]["warnings"][0].startswith(f"replay:{there} is a record of {target}")
    other = call("restore", f"file:{again}", f"replay:{there}")
    assert other.code == (1 if payloads else 0)  # other bytes: a record without any can't tell
    assert call("check", f"replay:{here}", f"replay:{there}").code == 0

    diverged = call("device", "resume", f"replay:{there}")
    assert diverged.code == 1
    assert "where event 22 of the record is to write" in sentence(diverged)


def test_a_busy_device_is_replayed_in_as_many_rounds(source: str, tmp_path: Path) -> None:
    memory = tmp_path / "memory"
    memory.touch()
    os.truncate(memory, 4 * MIB)
    rounds = ("--downtime-limit", "0ms", "--max-rounds", "3", "--if-not-converged", "stop")
    options = ("--guest-memory", f"{GPA}={memory}", "--json", *rounds)
    saved = run("save", source, f"file:{tmp_path / 'a'}", "--record", tmp_path / "r", *options)
    replayed = run("save", f"replay:{tmp_path / 'r'}", f"file:{tmp_path / 'b'}", "--chunk", "128KiB", *options)
    for ended in (saved, replayed):
        assert (ended.code, ended.errors) == (0, "")
        assert ended.events[-1]["rounds"] == 4


def test_each_device_has_its_record(call: Call, source: str, target: str, tmp_path: Path) -> None:
    files = tmp_path / "a.record", tmp_path / "b.record"
    records = tuple(word for file in files for word in ("--record", file))
    assert call("check", source, target, *records).code == 0
    replayed = call("check", *(f"replay:{file}" for file in files), "--json")
    assert replayed.code == 0
    (event,) = replayed.events
    assert [event[end]["name"] for end in ("source", "target")] == [f"replay:{file}" for file in files]
    taken = call("check", source, "--record", files[0])
    assert taken.code == 2
    assert "File exists" in sentence(taken)


def test_a_record_can_be_read(call: Call, source: str, tmp_path: Path) -> None:
    file = tmp_path / "a.record"
    assert call("device", "resume", source, "--record", file).code == 0
    shown = call("record", "show", file)
    assert (shown.code, shown.errors) == (0, "")
    first, *_, state, last, end = shown.output.splitlines()
    assert re.match(rf" +1 +0\.\d{{6}}  open {source}: is_pci True, .* \(\d+\.\d{{3}} ms\)$", first)
    assert "write 4 bytes (00000000) to region 9 at 0x4: done" in state
    assert "close" in last
    assert end == "the record ends there"
    *events, summary = call("record", "show", file, "--json").events
    for event in events:
        check_fields(event, "event of record show")
    check_fields(summary, "summary of record show")
    assert summary["events"] == len(events) == events[-1]["number"]
    assert events[-2]["written"] == {"size": 4, "xxh3": events[-2]["written"]["xxh3"], "bytes": "00000000"}

    whole = file.read_bytes()
    file.write_bytes(whole[:-30])
    cut = call("record", "show", file, "--json")
    assert (cut.code, cut.events[-1]["status"]) == (0, "cut")
    assert not cut.events[-2]["answered"]
    file.write_bytes(whole[:-3] + b"xyz")
    damaged = call("record", "show", file)
    assert damaged.code == 4
    assert "is damaged" in damaged.errors
    assert damaged.output.splitlines() == shown.output.splitlines()[:-2]


def test_progress_on_a_terminal(still: str, tmp_path: Path) -> None:
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "vfiostream", "save", still, f"file:{tmp_path / 'c'}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=terminal,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )
    os.close(terminal)
    try:
        output, _ = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
        process.wait()
    shown = b""
    try:
        while piece := os.read(screen, 65536):
            shown += piece
    except OSError:
        pass  # EIO is how a pseudo-terminal says that the other end is closed.
    os.close(screen)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "phase         round" in text
    for phase in ("precopy", "stop-and-copy", "finishing", "done"):
        assert re.search(rf"^{phase} ", text, re.MULTILINE)
    assert output.startswith(b"done in ")
    assert process.returncode == 0


def test_verbose_logs_each_device_access_and_record(still: str, tmp_path: Path) -> None:
    ended = run("save", still, f"file:{tmp_path / 'c'}", "-v", "--quiet")
    assert (ended.code, ended.output) == (0, "")
    for layer, event in (
        ("access", "REGION_WRITE"),
        ("device", "set device state to STOP_LOGGING"),
        ("protocol", "COMMIT"),
        ("transport", "written and durable"),
        ("pipeline", "RoundReport"),
    ):
        assert re.search(rf"vfiostream\.{layer} DEBUG .*{event}", ended.errors)


def test_nobody_reads_the_output_and_the_device_moves_all_the_same(source: str, target: str) -> None:
    with Program("receive", "tcp:127.0.0.1:0", target, "--json") as receiver:
        address = listening(receiver)
        with Program("send", source, address, "--json") as sender:
            sender.stop_reading()
            assert receiver.end().code == 0
            ended = sender.end()
    assert ended == (0, "", "vfiostream: standard output can't be written (Broken pipe)\n")
    assert digest_and_state(target)[1] == State.RUNNING


def test_output_that_is_not_read_does_not_hold_up_the_device(source: str, target: str) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with open(reading, "rb") as reader, Program("receive", "tcp:127.0.0.1:0", target, "--json") as receiver:
        try:
            while os.write(writing, bytes(4096)):
                pass
        except BlockingIOError:
            os.set_blocking(writing, True)
        address = listening(receiver)
        command = [sys.executable, "-m", "vfiostream", "send", source, address, "--json"]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=writing) as sender:
            os.close(writing)
            try:
                assert receiver.end().code == 0
                assert sender.poll() is None
                lines = reader.read().lstrip(b"\0").splitlines()
                assert sender.wait(LIMIT) == 0
            finally:
                sender.kill()
    assert [json.loads(line)["message_type"] for line in lines][-2:] == ["status", "summary"]


# ---- bad input


def test_no_device(call: Call, target: str, socket_dir: Path, tmp_path: Path) -> None:
    missing = f"vfio-user:{socket_dir}/missing"
    for arguments in (
        ("send", missing, "tcp:127.0.0.1:9"),
        ("receive", "tcp:127.0.0.1:0", missing),
        ("save", missing, f"file:{tmp_path / 'c'}"),
        ("check", missing),
        ("device", "resume", missing),
    ):
        ended = call(*arguments)
        assert ended.code == 1
        assert missing in sentence(ended)
    assert not list(tmp_path.iterdir())


def test_what_is_no_device(socket_dir: Path) -> None:
    path = socket_dir / "stranger"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with Program("check", f"vfio-user:{path}") as program:
            listener.settimeout(LIMIT)
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(LIMIT)
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                ended = program.end()
    assert ended.code == 1
    assert str(path) in sentence(ended)


def test_nobody_listens(call: Call, source: str, socket_dir: Path) -> None:
    ended = call("send", source, f"unix:{socket_dir}/nobody")
    assert ended.code == 1
    assert "start `vfiostream receive` on it first" in sentence(ended)


def refused(source: str, target: str) -> tuple[Ended, Ended]:
    """Try to move; returns how sender and receiver end. The source runs and the target holds what it held."""
    before, _ = digest_and_state(target)
    with Program("receive", "tcp:127.0.0.1:0", target, "--json") as receiver:
        sender = run("send", source, listening(receiver), "--json")
        received = receiver.end()
    assert digest_and_state(source)[1] == State.RUNNING
    after, _ = digest_and_state(target)
    assert after == before
    for ended, more in ((sender, ("source",)), (received, ())):
        check_fields(ended.events[-1], "error", *more)
        assert ended.events[-1]["code"] == ended.code
    assert sender.events[-1]["source"] == "running"
    return sender, received


def test_another_version(source: str, socket_dir: Path) -> None:
    with device(socket_dir / "o.sock", "--memory", "16MiB", "--version-string", "other") as target:
        sender, received = refused(source, target)
        assert (sender.code, received.code) == (5, 5)
        assert "does not take version" in received.events[-1]["message"]
        assert "does not take version" in sender.events[-1]["message"]
        checked = run("check", source, target)
        assert checked.code == 5
        assert "can't go to" in checked.output


def test_less_memory(source: str, socket_dir: Path) -> None:
    with device(socket_dir / "o.sock", "--memory", "8MiB", "--accept", "*") as target:
        sender, received = refused(source, target)
    assert (sender.code, received.code) == (1, 1)
    assert "the driver refused" in received.events[-1]["message"]


def test_a_region_too_small(socket_dir: Path) -> None:
    big = ("--config", "512KiB", "--config-region", "1MiB", "--memory", "0")
    small = ("--config", "64KiB", "--config-region", "128KiB", "--memory", "0", "--accept", "*")
    with device(socket_dir / "a.sock", *big) as source, device(socket_dir / "b.sock", *small) as target:
        sender, received = refused(source, target)
    assert (sender.code, received.code) == (5, 5)
    assert "does not fit the target's config region" in received.events[-1]["message"]


def test_guest_memory_of_another_size(source: str, target: str, tmp_path: Path) -> None:
    for name, size in (("sent", MIB), ("got", 2 * MIB)):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, size)
    with Program("receive", "tcp:127.0.0.1:0", target, "--json", "--guest-memory", f"0={tmp_path}/got") as receiver:
        sender = run("send", source, listening(receiver), "--guest-memory", f"0={tmp_path}/sent")
        assert receiver.end().code == 5
    assert sender.code == 5
    assert "the guest memory differs" in sentence(sender)


def test_a_socket_in_use(call: Call, source: str, target: str, socket_dir: Path) -> None:
    path = source.removeprefix("vfio-user:")
    served = call("device", "serve", path)
    assert served.code == 2
    assert "a server is listening there" in sentence(served)
    received = call("receive", f"unix:{path}", target)
    assert received.code == 1
    assert "choose another path" in sentence(received)
    assert digest_and_state(source)[1] == State.RUNNING


def test_a_file_that_exists(call: Call, still: str, tmp_path: Path) -> None:
    path = tmp_path / "c"
    path.write_bytes(b"mine")
    ended = call("save", still, f"file:{path}")
    assert ended.code == 1
    assert "--force" in sentence(ended)
    assert path.read_bytes() == b"mine"
    assert call("save", still, f"file:{path}", "--force").code == 0
    assert call("verify", f"file:{path}").code == 0
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk(still: str, tmp_path: Path) -> None:
    def small_files_only() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))

    ended = run("save", still, f"file:{tmp_path / 'c'}", "--compress", "0", preexec_fn=small_files_only)
    assert ended.code == 1
    assert "writing failed" in sentence(ended)
    assert not list(tmp_path.iterdir())
    assert digest_and_state(still)[1] == State.RUNNING


def changed(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("damage", "said", "whole"),
    [
        (changed, "record", True),
        (lambda data: data[: len(data) // 2], "is cut", False),
        (lambda data: data[:-49], "the stream ends where", False),
        (lambda data: data + b"\0", "goes on after its COMMIT", False),
        (lambda data: b"", "the stream ends where", None),
        (lambda data: b"x" * 200, "magic", None),
    ],
    ids=["changed", "cut", "without its end", "longer", "empty", "something else"],
)
def test_a_damaged_checkpoint(
    call: Call, damage: Any, said: str, whole: bool | None, checkpoint: Path, target: str, tmp_path: Path
) -> None:
    path = tmp_path / "damaged"
    path.write_bytes(damage(checkpoint.read_bytes()))
    before, _ = digest_and_state(target)
    for ended in (call("verify", f"file:{path}"), call("restore", f"file:{path}", target)):
        assert ended.code == 4
        assert said in sentence(ended)
    if whole is None:
        assert digest_and_state(target) == (before, State.RUNNING)
    else:
        assert digest_and_state(target)[1] == State.STOP

    inspected = call("inspect", f"file:{path}", "--json")
    (event,) = inspected.events
    if whole is None:
        assert (inspected.code, event["message_type"]) == (4, "error")
    else:
        assert inspected.code == (0 if whole else 4)
        assert event["status"] == ("complete" if whole else "incomplete")


def test_no_checkpoint(call: Call, target: str, tmp_path: Path) -> None:
    for arguments in (
        ("verify", f"file:{tmp_path}/c"),
        ("inspect", f"file:{tmp_path}/c"),
        ("restore", f"file:{tmp_path}/c", target),
    ):
        ended = call(*arguments)
        assert ended.code == 1
        assert f"file:{tmp_path}/c" in sentence(ended)


def test_traceback_gives_the_rest(call: Call, socket_dir: Path) -> None:
    ended = call("check", f"vfio-user:{socket_dir}/missing", "--traceback")
    assert ended.code == 1
    assert ended.errors.startswith("Traceback")
    assert re.search(r"\nvfiostream: [^\n]+\n$", ended.errors)


# ---- asked and changed while it runs


def test_a_limit_is_changed_while_it_holds(source: str, target: str, socket_dir: Path) -> None:
    ours, theirs = socket_dir / "ours", socket_dir / "theirs"
    with Program("receive", "tcp:127.0.0.1:0", target, "--json", "--control", theirs) as receiver:
        with Program("send", source, listening(receiver), "--json", "--max-bandwidth", 1, "--control", ours) as sender:
            receiver.until(lambda event: event["phase"] == "precopy")
            seen = run("control", ours, "status", "--json")
            (event,) = seen.events
            check_fields(event, "summary of control")
            assert (event["phase"], event["max_bandwidth"], event["switchover_bandwidth"]) == ("precopy", 1, None)
            plain = run("control", theirs, "status")
            assert (plain.code, plain.errors) == (0, "")
            assert re.match("precopy, round [01], for ", plain.output)

            refused = run("control", theirs, "set", "max-bandwidth", "1GiB")
            assert refused.code == 2
            assert "this end has no limits" in sentence(refused)
            changed = run("control", ours, "set", "switchover-bandwidth", "1GiB/s", "--json")
            assert (changed.events[0]["max_bandwidth"], changed.events[0]["switchover_bandwidth"]) == (1, 1 << 30)
            assert run("control", ours, "set", "max-bandwidth", "none").code == 0
            ended, received = sender.end(), receiver.end()
    assert (ended.code, received.code) == (0, 0)
    assert not list(socket_dir.glob("*urs"))
    assert not theirs.exists()
    gone = run("control", ours, "status")
    assert gone.code == 1
    assert "no command answers there" in sentence(gone)


def test_a_save_and_a_restore_answer_too(
    still: str, target: str, checkpoint: Path, tmp_path: Path, socket_dir: Path
) -> None:
    path = socket_dir / "control"
    with Program("save", still, f"file:{tmp_path / 'c'}", "--json", "--max-bandwidth", 1, "--control", path) as saver:
        saver.phase("precopy")
        assert run("control", path, "set", "max-bandwidth", "none", "--json").events[0]["max_bandwidth"] is None
        assert saver.end().code == 0
    busy = run("restore", f"file:{checkpoint}", target, "--control", tmp_path)
    assert busy.code == 1
    assert "is not a socket" in sentence(busy)
    assert run("restore", f"file:{checkpoint}", target, "--control", path).code == 0


# ---- called off


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_sender_is_interrupted(number: signal.Signals, source: str, target: str) -> None:
    with Program("receive", "tcp:127.0.0.1:0", target, "--json") as receiver:
        with Program("send", source, listening(receiver), "--json", *SLOW) as sender:
            sender.until(lambda event: event.get("bytes", 0) > 0)
            sender.signal(number)
            sender.signal(number)
            ended = sender.end()
        received = receiver.end()
    assert (ended.code, ended.errors) == (6, "")
    event = ended.events[-1]
    check_fields(event, "error", "source")
    assert (event["code"], event["error"], event["source"]) == (6, "Cancelled", "running")
    assert received.code == 1
    assert "cancelled" in received.events[-1]["message"]
    assert digest_and_state(source)[1] == State.RUNNING
    assert digest_and_state(target)[1] == State.STOP


def test_the_receiver_is_interrupted(source: str, target: str) -> None:
    with Program("receive", "tcp:127.0.0.1:0", target, "--json") as receiver:
        with Program("send", source, listening(receiver), *SLOW) as sender:
            receiver.until(lambda event: event.get("bytes", 0) > 0)
            receiver.signal(signal.SIGINT)
            received = receiver.end()
            ended = sender.end()
    assert (received.code, received.events[-1]["error"]) == (6, "Cancelled")
    assert ended.code == 1
    assert "cancelled" in sentence(ended)
    assert digest_and_state(source)[1] == State.RUNNING
    assert digest_and_state(target)[1] == State.STOP


def test_a_receiver_that_waits_is_interrupted(target: str) -> None:
    with Program("receive", "tcp:127.0.0.1:0", target) as receiver:
        assert receiver.line().startswith("listening on tcp:127.0.0.1:")
        receiver.signal(signal.SIGINT)
        ended = receiver.end()
    assert ended.code == 6
    assert "cancelled" in sentence(ended)
    assert digest_and_state(target)[1] == State.RUNNING


def test_a_save_is_interrupted(source: str, tmp_path: Path) -> None:
    with Program("save", source, f"file:{tmp_path / 'c'}", "--json", *SLOW) as saver:
        saver.until(lambda event: event.get("bytes", 0) > 0)
        saver.signal(signal.SIGINT)
        ended = saver.end()
    assert (ended.code, ended.events[-1]["source"]) == (6, "running")
    assert not list(tmp_path.iterdir())
    assert digest_and_state(source)[1] == State.RUNNING


def test_it_does_not_converge(source: str, target: str, tmp_path: Path) -> None:
    never = ("--downtime-limit", "0ms", "--max-rounds", "2")
    with Program("receive", "tcp:127.0.0.1:0", target, "--json") as receiver:
        ended = run("send", source, listening(receiver), "--json", *never)
        received = receiver.end()
    event = ended.events[-1]
    assert (ended.code, event["error"], event["source"]) == (6, "NotConverged", "running")
    assert received.code == 1
    assert digest_and_state(source)[1] == State.RUNNING
    assert digest_and_state(target)[1] == State.STOP

    stopped = run("save", source, f"file:{tmp_path / 'c'}", "--json", *never, "--if-not-converged", "stop")
    assert (stopped.code, stopped.events[-1]["rounds"]) == (0, 3)


def test_an_interrupt_after_the_commit_is_too_late(source: str, socket_dir: Path) -> None:
    link = f"unix:{socket_dir}/link"
    with device(socket_dir / "b.sock", "--memory", "16MiB", "--state-time", "300ms") as target:
        with Program("receive", link, target, "-v", stderr=subprocess.STDOUT) as receiver:
            receiver.line_with(f"listening on {link}")
            with Program("send", source, link, "--json") as sender:
                receiver.line_with("COMMITTED on COMMIT")
                for program in (sender, receiver):
                    program.signal(signal.SIGINT)
                ended, received = sender.end(), receiver.end()
        assert (ended.code, ended.events[-1]["status"]) == (0, "done")
        assert received.code == 0
        assert digest_and_state(target)[1] == State.RUNNING
    assert digest_and_state(source)[1] == State.STOP


# ---- outcome unknown


def test_the_target_does_not_answer_the_order_to_run(source: str, socket_dir: Path) -> None:
    faulty = ("--memory", "16MiB", "--fault", "set-state:2:hang")
    with device(socket_dir / "b.sock", *faulty) as target:
        with Program("receive", "tcp:127.0.0.1:0", target, "--json", "--device-timeout", "500ms") as receiver:
            ended = run("send", source, listening(receiver), "--json")
            received = receiver.end()
    event = ended.events[-1]
    check_fields(event, "error", "source")
    assert (ended.code, event["error"], event["source"]) == (7, "OutcomeUnknown", "stopped")
    assert (received.code, received.events[-1]["error"]) == (7, "OutcomeUnknown")
    assert digest_and_state(source)[1] == State.STOP


def test_the_source_can_not_be_resumed(target: str, socket_dir: Path) -> None:
    # RUNNING, then LOGGING, then the stop: the fourth is the way back.
    faulty = ("--memory", "16MiB", "--fault", "get-config:1:EIO", "--fault", "set-state:4:EIO")
    with device(socket_dir / "a.sock", *faulty) as source:
        with Program("receive", "tcp:127.0.0.1:0", target, "--json") as receiver:
            ended = run("send", source, listening(receiver), "--json")
            received = receiver.end()
        event = ended.events[-1]
        assert (ended.code, event["error"], event["source"]) == (7, "SourceStuck", "unknown")
        assert received.code == 1
        assert run("device", "resume", source).code == 0
        assert digest_and_state(source)[1] == State.RUNNING


# ---- the demo


def left_behind(folder: Path) -> list[str]:
    """Processes that name ``folder`` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace")
        except OSError:
            continue  # It has ended.
        if str(folder) in command:
            found.append(command)
    return found


def test_the_demo(socket_dir: Path) -> None:
    ended = run("demo", "--json", env={**os.environ, "TMPDIR": str(socket_dir)})
    assert (ended.code, ended.errors) == (0, "")
    *statuses, summary = ended.events
    for status in statuses:
        check_fields(status, "status of send, receive, save, restore, demo")
    check_fields(summary, "summary of send, receive, save, restore, demo", "simulated", "source", "target")
    assert summary["simulated"] is True
    assert summary["source"] == {**summary["target"], "state": "stop"}
    assert summary["target"]["state"] == "running"
    assert not list(socket_dir.iterdir())
    assert left_behind(socket_dir) == []


def test_the_demo_is_interrupted(socket_dir: Path) -> None:
    with Program("demo", "--json", env={**os.environ, "TMPDIR": str(socket_dir)}) as program:
        program.phase("precopy")
        program.signal(signal.SIGINT)
        ended = program.end()
    assert ended.code == 6
    assert ended.events[-1]["error"] == "Cancelled"
    assert not list(socket_dir.iterdir())
    assert left_behind(socket_dir) == []


# ---- links of several connections, one of which is cut by a program in between


@pytest.mark.parametrize("reconnect", [False, True])
def test_one_of_four_channels_is_cut(tmp_path: Path, reconnect: bool) -> None:
    def cuts(number: int, forth: int, _: int) -> bool:
        return number < 4 and forth > 100_000

    options = ["--memory", "8MiB", "--config", "4096"]
    with (
        device(tmp_path / "a", *options, "--seed", "1") as here,
        device(tmp_path / "b", *options, "--seed", "2") as there,
        Program("receive", "tcp:127.0.0.1:0", there, "--json") as target,
    ):
        before = digest_and_state(here)[0]
        address = target.until(lambda event: "address" in event)["address"]
        with CuttingProxy(int(address.rpartition(":")[2]), cuts) as proxy:
            words = ["--reconnect", "20s"] if reconnect else []
            sent = run("send", here, proxy.address, "--channels", "4", *words)
            received = target.end()
            assert proxy.cut
        if reconnect:
            assert (sent.code, received.code) == (0, 0), (sent, received)
            assert digest_and_state(there) == (before, State.RUNNING)
        else:
            assert (sent.code, received.code) == (1, 1), (sent, received)
            assert re.search(r"channel [1-4] of 4: ", sent.errors)
            assert digest_and_state(here)[1] == State.RUNNING
