"""The pieces of the benchmarks that are right or wrong whatever the clock says. Nothing here is timed."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
from benchmarks import contents, delta, devices, leaves, links_page, machine, page, peers
from benchmarks.hosts import Link
from benchmarks.links import KINDS, Visit, line, size_for
from benchmarks.moving import Backend, End, move, store
from benchmarks.pairs import Run, column, in_turn, spread
from benchmarks.plan import MIB, PAGE, CannotRun, Plan
from benchmarks.result import Group, Result, newest
from benchmarks.row import Row, Sense, compare, processor_time

from vfiostream import _accel

needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler to build the limit with")


def row(figures: tuple[float, ...] = (0.8, 1.0, 1.2), must: float | None = 0.9, sense: Sense = "least") -> Row:
    return Row("moving", "C", must, sense, "GB/s", figures, figures, tuple(1.0 for _ in figures), note="why")


# ---- pairs


def test_contestants_take_turns_in_coming_first() -> None:
    ran: list[str] = []
    rounds = in_turn({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, 3, warm_up=False)
    assert "".join(ran) == "abbaab"
    assert [list(results) for results in rounds] == [["a", "b"], ["b", "a"], ["a", "b"]]


def test_the_warm_up_runs_and_does_not_count() -> None:
    numbers = iter(range(10))
    rounds = in_turn({"a": lambda: next(numbers)}, 3)
    assert column(rounds, "a") == [1, 2, 3]


def test_spread() -> None:
    assert spread([5, 1, 3, 2, 4]) == (1, 2, 3, 4, 5)
    assert spread([7.0]) == (7, 7, 7, 7, 7)
    with pytest.raises(ValueError, match="nothing"):
        spread([])


def test_what_a_run_cost() -> None:
    run = Run(2 * 10**9, 4.0, sender_cpu=1.0, receiver_cpu=3.0)
    assert (run.speed, run.cpu_sending, run.cpu_receiving) == (0.5, 0.5, 1.5)


# ---- rows


@pytest.mark.parametrize(
    ("figures", "must", "sense", "verdict"),
    [
        ((0.1, 0.9, 5.0), 0.9, "least", "reached"),
        ((5.0, 0.89, 0.1), 0.9, "least", "not reached"),
        ((1.0, 1.4, 9.0), 1.4, "most", "reached"),
        ((1.0, 1.41, 9.0), 1.4, "most", "not reached"),
        ((0.91,), 0.1, "within", "reached"),
        ((1.2,), 0.1, "within", "not reached"),
        ((0.8,), 0.1, "within", "not reached"),
        ((0.8,), None, "least", "for information"),
    ],
)
def test_the_median_decides(figures: tuple[float, ...], must: float | None, sense: Sense, verdict: str) -> None:
    assert row(figures, must, sense).verdict == verdict


def test_a_comparison_is_ours_by_theirs_round_by_round() -> None:
    rounds = [
        {"ours": Run(100, 1.0, 2.0, 3.0), "C": Run(100, 2.0, 1.0, 1.0)},
        {"C": Run(100, 1.0), "ours": Run(50, 1.0)},
    ]
    compared = compare(rounds, "ours", "C", path="p", must=1.0)
    assert compared.figures == (2.0, 0.5)
    assert compared.against == "C"
    sender, receiver = processor_time(rounds[:1], "ours", "C", path="p", must=1.4)
    assert (sender.figures, receiver.figures) == ((2.0,), (3.0,))
    assert sender.sense == receiver.sense == "most"


# ---- results


def result(when: str, **groups: Group) -> Result:
    return Result(when, "abc1234", "scripts/bench", 7, 2 << 30, {"cpu": "one"}, dict(groups))


def test_a_result_is_read_as_it_was_written(tmp_path: Path) -> None:
    line = {"changed": "wholly", "raw": {"cpu": 0.25}}
    written = result(
        "2026-01-02T03:04:05", network=Group([row(), row(must=None)], ["x: gone"]), delta=Group(table=[line])
    )
    file = written.write(tmp_path)
    assert file.name == "2026-01-02T030405-abc1234.json"
    assert Result.read(file) == written
    assert written.failed
    file.write_text(file.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(CannotRun, match="format"):
        Result.read(file)


def test_the_newest_result_of_each_group_is_shown() -> None:
    old = result("2026-01-01T00:00:00", network=Group(), files=Group())
    new = result("2026-01-02T00:00:00", network=Group())
    assert newest([new, old]) == {"network": new, "files": old}


def test_the_page_shows_figures_verdicts_and_what_could_not_run() -> None:
    group = Group([row(), row((2.0,), 1.4, "most")], ["against qemu: it is not here"])
    shown = page.render({"network": result("2026-01-02T03:04:05", network=group)}, {"Speed": "performance/size.svg"})
    assert "| moving | C | at least 0.9 | **1** | 0.9 to 1.1 | 0.8..1.2 | 1 GB/s | 1 GB/s | reached |" in shown
    assert "| at most 1.4 | **2** |" in shown
    assert "| not reached |" in shown
    assert "**Could not run:** against qemu: it is not here" in shown
    assert "![Speed](performance/size.svg)" in shown
    assert "| cpu | one |" in shown


def test_the_page_changes_between_its_marks_only(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    for _ in range(2):
        page.put(file, "new")
        assert file.read_text() == f"before\n{page.BEGIN}\n\nnew\n{page.END}\nafter\n"
    file.write_text("nothing")
    with pytest.raises(CannotRun, match="no place"):
        page.put(file, "new")


@pytest.mark.parametrize("which", [page.PAGE, links_page.PAGE])
def test_the_pages_of_the_repository_have_their_marks(which: Path) -> None:
    text = which.read_text()
    assert text.index(page.BEGIN) < text.index(page.END)


# ---- links


def moved(table: str, link: Link, away: float = 0.0, **seconds: float) -> dict[str, Any]:
    """A line of a table: the time that each kind took, in two rounds that differ by a tenth."""
    names = {kind.replace(",", "").replace(" ", "_"): kind for kind in KINDS}
    runs = {names[name]: [Run(MIB, 0.95 * took), Run(MIB, 1.05 * took)] for name, took in seconds.items()}
    rounds = [{kind: done[number] for kind, done in runs.items()} for number in range(2)]
    return line(table, Visit(link, list(runs), MIB, away), rounds, 0)


def test_a_visit_survives_being_told() -> None:
    visit = Visit(Link(10, 1, 100, ("reorder", "5%")), ["TCP"], MIB, 5.0)
    assert Visit.of(json.loads(json.dumps(asdict(visit)))) == visit


def test_the_queue_of_a_link_holds_what_is_under_way_and_a_round_trip() -> None:
    assert Link(10, 0.1, 120).netem == ["delay", "10ms", "rate", "120mbit", "loss", "0.1%", "limit", "300"]
    assert Link(0.1, 0, 100).netem[-1] == "100"  # too few for TCP otherwise
    assert Link().netem == ["limit", "100000"]


def test_slow_links_are_given_little_to_move() -> None:
    assert size_for(Link(100, 1, 1000)) == 2 * MIB
    assert size_for(Link(10, 0, 100)) == 64 * MIB
    assert size_for(Link(0.1, 0, 1000)) == 256 * MIB


def test_the_simplest_is_taken_unless_another_is_clearly_faster() -> None:
    close = moved("grid", Link(10, 0, 100), TCP=1.0, QUIC=0.95)
    far = moved("grid", Link(100, 1, 100), TCP=1.0, QUIC=0.5)
    for found, kind in ((close, "TCP"), (far, "QUIC")):
        assert links_page.take(found, encrypted=False) == kind
        assert links_page.take(found, encrypted=True) == "QUIC"


def test_the_page_shows_links() -> None:
    table = [
        moved("unhindered", Link(), TCP=0.01),
        moved("grid", Link(10, 0.1, 100), TCP=1.0),
        moved("away", Link(10, 0, 100), TCP=1.0),
        moved("away", Link(10, 0, 100), 5.0, TCP=7.5),
    ]
    shown = links_page.render(result("2026-01-02T03:04:05", links=Group([row()], ["QUIC: it is not here"], table)))
    assert "| 10 ms | 0.1 % | 100 | 1 | **1.05** (0.999..1.1) | TCP | - |" in shown
    assert "| TCP | 1.0 s | 7.5 s | 1.5 s |" in shown
    assert "| reached |" in shown
    assert "**Could not run:** QUIC: it is not here" in shown


def test_plots_stand_still_and_are_the_same_each_time(tmp_path: Path) -> None:
    pytest.importorskip("pygal", reason="pygal is of the extra bench")
    from benchmarks.plots import draw

    size = Row("throughput of 1 MiB", "", None, "least", "GB/s", (2.0,), (2.0,), plot="size", at=1)
    cpu = Row("CPU of the sender: TCP", "C", 1.4, "most", "CPU s/GB", (2.0,), (0.4,), (0.2,))
    rows = [row(), row((0.1,), 10, "most"), row((0.5,), 0.1, "within"), cpu, size]
    first, second = (draw(rows, tmp_path / name) for name in ("first", "second"))
    assert [file.name for file in first.values()] == ["reached.svg", "cpu.svg", "size.svg"]
    for one, other in zip(first.values(), second.values(), strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert "script" not in {element.tag.rpartition("}")[2] for element in ElementTree.parse(one).iter()}


def test_a_plot_scores_every_sense_alike() -> None:
    pytest.importorskip("pygal", reason="pygal is of the extra bench")
    from benchmarks.plots import score

    assert score(row((1.8,), 0.9, "least")) == 2
    assert score(row((0.7,), 1.4, "most")) == 2
    assert score(row((1.05,), 0.1, "within")) == 1
    assert score(row((2.2,), 0.1, "within")) == pytest.approx(0.5)


# ---- peers


def test_a_missing_peer_is_an_error_that_names_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, package in peers.PACKAGES.items():
        with pytest.raises(CannotRun, match=package):
            peers.program(name)


def test_a_program_that_fails_is_an_error_with_its_own_words() -> None:
    with pytest.raises(CannotRun, match="ended with 3: oops"):
        peers.finish(["sh", "-c", "echo oops >&2; exit 3"])


@needs_compiler
@pytest.mark.parametrize("mode", ["device", "region"])
@pytest.mark.parametrize("link", ["tcp", "unix"])
@pytest.mark.parametrize("populated", [True, False])
def test_the_limit_moves_all_of_it(mode: Any, link: Any, populated: bool) -> None:
    # Neither chunk nor region divide the size.
    size = 3 * MIB + 8
    seen = peers.limit(mode, link, size, chunk=MIB + 4096, region=2 * MIB, populated=populated)
    assert seen.content == size
    assert seen.sender_cpu is not None
    assert seen.receiver_cpu is not None


@needs_compiler
def test_the_limit_refuses_sizes_of_nothing() -> None:
    with pytest.raises(CannotRun, match="must not be 0"):
        peers.limit("region", "tcp", MIB, chunk=0)


def test_what_is_durable_goes_to_no_file_system_in_memory() -> None:
    with pytest.raises(CannotRun, match="--disk"), Plan(disk=Path("/dev/shm")).folder(on_disk=True):
        pass


# ---- contents


@pytest.fixture
def some_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    def forever() -> Iterator[bytes]:
        while True:
            yield b"library" * 1001

    monkeypatch.setattr(contents, "libraries", forever)


@pytest.mark.usefixtures("some_libraries")
def test_mixed_content_is_half_zeros_and_a_quarter_of_each() -> None:
    pages = 4 * (16 + 64 + 256 + 1024)  # of one cycle
    content = b"".join(contents.pieces("mixed", pages * PAGE))
    cut = [content[at : at + PAGE] for at in range(0, len(content), PAGE)]
    assert len(cut) == pages
    assert sum(not any(part) for part in cut) == pages // 2
    assert sum(b"librarylibrary" in part for part in cut) == pages // 4


@pytest.mark.usefixtures("some_libraries")
@pytest.mark.parametrize("content", ["random", "library", "mixed"])
def test_content_has_its_size_and_is_the_same_each_time(tmp_path: Path, content: contents.Content) -> None:
    contents.write(tmp_path / "file", content, 3 * MIB)
    written = (tmp_path / "file").read_bytes()
    assert len(written) == 3 * MIB
    assert written == b"".join(contents.pieces(content, 3 * MIB))


def test_too_few_libraries_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "lib.so.1").write_bytes(b"small")
    with pytest.raises(CannotRun, match="shared libraries"):
        next(contents.libraries(tmp_path))


def test_random_memory_has_no_two_pages_alike() -> None:
    memory = memoryview(bytearray(6 * MIB))  # more than the pool it is filled from
    contents.fill_random(memory, seed=1)
    pages = {bytes(memory[at : at + PAGE]) for at in range(0, len(memory), PAGE)}
    assert len(pages) == len(memory) // PAGE
    assert bytes(PAGE) not in pages


def test_bitmaps_have_the_bits_they_are_named_for() -> None:
    bits = 8 * MIB
    assert _accel.bitmap_count(leaves.clustered(bits, 0.01), bits) == pytest.approx(bits * 0.01, rel=0.05)
    scattered = leaves.scattered(bits, 0.01)
    assert _accel.bitmap_count(scattered, bits) == pytest.approx(bits * 0.01, rel=0.05)
    assert len(_accel.bitmap_runs(scattered, bits)) // 2 > bits * 0.009  # hardly any two are neighbours


# ---- our side


@pytest.mark.parametrize("backend", ["asyncio", "uvloop", "trio"])
def test_both_our_sides_move_device_and_guest(tmp_path: Path, backend: Backend) -> None:
    source = End(
        "send", address=f"unix:{tmp_path / 'link'}", backend=backend, memory=2 * MIB, region=MIB, guest=3 * MIB
    )
    moved = move(source, watch=True)  # which compares what arrived
    assert moved.run.content == 5 * MIB
    assert moved.sent["content"] == moved.received["content"] >= 5 * MIB


@pytest.mark.parametrize("backend", devices.BACKENDS)
def test_a_file_that_stands_for_a_driver_is_read_to_its_end(tmp_path: Path, backend: Backend) -> None:
    plan = Plan(size=10 * MIB + PAGE)
    with devices.file_of(plan.size) as file:
        for _ in range(2):
            assert devices.read_loop(file, plan).content == plan.size
            assert devices.through_device(tmp_path, file, plan, backend).content == plan.size
        with pytest.raises(CannotRun, match="were read"):
            devices.read_loop(file, replace(plan, size=plan.size + 1))


@pytest.mark.parametrize("counts", [(2,), (1, 1)])
def test_drivers_that_take_their_time_are_saved_whole(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, counts: tuple[int, ...]
) -> None:
    monkeypatch.setattr(devices, "RATE", 1e12)
    assert devices.checkpoints(tmp_path, 3 * MIB + 5, Plan(), counts).content == 6 * MIB + 10


def test_the_last_round_has_exactly_what_it_is_to_have() -> None:
    without, with_it = (move(End("send", guest=4 * MIB, last_round=size)) for size in (0, MIB))
    assert with_it.sent["content"] - without.sent["content"] == MIB


def test_our_side_saves_and_restores_files(tmp_path: Path) -> None:
    content, target, file = (tmp_path / name for name in ("content", "target", "checkpoint"))
    contents.write(content, "random", 2 * MIB)
    target.write_bytes(bytes(2 * MIB))
    store(End("save", guest=2 * MIB, file=str(content)), file)
    store(End("restore", guest=2 * MIB, file=str(target)), file)
    assert content.read_bytes() == target.read_bytes()


def test_a_side_that_fails_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CannotRun, match="failed, and said above why"):
        move(End("send", guest=MIB, settings={"chunk": 1}))
    assert "UsageError" in capfd.readouterr().err


def test_the_machine_is_described_without_gaps() -> None:
    described = machine.describe()
    assert described["accelerator"].startswith(_accel.IMPLEMENTATION)
    assert all(isinstance(value, str) and value for value in described.values())


# ---- the delta


def test_where_a_delta_breaks_even() -> None:
    raw = delta.Cost(cpu=0.1, wire=1.0, receiving=0.0)
    assert str(delta.break_even(delta.Cost(0.1, 0.5, 9.0), raw)) == "always"
    assert str(delta.break_even(delta.Cost(0.2, 1.0, 0.0), raw)) == "never"
    # At 0.5 GB/s raw takes 2 s a GB, and so does compressing; at less, raw takes longer.
    assert str(delta.break_even(delta.Cost(2.0, 0.1, 0.0), raw)) == "below 0.5 GB/s"
    # Half the work for twice the bytes.
    assert str(delta.break_even(raw, delta.Cost(0.2, 0.5, 0.0))) == "above 5 GB/s"


@pytest.mark.parametrize(("change", "most"), [("8 bytes", 8), ("10 %", PAGE // 10), ("wholly", PAGE)])
def test_pages_change_as_much_as_is_said(change: str, most: int) -> None:
    old, fresh = bytes(4 * PAGE), b"\1" * (4 * PAGE)
    new = delta.changed(old, change, fresh, Random(1))
    for at in range(0, len(old), PAGE):
        differ = sum(one != other for one, other in zip(old[at : at + PAGE], new[at : at + PAGE], strict=True))
        assert most * 0.9 - 1 <= differ <= most


@pytest.mark.parametrize("way", [delta._Package, delta._Library])
@pytest.mark.parametrize("size", [PAGE, MIB])
def test_a_delta_is_small_and_gives_the_new_content(way: Any, size: int) -> None:
    try:
        zstd = way()
    except CannotRun as error:
        pytest.skip(str(error))
    old = b"".join(islice(contents._random(), 1))[:size]  # does not compress by itself
    new = delta.changed(old, "8 bytes", b"", Random(1))
    frame = zstd.compress(new, old)
    assert len(frame) < size // 20
    assert zstd.decompress(frame, old, size) == new
    assert len(zstd.compress(new, b"")) >= size
