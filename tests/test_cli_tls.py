"""Encrypted links and their certificates on the command line."""

from __future__ import annotations

import json
import shlex
import signal
import stat
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.cli_programs import Program, device, digest_and_state, run, set_running
from tests.test_cli_processes import Call, call, check_fields
from vfiostream.uapi.four_region import State

__all__ = ["call"]  # a fixture


@pytest.fixture(scope="module")
def devices() -> Iterator[tuple[str, str]]:
    with TemporaryDirectory(prefix="vfiostream-") as folder:
        common = ("--memory", "4MiB", "--seed")
        with device(Path(folder) / "a", *common, "1") as source, device(Path(folder) / "b", *common, "2") as target:
            yield source, target


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of two pairs that know nothing of each other."""
    folder = tmp_path_factory.mktemp("pairs")
    for name in ("right", "wrong"):
        assert run("cert", folder / name, "--name", "gpu.example").code == 0
    return folder


def end(folder: Path, name: str, *beliefs: object) -> tuple[object, ...]:
    return "--cert", folder / f"{name}.pem", "--key", folder / f"{name}.key", *(beliefs or ("--ca", folder / "ca.pem"))


# ---- cert


def test_a_pair_is_made_and_works(call: Call, devices: tuple[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "pair"
    made = call("cert", folder, "--name", "127.0.0.1", "--name", "gpu.example", "--json", "--days", 2)
    assert made.code == 0, made
    [document] = made.events
    check_fields(document, "summary of cert")
    assert {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in folder.iterdir()} == {
        "ca.pem": 0o644,
        "source.pem": 0o644,
        "source.key": 0o600,
        "target.pem": 0o644,
        "target.key": 0o600,
    }
    assert document["names"] == ["127.0.0.1", "gpu.example"]
    # The command lines that it gives, at a port that is free.
    commands = {
        name: shlex.split(line.replace("DEVICE", devices[name == "target"]).replace(":7000", ":0"))[1:]
        for name, line in document["commands"].items()
    }
    for address in devices:
        set_running(address)
    with Program(*commands["target"], "--json") as target:
        address = target.phase("listening")["address"].replace("0.0.0.0", "127.0.0.1")
        sent = run(*(word.replace("tls:127.0.0.1:0", address) for word in commands["source"]))
        assert sent.code == 0, sent
        assert target.end().code == 0
    assert digest_and_state(devices[0])[0] == digest_and_state(devices[1])[0]


def test_what_people_read_of_a_pair(call: Call, tmp_path: Path) -> None:
    made = call("cert", tmp_path / "pair", "--name", "gpu.example")
    lines = made.output.splitlines()
    assert lines[0].startswith(f"{tmp_path}/pair: certificates for gpu.example, valid until 2")
    assert [line.split()[:2] for line in lines[1:3]] == [["source", "fingerprint"], ["target", "fingerprint"]]
    assert any(line.startswith("target$ vfiostream receive tls:0.0.0.0:7000 DEVICE --cert ") for line in lines)
    assert any(line.startswith("source$ vfiostream send DEVICE tls:gpu.example:7000 --cert ") for line in lines)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--name", "not a name"], "'not a name' is no name of a host"),
        (["--name", ""], "'' is no name of a host"),
        (["--days", "0"], "0 days is no time"),
        (["--days", "10001"], "10001 days is no time"),
    ],
)
def test_what_can_be_no_pair(options: list[str], says: str, call: Call, tmp_path: Path) -> None:
    ended = call("cert", tmp_path / "pair", *options)
    assert ended.code == 2
    assert says in ended.errors
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(call: Call, tmp_path: Path) -> None:
    (tmp_path / "source.key").write_text("precious")
    ended = call("cert", tmp_path)
    assert ended.code == 2
    assert "choose one that is not there, or that is empty" in ended.errors
    assert [entry.name for entry in tmp_path.iterdir()] == ["source.key"]
    assert list(tmp_path.parent.glob(f".{tmp_path.name}.*")) == []
    nowhere = call("cert", tmp_path / "no" / "where")
    assert nowhere.code == 2
    assert "can't be made (No such file or directory)" in nowhere.errors


# ---- who is believed


def test_who_is_refused_moves_nothing(devices: tuple[str, str], pairs: Path) -> None:
    source, target = devices
    for address in devices:
        set_running(address)
    before = [digest_and_state(address) for address in devices]
    right, wrong = pairs / "right", pairs / "wrong"
    with Program("receive", "tls:127.0.0.1:0", target, *end(right, "target")) as receiver:
        address = receiver.line_with("listening").split()[-1]
        # It believes the target, and is not believed.
        refused = run("send", source, address, *end(wrong, "source", "--ca", right / "ca.pem"))
        assert refused.code == 1
        assert refused.errors.startswith(f"vfiostream: {address}: the other end does not know the CA of our cert")
        assert refused.errors.count("\n") == 1
        # It does not believe the target.
        refused = run("send", source, address, *end(right, "source", "--ca", wrong / "ca.pem"))
        assert refused.code == 1
        assert refused.errors.startswith(f"vfiostream: {address}: the CA in {wrong}/ca.pem does not vouch for")
        # Neither certificate is a part of it.
        plain = run("send", source, address.replace("tls:", "tcp:"))
        assert plain.code == 1
        receiver.signal(signal.SIGTERM)
        ended = receiver.end()
    assert [digest_and_state(address) for address in devices] == before
    assert before[0][1] == before[1][1] == State.RUNNING
    *lines, last = ended.errors.splitlines()
    assert "cancelled" in last
    assert len(lines) == 3
    assert all(line.startswith("vfiostream: refused tls:127.0.0.1:") for line in lines)
    for line, says in zip(lines, ("does not vouch for", "does not know the CA", "is not TLS"), strict=True):
        assert says in line


def test_programs_learn_of_who_was_refused(devices: tuple[str, str], pairs: Path) -> None:
    source, target = devices
    for address in devices:
        set_running(address)
    before = digest_and_state(source)
    right = pairs / "right"
    fingerprints = json.loads(run("cert", pairs / "third", "--json").output)["fingerprints"]
    believes = ("--peer-fingerprint", fingerprints["source"])
    with Program("receive", "tls:127.0.0.1:0", target, *end(right, "target", *believes), "--json") as receiver:
        address = receiver.phase("listening")["address"]
        refused = run("send", source, address, *end(right, "source"), "--json")
        assert refused.code == 1
        error = refused.events[-1]
        assert error["error"] == "PeerRefused"
        assert error["source"] == "running"
        event = receiver.until(lambda event: event["message_type"] == "refused")
        check_fields(event, "refused")
        assert event["error"] == "PeerRefused"
        assert "is not pinned here" in event["message"]
        assert digest_and_state(source) == before
        # The right one, which expects a name that is not the host's.
        named = ("--ca", right / "ca.pem", "--peer-name", "gpu.example")
        sent = run("send", source, address, *end(pairs / "third", "source", *named))
        assert sent.code == 0, sent
        assert receiver.end().code == 0
    assert digest_and_state(target)[0] == before[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "name yours with --cert and --key"),
        (["--ca", "x"], "add --cert and --key"),
        (["--cert", "x"], "add --cert and --key"),
        (["--cert", "x", "--key", "x"], "nobody would be believed"),
        (["--cert", "x", "--key", "x", "--peer-fingerprint", "x"], "'x' is not a fingerprint"),
        (["--cert", "/no/file", "--key", "x", "--ca", "x"], "/no/file: a certificate can't be read"),
        (["--plain"], "has no plain"),
    ],
)
def test_nobody_is_connected_to_without_credentials(
    options: list[str], says: str, call: Call, devices: tuple[str, str]
) -> None:
    ended = call("receive", "tls:127.0.0.1:0", devices[1], *options)
    assert ended.code == 2
    assert says in ended.errors
    assert ended.errors.count("\n") == 1
    if "--plain" not in options:
        ended = call("send", devices[0], "tls:127.0.0.1:7000", *options)
        assert ended.code == 2
        assert says in ended.errors


def test_plain_tcp_is_for_this_host(call: Call, devices: tuple[str, str]) -> None:
    ended = call("receive", "tcp:0.0.0.0:0", devices[1])
    assert ended.code == 2
    assert "tcp: knows no one; listen at tls:" in ended.errors
    with Program("receive", "tcp:0.0.0.0:0", devices[1], "--plain") as receiver:
        assert receiver.line_with("listening on tcp:0.0.0.0:")


def test_a_bench_over_tls(pairs: Path) -> None:
    right = pairs / "right"
    with Program("bench", "--listen", "tls:127.0.0.1:0", "--once", *end(right, "target"), "--json") as listener:
        address = listener.phase("listening")["address"]
        ended = run("bench", address, "--size", "16MiB", *end(right, "source"))
        assert ended.code == 0, ended
        assert listener.end().code == 0


def test_a_bench_on_this_machine_has_no_credentials(call: Call, pairs: Path) -> None:
    ended = call("bench", *end(pairs / "right", "source"))
    assert ended.code == 2
    assert "certificates have no meaning" in ended.errors
