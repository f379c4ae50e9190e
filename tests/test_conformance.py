"""The conformance rules: the reference device keeps them all, and each has a defect that it finds, and it alone."""

from __future__ import annotations

import errno
import itertools
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import anyio
import pytest

from tests.cli_programs import device, run as run_program
from tests.conformance_defects import ALL, Defective
from tests.test_vendor_states import LACKING, NEXT, kernels_way
from tests.vendor_operations import SMALL
from vfiostream.access import open_access
from vfiostream.access.contract import Access
from vfiostream.cli import main
from vfiostream.cli.exits import Exit
from vfiostream.conformance import junit
from vfiostream.conformance.rules import Outcome, Rule, Verdict
from vfiostream.conformance.run import RULEBOOKS, Report, checks_of, run
from vfiostream.conformance.states import is_permitted, opens
from vfiostream.conformance.subject import Opener
from vfiostream.errors import DeviceLost, DeviceRefused, Incompatible
from vfiostream.uapi.vfio import MigrationFlags, MigrationState
from vfiostream.vendor.device import ReferenceDevice
from vfiostream.vendor.inprocess import InProcessAccess
from vfiostream.vendor.settings import STATES, Interface, Settings
from vfiostream.vendor.states import OPENING

pytestmark = pytest.mark.anyio
INTERFACES = get_args(Interface)
BUSY = 8 << 20
"""Bytes a second that the device writes: pages of guest memory within a moment."""


@contextmanager
def served(interface: str, defect: type[Defective] | None = None, **changes: Any) -> Iterator[Opener]:
    """What opens a small device, as often as one likes."""
    device = ReferenceDevice(Settings(**{**SMALL, "interface": interface, "dirty_rate": BUSY, **changes}))

    async def opener() -> Access:
        access = InProcessAccess(device)
        return access if defect is None else defect(access, device)

    try:
        yield opener
    finally:
        device.close()


def verdicts(report: Report, verdict: Verdict) -> dict[str, str]:
    return {one.rule.id: one.detail for one in report.outcomes if one.verdict is verdict}


def test_rules_are_told_apart() -> None:
    for interface in RULEBOOKS:
        rules = [check.rule for check in checks_of(interface)]
        assert len({rule.id for rule in rules}) == len(rules)
        assert all(rule.sentence.endswith(".") and rule.source for rule in rules)


@pytest.mark.parametrize("interface", INTERFACES)
async def test_the_reference_device_keeps_all_rules(interface: str) -> None:
    with served(interface) as opener:
        report = await run(opener)
    assert report.interface == interface
    assert [one.rule for one in report.outcomes] == [check.rule for check in checks_of(interface)]
    assert {one.rule.id: one for one in report.outcomes if one.verdict is not Verdict.KEPT} == {}


@pytest.mark.parametrize("names", LACKING, ids="+".join)
def test_which_changes_there_are_is_as_in_the_kernel(names: tuple[str, ...]) -> None:
    """Another reading of the same table, in the tests of the reference device, knows the way too."""
    flags = MigrationFlags(sum(STATES[name] for name in names))
    for start in NEXT:
        if start in LACKING[names]:
            continue
        assert not is_permitted(flags, start, MigrationState.ERROR)
        assert not is_permitted(flags, start, 8)
        for end in NEXT:
            way = kernels_way(names, start, end)
            assert is_permitted(flags, start, end) is (way is not None)
            if way is not None:
                arcs = list(itertools.pairwise([start, *way]))
                assert opens(start, end) is (bool(arcs) and arcs[-1] in OPENING)


VFIO_USER = {
    "data-opened": "no message",
    "precopy-info": "no message",
    "precopy-info-refused": "no message",
    "precopy-told": "no message",
    "precopy-reinit": "no message",
    "log-too-many": "does not pass it on",
}
"""What can't be tested over vfio-user, and why."""
SMALL_OPTIONS = ("--memory", "256KiB", "--config", "4KiB", "--memory-region", "16KiB", "--dirty-rate", "8MiB")


