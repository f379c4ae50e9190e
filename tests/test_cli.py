"""The command line without other processes: values, usage, help, exit codes, and what is printed."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import anyio
import click
import pytest
from click.testing import CliRunner
from rich.console import Console

from vfiostream import _accel, errors
from vfiostream.cli import COMMANDS, main, values, vfiostream
from vfiostream.cli.exits import Cancelled, Exit, failure_of
from vfiostream.cli.report import Json, Plain, Result, Status, Terminal, Watched
from vfiostream.vendor.settings import Settings, parse_fault

MIB = 1 << 20
MOVING = ("send", "receive", "save", "restore", "demo")
ANSWERING = ("check", "inspect", "verify")


# ---- values


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("12B", 12), ("64MiB", 64 << 20), ("1.5GiB", 3 << 29), ("1 KiB", 1024)],
)
def test_sizes(text: str, size: int) -> None:
    assert values.parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "MiB", "-1", "1e6", "1MB", "1mib", "0x10", "1.5", "0.3KiB", "9GiB GiB", "9999999999GiB", "٣", "1" * 5000],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="size|bytes"):
        values.parse_size(text)


@pytest.mark.parametrize(("text", "rate"), [("1GiB", 1 << 30), ("100MiB/s", 100 << 20)])
def test_rates(text: str, rate: int) -> None:
    assert values.parse_rate(text) == rate


@pytest.mark.parametrize(("text", "seconds"), [("300ms", 0.3), ("0ms", 0.0), ("2s", 2.0), ("1.5 s", 1.5)])
def test_times(text: str, seconds: float) -> None:
    assert values.parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "300", "3m", "-1s", "s", "infs"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match="time"):
        values.parse_time(text)


def test_guest_memory() -> None:
    assert values.parse_guest_memory("0x100000000=/a=b") == (1 << 32, Path("/a=b"))
    assert values.parse_guest_memory("4096=x") == (4096, Path("x"))


@pytest.mark.parametrize("text", ["", "x", "0x1000", "0x1000=", "=x", "zz=x", "-4096=x", f"{1 << 64}=x", "1=\0"])
def test_what_is_no_guest_memory(text: str) -> None:
    with pytest.raises(ValueError, match="guest memory|address"):
        values.parse_guest_memory(text)


@pytest.mark.parametrize("size", [0, 1, 1000, 4096, 65 << 10, 64 << 20, 3 << 30])
def test_a_size_is_written_as_it_is_read(size: int) -> None:
    assert values.parse_size(values.option_size(size)) == size


@pytest.mark.parametrize("seconds", [0.0, 0.3, 1.0, 30.0])
def test_a_time_is_written_as_it_is_read(seconds: float) -> None:
    assert values.parse_time(values.option_time(seconds)) == seconds


def test_what_people_read() -> None:
    assert [values.show_size(size) for size in (None, 5, 2048, 3 << 30)] == ["-", "5 B", "2.0 KiB", "3.0 GiB"]
    assert [values.show_time(seconds) for seconds in (None, 0.0123, 2.5)] == ["-", "12.3 ms", "2.50 s"]
    assert values.show_rate(1 << 20) == "1.0 MiB/s"


# ---- help and usage


def test_help_lists_every_command_and_exit_code() -> None:
    text = " ".join(CliRunner().invoke(vfiostream, ["--help"]).output.split())
    for name, (_, purpose) in COMMANDS.items():
        assert f"{name} {purpose}" in text
    for code in Exit:
        assert re.search(rf"\b{code.value} ", text)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_of_itself_what_the_list_says(name: str) -> None:
    command = vfiostream.get_command(click.Context(vfiostream), name)
    assert command is not None
    assert command.name == name
    assert (command.help or "").partition("\n")[0] == COMMANDS[name][1]
    result = CliRunner().invoke(vfiostream, [name, "--help"])
    assert result.exit_code == 0


def options_of(*path: str) -> set[str]:
    command: click.Command = vfiostream
    for name in path:
        assert isinstance(command, click.Group)
        found = command.get_command(click.Context(command), name)
        assert found is not None
        command = found
    return {name for parameter in command.params for name in parameter.opts if name.startswith("--")}


def test_the_options_that_others_rely_on() -> None:
    for name in MOVING:
        assert {"--json", "--quiet", "--traceback", "--verbose"} <= options_of(name)
    for name in ANSWERING:
        assert {"--json", "--traceback", "--verbose"} <= options_of(name)
    for name in ("send", "receive", "save", "restore"):
        assert "--guest-memory" in options_of(name)
    for name in ("send", "save"):
        assert {"--max-bandwidth", "--switchover-bandwidth", "--compress"} <= options_of(name)
        assert {"--downtime-limit", "--max-rounds", "--max-time"} <= options_of(name)
    assert "--force" in options_of("save")
    for path in (("send",), ("receive",), ("save",), ("restore",), ("check",), ("describe",), ("device", "resume")):
        assert {"--record", "--record-payloads"} <= options_of(*path)
    assert options_of("device", "serve") >= {
        "--interface", "--states",
        "--memory", "--config", "--dirty-rate", "--pattern", "--data", "--seed", "--memory-region", "--config-region",
        "--bitmap-region", "--mmap", "--layout", "--capture-time", "--chunk-time", "--state-time",
        "--version-string", "--accept", "--fault",
    }  # fmt: skip


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert re.fullmatch(
        rf"vfiostream \d+\.\d+\.\d+, format 2, accelerator {_accel.IMPLEMENTATION}\n", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "missing command"),
        (["migrate"], "no such command"),
        (["send"], "missing argument 'DEVICE'"),
        (["send", "vfio-user:x"], "missing argument 'DESTINATION'"),
        (["send", "vfio-user:x", "tcp:h:1", "--downtime-limit", "300"], "is not a time"),
        (["send", "vfio-user:x", "tcp:h:1", "--compress", "20"], "is not a level of compression"),
        (["send", "vfio-user:x", "tcp:h:1", "--max-rounds", "0"], "0 is not in the range"),
        (["send", "vfio-user:x", "tcp:h:1", "--max-time", "0s"], "it must be more than 0"),
        (["send", "vfio-user:x", "tcp:h:1", "--max-bandwidth", "0"], "moves nothing"),
        (["send", "vfio-user:x", "tcp:h:1", "--chunk", "1"], "a chunk of 1 bytes"),
        (["send", "vfio-user:x", "tcp:h:1", "--guest-memory", "x"], "is not guest memory"),
        (["send", "vfio-user:x", "tcp:h:1", "--guest-memory", "0=/nonexistent/file"], "can't be opened"),
        (["send", "pci:x", "tcp:h:1"], "is not the address of a device"),
        (["send", "vfio-user:x", "file:x"], "use save and restore"),
        (["receive", "file:x", "vfio-user:x"], "use save and restore"),
        (["save", "vfio-user:x", "tcp:h:1"], "write file:PATH"),
        (["restore", "x", "vfio-user:x"], "write file:PATH"),
        (["inspect", "x"], "write file:PATH"),
        (["send", "replay:/nonexistent/x", "tcp:h:1"], "can't be opened"),
        (["check", "vfio-user:x", "--record-payloads"], "nothing is recorded"),
        (["check", "gpu.json"], "write vfio-user:SOCKET, vfio:NAME, replay:FILE, or file:PATH"),
        (["check", "file:x", "version:1"], "is neither a device nor a file"),
        (["check", "version:1"], "give a device as the target"),
        (["describe", "version:1"], "is neither a device nor a file"),
        (["check", "file:x", "file:y", "--record", "a"], "1 records of 0 devices"),
        (["save", "vfio-user:x", "file:x", "--record", "a", "--record", "b"], "2 records of 1 devices"),
        (["check", "vfio-user:x", "--record", "/nonexistent/x"], "no record can be made"),
        (["record", "show", "/nonexistent/x"], "can't be opened"),
        (["device", "serve", "x", "--memory", "5"], "whole pages"),
        (["device", "serve", "x", "--fault", "get-memory:1"], "is not a fault"),
        (["device", "serve", "x", "--pattern", "spiral"], "'spiral' is not one of"),
        (["device", "serve", "x", "--interface", "two-region"], "'two-region' is not one of"),
        (["device", "serve", "x", "--states", "p2p"], "leave stop-copy in"),
        (["device", "serve", "x", "--fault", "report:1:EIO"], "no operation of the four-region interface"),
    ],
)
def test_usage_is_one_sentence_and_2(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"vfiostream: [^\n]+\n", err)
    assert expected in err


def test_usage_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["send", "--json"]) == 2
    event = json.loads(capsys.readouterr().out)
    assert (event["message_type"], event["code"], event["error"]) == ("error", 2, "UsageError")
    assert main(["send", "vfio-user:x", "tcp:h:1", "--quiet", "--json"]) == 2
    assert "contradict each other" in json.loads(capsys.readouterr().out)["message"]


def test_every_option_of_serve_reaches_the_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served = []

    def serve(settings: Settings, path: str, ready: Callable[[], None]) -> None:
        served.append((settings, path))
        ready()

    monkeypatch.setattr("vfiostream.cli.device.serve_device", serve)
    assert main(["device", "serve", "plain"]) == 0
    options = (
        "--memory 8MiB --config 1KiB --dirty-rate 3MiB/s --pattern hotspot --data random --seed 9 --memory-region 64KiB"
        " --config-region 8KiB --bitmap-region 4KiB --mmap sparse --layout packed --capture-time 20ms"
        " --chunk-time 5ms --state-time 1s"
        " --version-string v2 --accept v1 --accept v3* --no-dirty-tracking --fault get-memory:3:EIO"
        " --fault set-state:1:hang"
    )
    assert main(["device", "serve", "other", *options.split()]) == 0
    options = "--interface migration-states --states stop-copy,p2p --fault running-to-running-p2p:2:error"
    assert main(["device", "serve", "states", *options.split()]) == 0
    settings, path = served.pop()
    assert path == "states"
    assert settings == Settings(
        interface="migration-states",
        states=("stop-copy", "p2p"),
        faults=(parse_fault("running-to-running-p2p:2:error"),),
    )
    assert served == [
        (Settings(), "plain"),
        (
            Settings(
                memory=8 * MIB, config=1024, dirty_rate=3 * MIB, pattern="hotspot", data="random", seed=9,
                memory_region=64 * 1024, config_region=8 * 1024, bitmap_region=4096, mmap="sparse", layout="packed",
                capture_time=0.02, chunk_time=0.005, state_time=1.0, version_string="v2", accept=("v1", "v3*"),
                dirty_tracking=False,
                faults=(parse_fault("get-memory:3:EIO"), parse_fault("set-state:1:hang")),
            ),
            "other",
        ),
    ]  # fmt: skip
    assert capsys.readouterr().out == "".join(f"serving vfio-user:{path}\n" for path in ("plain", "other", "states"))


# ---- what an error means


@pytest.mark.parametrize(
    ("error", "source", "target"),
    [
        (errors.UsageError("x"), (2, "running"), 2),
        (errors.DeviceLost("x"), (1, "running"), 1),
        (errors.DeviceRefused("x", "y", 5), (1, "running"), 1),
        (errors.TransportError("x"), (1, "running"), 1),
        (errors.ConnectionLost("x"), (1, "running"), 1),
        (errors.StreamError("MEMORY record 5", "x"), (1, "running"), 4),
        (errors.Incompatible("x"), (5, "running"), 5),
        (errors.PeerAborted("incompatible", "x"), (5, "running"), 5),
        (errors.PeerAborted("device", "x"), (1, "running"), 1),
        (errors.PeerAborted("cancelled", "x"), (1, "running"), 1),
        (errors.NotConverged("x"), (6, "running"), 6),
        (Cancelled("x"), (6, "running"), 6),
        (errors.OutcomeUnknown("x"), (7, "stopped"), 7),
        (errors.SourceStuck("x"), (7, "unknown"), 7),
        (errors.LocalProtocolError("x"), (1, "unknown"), 1),
        (KeyError("x"), (1, "unknown"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_exit_codes(error: Exception, source: tuple[int, str], target: int) -> None:
    moving = failure_of(error, has_source=True)
    assert (moving.code, moving.source) == source
    taking = failure_of(error, has_source=False)
    assert (taking.code, taking.source) == (target, None)


def test_a_defect_says_that_it_is_one() -> None:
    assert "this is a defect in vfiostream (KeyError: 'x')" in failure_of(KeyError("x"), has_source=False).message


# ---- what is printed

HOSTILE = "the other end gave up (failed): [red]no[/red]\x1b[2J\nvfiostream: all is well\u202e"


def test_no_text_of_the_other_end_gets_at_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    failure = failure_of(errors.TransportError(HOSTILE), has_source=False)
    Plain().failure(failure)
    Terminal(Console(stderr=True, force_terminal=True)).failure(failure)
    Plain().result(Result({}, [HOSTILE]))
    Terminal(Console(stderr=True, force_terminal=True)).result(Result({}, [HOSTILE]))
    captured = capsys.readouterr()
    odd = "\N{REPLACEMENT CHARACTER}"
    safe = f"the other end gave up (failed): [red]no[/red]{odd}[2J vfiostream: all is well{odd}\n"
    assert captured.err == f"vfiostream: {safe}" * 2
    assert captured.out == safe * 2


def test_json_is_one_line_of_ascii(capsys: pytest.CaptureFixture[str]) -> None:
    Json().failure(failure_of(errors.TransportError(HOSTILE), has_source=True))
    out = capsys.readouterr().out
    assert out.isascii()
    assert len(out.splitlines()) == 1
    event = json.loads(out)
    assert event == {
        "message_type": "error", "code": 1, "error": "TransportError", "message": HOSTILE, "source": "running",
    }  # fmt: skip


def test_a_terminal_says_which_rule_is_checked() -> None:
    screen = io.StringIO()
    terminal = Terminal(Console(file=screen, force_terminal=True, width=80, color_system=None))
    terminal.checking("stream-short", 7, 40)
    terminal.close()
    assert "7 of 40: stream-short" in screen.getvalue()


def test_the_table_fits_80_columns() -> None:
    screen = io.StringIO()
    terminal = Terminal(Console(file=screen, force_terminal=True, width=80, color_system=None))
    terminal.status(
        Status(
            phase="stop-and-copy", elapsed=1.0, round=30, bytes=1000 << 30, transferred=1, round_bytes=1,
            rate=1000.0 * MIB, pending=1000 * MIB, dirty_rate=1000.0 * MIB, throughput=1.0, expected_downtime=0.9999,
        )
    )  # fmt: skip
    terminal.close()
    terminal.close()
    text = screen.getvalue()
    row = "stop-and-copy    30 1000.0 GiB 1000.0 MiB/s 1000.0 MiB 1000.0 MiB/s  999.9 ms"
    assert row in text
    assert "phase         round      bytes         rate    pending   dirty rate  downtime" in text


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.anyio
async def test_no_phase_is_missed(capsys: pytest.CaptureFixture[str]) -> None:
    progress, report = Watched(), Json()
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(progress.follow, report)
            progress.content = 7
            progress.phase = "precopy"
            progress.phase = "stop-and-copy"
            progress.expected_downtime = float("inf")
            progress.phase = "done"
        progress.phase = "finishing"
        progress.finish(report)
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    phases = [event["phase"] for event in events]
    assert [phase for phase in phases if phase != "connecting"] == ["precopy", "stop-and-copy", "done", "finishing"]
    assert events[-1]["bytes"] == 7
    assert events[-1]["expected_downtime"] is None
