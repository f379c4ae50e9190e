"""How much is measured, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.pairs import Name, Result, in_turn

MIB = 1 << 20
GIB = 1 << 30
PAGE = 4096
BUILD = Path(__file__).resolve().parent.parent / "build" / "benchmarks"


class CannotRun(Exception):
    """A benchmark can't run, or what it moved did not arrive; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One run of benchmarks."""

    quick: bool = False
    pairs: int = 7
    """How many times each side runs and counts; they ran once more before."""
    size: int = 2 * GIB
    """Bytes that are moved."""
    sizes: tuple[int, ...] = (256 * MIB, 512 * MIB, GIB, 2 * GIB, 4 * GIB)
    """Bytes, for what is measured against size."""
    chunk: int = MIB
    memory: Path = Path("/dev/shm")
    """A folder in memory."""
    disk: Path = BUILD
    """A folder on a disk."""

    @classmethod
    def smoke(cls) -> Plan:
        """As little as shows that everything runs; what it measures means nothing."""
        return cls(quick=True, pairs=2, size=128 * MIB, sizes=(64 * MIB, 128 * MIB))

    def rounds(self, contestants: Mapping[Name, Callable[[], Result]]) -> list[dict[Name, Result]]:
        """Run ``contestants`` in turn, as often as planned."""
        return in_turn(contestants, self.pairs, warm_up=not self.quick)

    @contextmanager
    def folder(self, *, on_disk: bool = False) -> Iterator[Path]:
        """A folder for a while, in memory or on the disk."""
        where = self.disk if on_disk else self.memory
        where.mkdir(parents=True, exist_ok=True)
        if on_disk and _file_system(where) == "tmpfs":
            raise CannotRun(f"{where} is in memory: name a folder on a disk with --disk")
        with TemporaryDirectory(prefix="vfiostream-", dir=where) as folder:
            yield Path(folder)


def _file_system(path: Path) -> str:
    """The type of the file system that holds ``path``."""
    entries = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    holding = [(len(entry[1]), entry[2]) for entry in entries if path.resolve().is_relative_to(entry[1])]
    return max(holding)[1]