@pytest.mark.parametrize("interface", INTERFACES)
async def test_over_vfio_user_and_into_another_device(interface: str, tmp_path: Path) -> None:
    options = ("--interface", interface, *SMALL_OPTIONS)
    with device(tmp_path / "one", *options) as one, device(tmp_path / "other", *options) as other:
        report = await run(partial(open_access, one), partial(open_access, other))
        assert (report.device, report.target) == (one, other)
        assert verdicts(report, Verdict.BROKEN) == {}
        assert verdicts(report, Verdict.SKIPPED) == {}
        reasons = verdicts(report, Verdict.NOT_TESTABLE)
        assert set(reasons) == set(VFIO_USER) & {check.rule.id for check in checks_of(interface)}
        assert all(VFIO_USER[rule] in reason for rule, reason in reasons.items())


@pytest.mark.parametrize("states", [("stop-copy",), ("stop-copy", "p2p"), ("stop-copy", "pre-copy")], ids="+".join)
async def test_a_driver_need_not_have_all_states(states: tuple[str, ...]) -> None:
    with served("migration-states", states=states) as opener:
        report = await run(opener)
    assert verdicts(report, Verdict.BROKEN) == {}
    reasons = verdicts(report, Verdict.NOT_TESTABLE)
    assert all(rule.startswith("precopy-") and "PRE_COPY" in reason for rule, reason in reasons.items())
    assert bool(reasons) is ("pre-copy" not in states)


@pytest.mark.parametrize(
    ("interface", "changes"),
    [
        ("four-region", {"layout": "packed", "mmap": "none"}),
        ("four-region", {"memory": 0}),
        ("four-region", {"dirty_tracking": False, "mmap": "sparse"}),
        ("migration-region", {"mmap": "none", "memory": 0, "dirty_tracking": False}),
        ("migration-states", {"memory": 0, "dirty_tracking": False}),
        ("migration-states", {"dirty_rate": 0}),
    ],
)
async def test_devices_that_lack_something(interface: str, changes: dict[str, Any]) -> None:
    with served(interface, **changes) as opener:
        report = await run(opener)
    assert verdicts(report, Verdict.BROKEN) == {}
    assert verdicts(report, Verdict.SKIPPED) == {}


@pytest.mark.parametrize("interface", RULEBOOKS)
def test_every_rule_has_a_defect(interface: str) -> None:
    assert ALL[interface].rules == {check.rule.id for check in checks_of(interface)}


class TestDefects:
    """Each costs a whole run, and what an event loop has to do with it the tests above have seen."""

    @pytest.fixture
    def anyio_backend(self) -> str:
        return "asyncio"

    @pytest.mark.parametrize(
        ("interface", "rule"), [(interface, rule) for interface in ALL for rule in sorted(ALL[interface].rules)]
    )
    async def test_a_defect_breaks_its_rule_alone(
        self, monkeypatch: pytest.MonkeyPatch, interface: str, rule: str
    ) -> None:
        defects = ALL[interface]
        if rule in defects.patches:
            defects.patches[rule](monkeypatch)
        with served(interface, defects.accesses.get(rule)) as opener:
            report = await run(opener)
        assert set(verdicts(report, Verdict.BROKEN)) == {rule}
        assert verdicts(report, Verdict.SKIPPED) == {}


# ---- a run goes on


class Hangs(Defective):
    """Never answers when it is asked for RUNNING_P2P in STOP."""

    async def set_migration_state(self, state: int) -> Any:
        if (self.state, state) == (1, 5):
            await anyio.sleep_forever()
        return await super().set_migration_state(state)


async def test_a_check_that_hangs_is_given_up() -> None:
    with served("migration-states", Hangs) as opener:
        report = await run(opener, limit=3)
    assert verdicts(report, Verdict.BROKEN) == {"changes-permitted": "the check was not done within 3 s"}
    # All changes of state are tried for these too, and that once only.
    assert set(verdicts(report, Verdict.NOT_TESTABLE)) == {"changes-refused", "error-refused", "data-opened"}


async def test_what_is_refused_unexpectedly_breaks_a_rule_and_the_run_goes_on() -> None:
    class Refuses(Defective):
        async def feature(self, *arguments: Any, **named: Any) -> bytes:
            if self.state == 3:
                raise DeviceRefused(self.name, "a question", errno.EBUSY)
            return await super().feature(*arguments, **named)

    with served("migration-states", Refuses) as opener:
        report = await run(opener)
    assert "EBUSY" in verdicts(report, Verdict.BROKEN)["state-told"]
    assert len(report.outcomes) == len(checks_of("migration-states"))
    assert verdicts(report, Verdict.KEPT)


