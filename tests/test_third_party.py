"""Transports of other distributions, and the one in ``docs/transports.md``, as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.cli_programs import Ended, Program, device, digest_and_state, run
from vfiostream.errors import TransportError, UsageError
from vfiostream.transports import check, connect, listen
from vfiostream.transports.options import Options
from vfiostream.uapi.four_region import State

TEXT = (Path(__file__).parent.parent / "docs" / "transports.md").read_text()


def install(folder: Path, name: str, points: dict[str, str], *, version: str = "1.0") -> None:
    """Put the metadata of a distribution in ``folder``, as an installer does."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    listed = "".join(f"{scheme} = {value}\n" for scheme, value in points.items())
    (info / "entry_points.txt").write_text(f"[vfiostream.transports]\n{listed}")


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that packages are found in."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


def module(folder: Path, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(textwrap.dedent(text))


WHOLE = """
    from contextlib import asynccontextmanager
    OPTIONS = frozenset({"plain"})
    @asynccontextmanager
    async def connect(address, options):
        yield address, options
    listen = connect
"""


@pytest.mark.anyio
async def test_a_module_gets_the_whole_address_and_the_options(packages: Path) -> None:
    install(packages, "some-way", {"way": "ways_whole"})
    module(packages, "ways_whole", WHOLE)
    for address in ("way:a:b", "way:"):
        openings: list[Any] = [connect, listen]
        for opening in openings:
            async with opening(address, Options(plain=True)) as given:
                assert given == (address, Options(plain=True))


def test_what_it_does_not_know_is_refused_for_it(packages: Path) -> None:
    install(packages, "some-way", {"way": "ways_refusing"})
    module(packages, "ways_refusing", WHOLE)
    check("way:x", Options(plain=True))
    with pytest.raises(UsageError, match="way:x: such an address has no replace; leave that away"):
        check("way:x", Options(replace=True))
    with pytest.raises(UsageError, match="way:x: that is a link.*use send and receive"):
        check("way:x", Options(answers=False))


def test_a_scheme_that_nobody_brings_is_answered_with_all_there_are(packages: Path) -> None:
    install(packages, "some-way", {"way": "no_such_module"})
    with pytest.raises(UsageError, match=r"'wya:x' is not an address; write one of tcp:HOST:PORT, .*systemd:, .*way:"):
        check("wya:x", Options())
    with pytest.raises(UsageError, match="is not an address"):
        check("way:\0", Options())


def test_our_own_names_stay_ours(packages: Path, caplog: pytest.LogCaptureFixture) -> None:
    install(packages, "some-way", {"tcp": "ways_taking_over", "way": "ways_beside"})
    module(packages, "ways_taking_over", "raise AssertionError")
    module(packages, "ways_beside", WHOLE)
    check("tcp:host:1", Options())
    assert caplog.text == ""
    check("way:x", Options())
    assert "some-way 1.0 brings a transport tcp:, which stays our own" in caplog.text


def test_two_with_one_name(packages: Path) -> None:
    install(packages, "some-way", {"way": "a"})
    install(packages, "other-way", {"way": "b"}, version="2.0")
    with pytest.raises(TransportError, match=r"way: is brought by other-way 2\.0 and some-way 1\.0, and one has to"):
        check("way:x", Options())


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("ways_missing", None, "ModuleNotFoundError: No module named 'ways_missing'"),
        ("ways_broken", "1 / 0", "ZeroDivisionError: division by zero"),
        ("ways_half", "def connect(address, options): ...", "has no listen; ask its author"),
        ("ways_empty", "listen = 3", "has no connect and no listen; ask its author"),
    ],
)
def test_one_that_is_broken_is_named(name: str, text: str | None, sentence: str, packages: Path) -> None:
    install(packages, "some-way", {"way": name})
    if text is not None:
        module(packages, name, text)
    with pytest.raises(TransportError, match=rf"^the transport way: of some-way 1\.0 .*{re.escape(sentence)}"):
        check("way:x", Options())


# ---- the one in the document


def blocks() -> dict[str, str]:
    found = re.findall(r"```(?:python|toml)\n# (\S+)\n(.*?)```", TEXT, re.DOTALL)
    return dict(found)


@pytest.fixture(scope="module")
def documented(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The document's distribution, installed; gives the environment of a process that finds it."""
    folder = tmp_path_factory.mktemp("documented")
    files = blocks()
    assert len(files) == 3
    for name, text in files.items():
        (folder / name).write_text(text)
    project = tomllib.loads(files["pyproject.toml"])["project"]
    points = project["entry-points"]["vfiostream.transports"]
    assert list(points.values()) == [name.removesuffix(".py") for name in files if name.startswith("vfiostream_")]
    install(folder, project["name"], points, version=project["version"])
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_the_documents_transport_passes_the_suite(documented: dict[str, str]) -> None:
    tested = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-W", "error", "--rootdir=.", "test_abstract.py"],
        cwd=documented["PYTHONPATH"], env=documented, capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    assert tested.returncode == 0, tested.stdout.decode()
    passed = re.search(rb"^(\d+) passed", tested.stdout, re.MULTILINE)
    assert passed is not None
    assert int(passed[1]) > 100


def test_the_documents_transport_moves_a_device(documented: dict[str, str], tmp_path: Path) -> None:
    address = f"abstract:vfiostream-test-{os.getpid()}"
    with device(tmp_path / "a", "--memory", "4MiB") as source, device(tmp_path / "b", "--memory", "4MiB") as target:
        with Program("receive", address, target, "--json", env=documented) as receiver:
            assert receiver.phase("listening")["address"] == address
            assert run("send", source, address, "--quiet", env=documented) == Ended(0, "", "")
            assert receiver.end().code == 0
        digest, state = digest_and_state(source)
        assert state == State.STOP
        assert digest_and_state(target) == (digest, State.RUNNING)
        assert run("save", source, address, env=documented).code == 2