async def test_a_device_that_is_gone_costs_the_rules_behind() -> None:
    opened = 0
    with served("four-region") as opener:

        async def for_a_while() -> Access:
            nonlocal opened
            opened += 1
            if opened > 4:
                raise DeviceLost("it is gone; plug it in")
            return await opener()

        report = await run(for_a_while)
    assert [one.verdict for one in report.outcomes[:3]] == [Verdict.KEPT] * 3
    assert {one.verdict for one in report.outcomes[3:]} == {Verdict.SKIPPED}
    assert report.outcomes[-1].detail == "the device can't be brought back: it is gone; plug it in"


async def test_a_run_that_is_cancelled_resets_the_device() -> None:
    with served("migration-states", Hangs) as opener:
        with anyio.CancelScope() as scope:

            def cancel(rule: Rule, number: int, count: int) -> None:
                if rule.id == "changes-permitted":
                    scope.deadline = anyio.current_time() + 0.2

            await run(opener, begin=cancel)
        assert scope.cancelled_caught
        async with await opener() as access:
            assert isinstance(access, Defective)
            assert access.state == 2


@pytest.mark.parametrize("interface", INTERFACES)
async def test_a_target_with_smaller_regions(interface: str) -> None:
    with served(interface) as opener, served(interface, memory_region=4096, mmap="none") as other:
        report = await run(opener, other)
    assert verdicts(report, Verdict.BROKEN) == {}
    assert verdicts(report, Verdict.NOT_TESTABLE) == {}


async def test_a_device_with_too_much_state(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("states", "stream"):
        monkeypatch.setattr(f"vfiostream.conformance.{module}.MAX_STREAM", 100_000)
    with served("migration-states") as opener:
        report = await run(opener)
    assert verdicts(report, Verdict.BROKEN) == {}
    reasons = verdicts(report, Verdict.NOT_TESTABLE)
    assert {"stream-short", "write-sizes", "precopy-goes-on"} <= set(reasons)
    assert all("test one with less" in reason for reason in reasons.values())
    assert {"changes-permitted", "reset", "closed-in-session", "log-complete"} <= set(verdicts(report, Verdict.KEPT))


def test_a_device_that_is_gone_has_not_passed() -> None:
    outcomes = [Outcome(Rule("a", "A is.", "line 1"), verdict) for verdict in Verdict]
    passed = {one.verdict: Report("one", None, "four-region", (one,)).passed for one in outcomes}
    assert passed == {
        Verdict.KEPT: True, Verdict.BROKEN: False, Verdict.NOT_TESTABLE: True, Verdict.SKIPPED: False
    }  # fmt: skip


async def test_a_target_of_another_kind() -> None:
    with served("migration-states") as opener, served("four-region") as other:
        with pytest.raises(Incompatible, match="speaks four-region, and .* migration-states: choose a target"):
            await run(opener, other)


# ---- reports


REPORT = Report(
    "vfio:one",
    "vfio:other",
    "four-region",
    (
        Outcome(Rule("a", "A is.", "line 1"), Verdict.KEPT, "", 0.25),
        Outcome(Rule("b", "B is.", "line 2"), Verdict.KEPT, "seen", 0.25),
        Outcome(Rule("c", "C is.", "line 3"), Verdict.BROKEN, "it is\x00 <not> & \ud800", 1.5),
        Outcome(Rule("d", "D is.", "line 4"), Verdict.NOT_TESTABLE, "has none"),
        Outcome(Rule("e", "E is.", "line 5"), Verdict.SKIPPED, "gone"),
    ),
)


def test_junit() -> None:
    root = ElementTree.fromstring(junit.to_junit(REPORT))
    assert root.tag == "testsuites"
    (suite,) = root
    counts = {name: suite.get(name) for name in ("name", "tests", "failures", "errors", "skipped", "time")}
    assert counts == {
        "name": "four-region", "tests": "5", "failures": "1", "errors": "0", "skipped": "2", "time": "2.000"
    }  # fmt: skip
    assert {one.get("name"): one.get("value") for one in suite.iter("property")} == {
        "device": "vfio:one",
        "target": "vfio:other",
    }
    cases = {case.get("name"): case for case in suite.iter("testcase")}
    assert list(cases) == ["a", "b", "c", "d", "e"]
    assert {case.get("classname") for case in cases.values()} == {"conformance.four-region"}
    assert len(cases["a"]) == 0
    assert cases["b"].findtext("system-out") == "seen"
    failure = cases["c"].find("failure")
    assert failure is not None
    assert failure.get("message") == "it is\N{REPLACEMENT CHARACTER} <not> & \N{REPLACEMENT CHARACTER}"
    assert failure.text == "C is.\nSource: line 3"
    for name, message in (("d", "not testable: has none"), ("e", "skipped: gone")):
        skipped = cases[name].find("skipped")
        assert skipped is not None
        assert skipped.get("message") == message


# ---- the command


def test_the_command_finds_a_fault(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    # What the driver refuses the second time is no change of state that ends a stream: only one arc is missing.
    fault = "pre-copy-p2p-to-pre-copy:1:EIO"
    options = ("--interface", "migration-states", "--fault", fault, *SMALL_OPTIONS)
    with device(tmp_path / "one", *options) as one:
        ended = run_program("conformance", one, "--yes", "--json", "--junit", path)
        assert ended.code == Exit.BROKEN, ended
        *statuses, summary = ended.events
        names = [check.rule.id for check in checks_of("migration-states")]
        assert [(one["phase"], one["rule"], one["number"], one["count"]) for one in statuses] == [
            ("checking", name, number, len(names)) for number, name in enumerate(names, 1)
        ]
        assert (summary["message_type"], summary["status"]) == ("summary", "broken")
        assert (summary["device"], summary["target"], summary["interface"]) == (one, None, "migration-states")
        (broken,) = [rule for rule in summary["rules"] if rule["verdict"] == "broken"]
        assert broken["id"] == "changes-permitted"
        assert broken["detail"] == "PRE_COPY_P2P -> PRE_COPY was refused with EIO, and left PRE_COPY_P2P"
        assert {"sentence", "source", "seconds"} <= set(broken)
        suite = ElementTree.parse(path).getroot()[0]
        assert (suite.get("tests"), suite.get("failures")) == (str(len(names)), "1")

        ended = run_program("conformance", one, "--yes")  # the fault has been used up
        assert ended.code == Exit.DONE, ended
        lines = ended.output.splitlines()
        assert lines[0].split() == ["rule", "verdict"]
        assert (
            lines[-1] == f"{one}, migration-states, loading into itself: 35 kept, 0 broken, 6 not testable, 0 skipped"
        )


def test_each_opening_has_a_record_of_its_own(tmp_path: Path) -> None:
    record = tmp_path / "record"
    with device(tmp_path / "one", "--interface", "migration-states", *SMALL_OPTIONS) as one:
        ended = run_program("conformance", one, "--yes", "--record", record)
        assert ended.code == Exit.DONE, ended
    files = list(tmp_path.glob("record*"))
    assert len(files) > 2
    assert {file.name for file in files} == {"record", *(f"record.{n}" for n in range(2, len(files) + 1))}
    for file in files:
        shown = run_program("record", "show", file)
        assert shown.code == Exit.DONE, shown
        assert one in shown.output


def test_the_command_for_people(tmp_path: Path) -> None:
    options = ("--interface", "four-region", "--fault", "get-version:3:EIO", *SMALL_OPTIONS)
    with device(tmp_path / "one", *options) as one:
        ended = run_program("conformance", one, "--yes")
    assert ended.code == Exit.BROKEN, ended
    assert "\nversion is broken: " in ended.output
    assert "\n  rule    The interface has version 1, in every state.\n  source  operation 1" in ended.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vfio-user:/none",), "loads garbage into vfio-user:/none and resets it"),
        (("vfio-user:/none", "--yes", "--target", "vfio-user:/none"), "is its own target"),
        (("vfio-user:/none", "--yes", "--junit", "/none/x.xml"), "/none/x.xml can't be written"),
        (("nonsense", "--yes"), "is not the address of a device"),
    ],
)
def test_what_the_command_refuses(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    assert main(["conformance", *arguments, "--json"]) == Exit.USAGE
    assert message in json.loads(capsys.readouterr().out)["message"]


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    assert main(["conformance", f"vfio-user:{tmp_path}/none", "--yes", "--junit", str(path)]) == Exit.FAILED
    assert path.read_bytes() == b""
